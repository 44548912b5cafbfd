"""The paper's setting on Llama 3 70B, for 256 chips of TPU v6e or 512 of v5p.

  python -m warp_jax.main --config=configs/llama3_70b.py --workdir=runs/llama3_70b --multihost

It needs the same files as configs/gemma_7b.py, with Llama 3 70B as the policy. Never run: run time and result
are unknown. Its programs compile for both and fit (docs/scaling.md).
"""

from ml_collections import ConfigDict

from warp_jax.configs import gemma_7b


def get_config() -> ConfigDict:
    config = gemma_7b.get_config()
    config.model.source = "models/llama-3-70b-sft"
    config.model.size = "llama3_70b"
    config.mesh = (1, -1, 8)  # on 512 chips, the batch is split over 64, which sft.batch_size = 64 allows
    config.sampling.tensor = 16  # a copy of the weights that fits v6e
    return config
