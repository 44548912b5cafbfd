"""A variant: WARP with four runs per iteration, merged by their spherical mean (Karcher) instead of SLERP one by one.

  python -m warp_jax.main --config=configs/karcher.py --workdir=runs/karcher

Run time: as configs/quickstart.py, with twice as many runs. Expected result: not measured. The order of the runs does
not matter to the merge; with two runs, the merge is that of SLERP.
"""

from ml_collections import ConfigDict

from warp_jax.configs import quickstart


def get_config() -> ConfigDict:
    config = quickstart.get_config()
    config.warp.num_runs = 4
    config.warp.merge = "karcher"
    return config
