"""The points of configs/sweep_baselines.py on configs/tiny.py: minutes on two CPU cores, and numbers without meaning.

python scripts/sweep.py --config=configs/sweep_baselines_tiny.py --out=runs/baselines_tiny
"""

from ml_collections import ConfigDict

from warp_jax.configs import sweep_baselines, tiny


def get_config() -> ConfigDict:
    return tiny.get_config()


def sweep(add: sweep_baselines.Add) -> None:
    sweep_baselines.add_baselines(add, tiny.get_config())
