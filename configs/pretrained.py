"""WARP on a pretrained model: a Hugging Face folder, a .gguf file, or package:NAME for a GGUF in an installed package.

  python -m warp_jax.main --config=configs/pretrained.py --config.model.source=path/to/model --workdir=runs/mine

All weights are trained, and theta_sft is the model as it is. Film reviews are the prompts; set data.* for others.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    config = default.get_config()
    with config.unlocked():  # the model brings both
        del config.model.architecture
        del config.tokenizer
    config.sft.num_steps = 0
    return config
