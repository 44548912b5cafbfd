"""WARP without a KL penalty: reward rises fast and the policies drift (the paper's beta = 0).

python -m warp_jax.main --config=configs/no_kl.py --workdir=runs/no_kl
"""

from ml_collections import ConfigDict

from configs import quickstart


def get_config() -> ConfigDict:
    config = quickstart.get_config()
    config.rl.kl_coef = 0.0
    return config
