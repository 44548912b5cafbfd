"""Adam with linear warm-up and gradient clipping, used by SFT, reward model and RL."""

import optax

from warp_jax.settings.groups import Adam, Optimization


def make_optimizer(settings: Optimization, adam: Adam) -> optax.GradientTransformation:
    """Clip the gradient's global norm to clip_norm (0 = no clipping), then apply Adam.

    The learning rate rises linearly from learning_rate / warmup_steps to learning_rate, then stays constant.
    """
    warmup = max(settings.warmup_steps, 1)
    rate = settings.learning_rate
    schedule = optax.linear_schedule(rate / warmup, rate, warmup - 1)
    clip = optax.clip_by_global_norm(settings.clip_norm) if settings.clip_norm else optax.identity()
    return optax.chain(clip, optax.adam(schedule, b1=adam.b1, b2=adam.b2, eps=adam.eps))
