"""Every part of WARP once, as small as possible, for tests. The numbers of its report mean nothing.

python -m warp_jax.main --config=configs/tiny.py --workdir=runs/tiny
"""

from ml_collections import ConfigDict

from warp_jax.configs import default


def get_config() -> ConfigDict:
    config = default.get_config()
    config.checkpoint_every = 4
    config.data.split = "train[:2000]"
    config.tokenizer.vocab_size = 300
    config.model.architecture.width = 16
    config.model.architecture.num_layers = 2
    config.model.architecture.num_heads = 2
    config.model.architecture.num_kv_heads = 1
    config.model.architecture.head_dim = 8
    config.model.architecture.mlp_dim = 32
    config.sft.num_steps = 10
    config.sft.batch_size = 8
    config.sft.sequence_tokens = 16
    config.reward_model.num_steps = 10
    config.reward_model.batch_size = 8
    config.reward_model.sequence_tokens = 10
    config.sampling.prompt_tokens = 4
    config.sampling.max_new_tokens = 6
    config.rl.batch_size = 8
    config.rl.warmup_steps = 2
    config.rl.learning_rate = 1e-2
    config.warp.steps_per_iteration = (6, 6)
    config.evaluation.num_prompts = 32
    config.evaluation.batch_size = 16
    config.evaluation.every = 3
    config.report.num_samples = 2
    config.report.bootstrap_resamples = 50
    return config
