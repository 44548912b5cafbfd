"""Adam with warm-up, a schedule of the learning rate and gradient clipping, used by SFT, reward model and RL."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from warp_jax import trees
from warp_jax.settings.groups import Adam, Optimization
from warp_jax.types import Params


def make_optimizer(settings: Optimization, adam: Adam) -> optax.GradientTransformation:
    """Clip the gradient's global norm to clip_norm (0 = no clipping), then apply Adam, or AdamW with weight_decay.

    The learning rate rises linearly from learning_rate / warmup_steps to learning_rate, then follows its schedule.
    Weights decay by learning_rate * weight_decay of themselves a step, biases and the scales of norms do not. The
    factors of LoRA decay, so that the policy decays towards the start of its run.
    """
    warmup = max(settings.warmup_steps, 1)
    rate = settings.learning_rate
    schedule = optax.linear_schedule(rate / warmup, rate, warmup - 1)
    if settings.learning_rate_schedule != "constant":
        end = rate * settings.learning_rate_end
        decay = make_schedule(settings.learning_rate_schedule, rate, end, settings.learning_rate_steps)
        schedule = optax.join_schedules([schedule, decay], [warmup - 1])
    clip = clip_by_global_norm(settings.clip_norm) if settings.clip_norm else optax.identity()
    moments: dict[str, Any] = {"b1": adam.b1, "b2": adam.b2, "eps": adam.eps}
    if settings.weight_decay:
        return optax.chain(clip, optax.adamw(schedule, weight_decay=settings.weight_decay, mask=_decays, **moments))
    return optax.chain(clip, optax.adam(schedule, **moments))


def clip_by_global_norm(limit: float) -> optax.GradientTransformation:
    """Scale gradients whose global norm is above `limit` down to it, as optax.clip_by_global_norm does.

    The step takes less memory: XLA keeps the gradients that optax has clipped beside the gradients themselves, as each
    is a choice between two values, but computes a product where it is used.
    """

    def update(grads: Params, state: optax.EmptyState, params: Params | None = None) -> tuple[Params, optax.EmptyState]:
        del params
        factor = limit / jnp.maximum(optax.global_norm(grads), limit)
        return jax.tree.map(lambda x: factor * x, grads), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def make_schedule(kind: str, start: float, end: float, steps: int) -> optax.Schedule:
    """Make a schedule from `start` to `end` in so many steps, then constant.

    kind: "constant" (start), "linear" or "cosine".
    """
    if kind == "constant":
        return optax.constant_schedule(start)
    if kind == "linear":
        return optax.linear_schedule(start, end, steps)
    return optax.cosine_decay_schedule(start, steps, alpha=end / start)


def _decays(params: Params) -> Any:
    """True for matrices and their factors, False for biases and the scales of norms."""
    matrices = "kernel", "embedding", "kernel/a", "kernel/b"
    return jax.tree_util.tree_map_with_path(lambda path, _: trees.path_name(path).endswith(matrices), params)
