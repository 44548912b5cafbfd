"""The baseline of configs/smollm2_135m.py: one run with a KL to SFT, nothing merged; beta is its to choose.

python -m warp_jax.main --config=configs/smollm2_135m_sft_anchor.py --workdir=runs/smollm2_135m_sft_anchor
"""

from ml_collections import ConfigDict

from configs import sft_anchor, smollm2_135m


def get_config() -> ConfigDict:
    return sft_anchor.with_sft_anchor(smollm2_135m.get_config())
