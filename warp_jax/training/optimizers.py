"""Adam with linear warm-up and clipping, used by every optimisation."""

import optax

from warp_jax.settings.groups import Adam, Optimization


def make_optimizer(settings: Optimization, adam: Adam) -> optax.GradientTransformation:
    """Clip the global norm (clip_norm 0 = never), then Adam.

    The rate rises linearly to learning_rate over warmup_steps, then stays: its first value is learning_rate / warmup.
    """
    warmup = max(settings.warmup_steps, 1)
    rate = settings.learning_rate
    schedule = optax.linear_schedule(rate / warmup, rate, warmup - 1)
    clip = optax.clip_by_global_norm(settings.clip_norm) if settings.clip_norm else optax.identity()
    return optax.chain(clip, optax.adam(schedule, b1=adam.b1, b2=adam.b2, eps=adam.eps))
