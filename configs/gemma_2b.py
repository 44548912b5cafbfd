"""The paper's setting on Gemma 2B instead of 7B.

  python -m warp_jax.main --config=configs/gemma_2b.py --workdir=runs/gemma_2b

It needs the same files as configs/gemma_7b.py, with a Gemma 2B policy. Never run, so run time and result are unknown;
docs/scaling.md estimates its memory on TPU slices.
"""

from ml_collections import ConfigDict

from warp_jax.configs import gemma_7b


def get_config() -> ConfigDict:
    config = gemma_7b.get_config()
    config.model.source = "models/gemma-2b-sft"
    config.model.size = "gemma_2b"
    return config
