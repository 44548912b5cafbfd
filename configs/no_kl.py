"""A variant: WARP without a KL penalty (the paper's beta = 0).

  python -m warp_jax.main --config=configs/no_kl.py --workdir=runs/no_kl

Run time: as configs/quickstart.py, which has the same number of steps. Expected (not measured here): the reward rises
faster, and the KL to SFT grows more.
"""

from ml_collections import ConfigDict

from warp_jax.configs import quickstart


def get_config() -> ConfigDict:
    config = quickstart.get_config()
    config.rl.kl_coef = 0.0
    return config
