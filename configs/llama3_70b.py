"""The paper's setting on Llama 3 70B, for 512 chips of TPU v5p.

  python -m warp_jax.main --config=configs/llama3_70b.py --workdir=runs/llama3_70b --multihost

It needs the same files as configs/gemma_7b.py, with Llama 3 70B as the policy. Never run: run time and result
are unknown. Its programs compile for v5p:8x8x8 and fit (docs/scaling.md).
"""

from ml_collections import ConfigDict

from configs import gemma_7b


def get_config() -> ConfigDict:
    config = gemma_7b.get_config()
    config.model.source = "models/llama-3-70b-sft"
    config.model.size = "llama3_70b"
    config.rl.num_microbatches = 2  # 64 sequences each: one per part of the batch (512 chips / 8)
    return config
