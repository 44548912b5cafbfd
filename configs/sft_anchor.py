"""REINFORCE with a KL to SFT: the anchor is frozen, the paper's main baseline (its section 4.1).

python -m warp_jax.main --config=configs/sft_anchor.py --workdir=runs/sft_anchor
"""

from ml_collections import ConfigDict

from configs import quickstart


def get_config() -> ConfigDict:
    config = quickstart.get_config()
    config.warp.ema_rate = 0.0
    return config
