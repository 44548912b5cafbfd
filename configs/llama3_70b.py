"""WARP on a 70B model, a delta on the paper's setting (configs/gemma_7b.py), for 512 chips of TPU v5p.

  python -m warp_jax.main --config=configs/llama3_70b.py --workdir=runs/llama3_70b --multihost

Needs what configs/gemma_7b.py needs, with Llama 3 70B as the policy. Expected: never run; it compiles for v5p:8x8x8
(docs/scaling.md).
"""

from ml_collections import ConfigDict

from configs import gemma_7b


def get_config() -> ConfigDict:
    config = gemma_7b.get_config()
    config.model.source = "models/llama-3-70b-sft"
    config.model.size = "llama3_70b"
    config.rl.num_microbatches = 2  # 64 sequences, one for each part of the mesh that holds other data
    return config
