"""WARP on a pretrained model: a Hugging Face folder or repository (hf://ORG/NAME), or a GGUF (docs/pretrained.md).

  python -m warp_jax.main --config=configs/pretrained.py --config.model.source=path/to/model --workdir=runs/mine

All weights are trained. theta_sft is the model without further training. The prompts are beginnings of film reviews;
set data.* for others. Run time and result depend on the model; see docs/pretrained.md.
"""

from ml_collections import ConfigDict

from warp_jax.configs import default


def get_config() -> ConfigDict:
    config = default.get_config()
    with config.unlocked():  # the model folder defines both
        del config.model.architecture
        del config.tokenizer
    config.sft.num_steps = 0
    return config
