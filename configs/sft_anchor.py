"""REINFORCE with a KL to SFT: one run, its anchor frozen, no merging; the paper's main baseline (its section 4.1).

python -m warp_jax.main --config=configs/sft_anchor.py --workdir=runs/sft_anchor
"""

from ml_collections import ConfigDict

from configs import quickstart


def get_config() -> ConfigDict:
    return with_sft_anchor(quickstart.get_config())


def with_sft_anchor(config: ConfigDict) -> ConfigDict:
    """The baseline of a config: as many steps as one run of it has in all its iterations."""
    config.warp.ema_rate = 0.0
    config.warp.num_iterations = 1
    config.warp.num_runs = 1
    config.warp.steps_per_iteration = (sum(config.warp.steps_per_iteration),)
    return config
