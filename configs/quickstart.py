"""WARP in full on two CPU cores: SFT, a learned reward, and two iterations of two runs, on 33,530 film reviews.

  python -m warp_jax.main --config=configs/quickstart.py --workdir=runs/quickstart

Run time: 273 s on two CPU cores, installation included. Expected (seed 0): reward from 0.094 (SFT) to 1.465, gold
reward to 2.637, at a KL to SFT of 30.1 nats. Other processors round differently. See docs/results/README.md.
"""

from ml_collections import ConfigDict

from warp_jax.configs import default


def get_config() -> ConfigDict:
    config = default.get_config()
    config.tokenizer.vocab_size = 2048
    config.model.architecture.width = 128
    config.model.architecture.num_heads = 4
    config.model.architecture.num_kv_heads = 2
    config.model.architecture.mlp_dim = 384
    config.sft.num_steps = 900
    config.sft.sequence_tokens = 32
    config.reward_model.num_steps = 400
    config.rl.batch_size = 16
    config.rl.warmup_steps = 20
    config.warp.steps_per_iteration = (300, 300)
    config.warp.ema_rate = 0.02
    config.evaluation.every = 150
    # many values, because fronts are compared by interpolation; above 1 (extrapolation) as in [P Fig. 10b]
    config.front.etas = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.25, 1.5, 2.0)
    return config
