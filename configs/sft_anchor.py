"""The paper's main baseline: one run of REINFORCE with a KL penalty to SFT, and no merging [P s4.1].

  python -m warp_jax.main --config=configs/sft_anchor.py --workdir=runs/sft_anchor
  python scripts/compare.py --baseline=runs/sft_anchor runs/quickstart

The anchor is frozen (ema_rate 0), so it stays SFT. The run has 600 steps; configs/quickstart.py has four
runs of 300. Expected result: not measured; configs/smollm2_135m_sft_anchor.py has a measured one.
"""

from ml_collections import ConfigDict

from warp_jax.configs import quickstart


def get_config() -> ConfigDict:
    return with_sft_anchor(quickstart.get_config())


def with_sft_anchor(config: ConfigDict) -> ConfigDict:
    """The SFT-anchor baseline of a config: one run with the steps of all its iterations together."""
    config.warp.ema_rate = 0.0
    config.warp.num_iterations = 1
    config.warp.num_runs = 1
    config.warp.steps_per_iteration = (sum(config.warp.steps_per_iteration),)
    return config
