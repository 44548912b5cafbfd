"""WARP whole on two CPU cores: 33,530 film reviews, a learned reward, two iterations of two runs.

python -m warp_jax.main --config=configs/quickstart.py --workdir=runs/quickstart
"""

from ml_collections import ConfigDict

from configs import default


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
    # dense, because fronts are compared between the points; beyond 1 as in [P Fig. 10b], where the second front goes on
    config.front.etas = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.25, 1.5, 2.0)
    return config
