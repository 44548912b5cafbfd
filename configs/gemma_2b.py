"""The paper's setting on Gemma 2B, a delta on configs/gemma_7b.py.

  python -m warp_jax.main --config=configs/gemma_2b.py --workdir=runs/gemma_2b

Needs what configs/gemma_7b.py needs, with a Gemma 2B policy. Expected: never run; see docs/scaling.md.
"""

from ml_collections import ConfigDict

from configs import gemma_7b


def get_config() -> ConfigDict:
    config = gemma_7b.get_config()
    config.model.source = "models/gemma-2b-sft"
    config.model.size = "gemma_2b"
    return config
