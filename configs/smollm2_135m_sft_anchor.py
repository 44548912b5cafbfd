"""The baseline of configs/smollm2_135m.py: one run with a KL to SFT, nothing merged; beta is its to choose.

python -m warp_jax.main --config=configs/smollm2_135m_sft_anchor.py --workdir=runs/smollm2_135m_sft_anchor
"""

from ml_collections import ConfigDict

from configs import smollm2_135m


def get_config() -> ConfigDict:
    config = smollm2_135m.get_config()
    config.warp.ema_rate = 0.0
    config.warp.num_iterations = 1
    config.warp.num_runs = 1
    config.warp.steps_per_iteration = (sum(config.warp.steps_per_iteration),)
    return config
