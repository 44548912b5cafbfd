"""A variant: WARP with linear (LERP) instead of spherical interpolation (SLERP) of the runs [P App. B].

  python -m warp_jax.main --config=configs/lerp.py --workdir=runs/lerp

Run time: as configs/quickstart.py, which has the same number of steps. Expected result: not measured. Without SLERP,
the merge lies closer to its start, so compare the fronts at equal KL.
"""

from ml_collections import ConfigDict

from warp_jax.configs import quickstart


def get_config() -> ConfigDict:
    config = quickstart.get_config()
    config.warp.merge = "lerp"
    return config
