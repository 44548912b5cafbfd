"""The baseline of configs/smollm2_135m.py: one run of 120 steps with a KL penalty to SFT, and no merging.

  python -m warp_jax.main --config=configs/smollm2_135m_sft_anchor.py --workdir=runs/smollm2_135m_sft_anchor

For a fair baseline, try several values of rl.kl_coef (beta). Expected (seed 0, beta 0.1): reward 1.930 and gold reward
1.110, at a KL to SFT of 8.8 nats. See docs/results/README.md.
"""

from ml_collections import ConfigDict

from warp_jax.configs import sft_anchor, smollm2_135m


def get_config() -> ConfigDict:
    return sft_anchor.with_sft_anchor(smollm2_135m.get_config())
