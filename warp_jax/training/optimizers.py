"""Adam with linear warm-up and clipping, used by every stage."""

import optax


def make_optimizer(
    *, learning_rate: float, warmup_steps: int, clip_norm: float, b1: float, b2: float, eps: float
) -> optax.GradientTransformation:
    """Clip the global norm (0 = never), then Adam. The rate rises to learning_rate over warmup_steps, then stays."""
    warmup = max(warmup_steps, 1)
    schedule = optax.linear_schedule(learning_rate / warmup, learning_rate, warmup - 1)
    clip = optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity()
    return optax.chain(clip, optax.adam(schedule, b1=b1, b2=b2, eps=eps))
