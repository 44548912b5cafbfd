"""A variant: WARP whose runs train LoRA adapters of rank 8 (arXiv 2106.09685) instead of whole weights.

  python -m warp_jax.main --config=configs/lora.py --workdir=runs/lora

Run time and expected result: not measured. Anchor, merge and front are those of whole weights, as in
configs/quickstart.py. The learning rate is ten times that of whole weights.
"""

from ml_collections import ConfigDict

from warp_jax.configs import quickstart


def get_config() -> ConfigDict:
    config = quickstart.get_config()
    config.model.lora.rank = 8
    config.rl.learning_rate = 1e-3
    return config
