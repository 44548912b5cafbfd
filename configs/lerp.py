"""WARP with linear instead of spherical interpolation (the paper's Appendix B).

python -m warp_jax.main --config=configs/lerp.py --workdir=runs/lerp
"""

from ml_collections import ConfigDict

from configs import quickstart


def get_config() -> ConfigDict:
    config = quickstart.get_config()
    config.warp.merge = "lerp"
    return config
