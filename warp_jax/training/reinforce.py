"""One run of RL: Algorithm 1 of WARP, lines 4 to 9, as a pure function of (init_params, iteration, run)."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from warp_jax import merging, trees
from warp_jax.data import batches
from warp_jax.models import partitioning
from warp_jax.parallel import meshes
from warp_jax.training import loop, objective, sampling, scoring
from warp_jax.types import ApplyFn, Array, Params, PromptBatch, RewardFn, Rollout, TrainState


class Programs(NamedTuple):
    """The compiled parts of a training step but for generation, shared by all runs.

    init: trained params -> TrainState.
    update: TrainState (donated), frozen params, Rollout, rewards [B] -> TrainState, metrics.
    """

    init: Callable[[Params], TrainState]
    update: Callable[[TrainState, Params, Rollout, Array], tuple[TrainState, Mapping[str, Array]]]


def make_programs(
    mesh: Mesh,
    params: Params,
    *,
    optimizer: optax.GradientTransformation,
    **settings: Any,
) -> Programs:
    """Jit the parts for trained parameters shaped like `params`; `settings` are those of `policy_update`."""
    init_fn = functools.partial(init_state, optimizer)
    layout = partitioning.param_shardings(mesh, jax.eval_shape(init_fn, params))
    update = functools.partial(policy_update, optimizer=optimizer, **settings)
    return Programs(
        init=jax.jit(init_fn, out_shardings=layout),
        update=jax.jit(update, donate_argnums=0, out_shardings=(layout, meshes.replicated(mesh))),
    )


def init_state(optimizer: optax.GradientTransformation, params: Params) -> TrainState:
    """Policy and anchor start at `params` in buffers of their own, so that donating the state leaves `params` alive."""
    policy = jax.tree.map(lambda x: jnp.array(x, copy=True), params)
    anchor = jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), params)
    return TrainState(jnp.zeros((), jnp.int32), policy, anchor, optimizer.init(policy))


def policy_update(
    state: TrainState,
    frozen_params: Params,
    rollout: Rollout,
    rewards: Array,
    *,
    apply_fn: ApplyFn,
    optimizer: optax.GradientTransformation,
    temperature: float,
    kl_coef: float,
    ema_rate: float,
    advantage: str,
    group_size: int,
    whiten: bool,
    num_microbatches: int,
    logits_chunk: int,
) -> tuple[TrainState, dict[str, Array]]:
    """One step on a rollout and its raw rewards [B]: lines 7 to 9. The state holds what is trained; frozen_params, the
    other leaves of the same model, are part of policy and anchor alike.

    The batch is cut into num_microbatches, whose gradients are averaged; advantages are of the whole batch.
    Policy and anchor are scored by the same function, so that the KL of the first step is exactly 0, and side by side,
    so that XLA computes frozen layers below the first trained one once for both.
    """

    def score(params: Params, rollout: Rollout) -> Array:
        whole = trees.join(params, frozen_params)
        return scoring.per_token_logps(apply_fn, whole, rollout, temperature, chunk=logits_chunk)

    chunks = _split(rollout, num_microbatches)
    both = jax.lax.map(lambda chunk: (score(state.params, chunk), score(state.anchor_params, chunk)), chunks)
    policy_logps, anchor_logps = (_join(logps) for logps in both)
    ratio = objective.log_ratio(policy_logps, anchor_logps, rollout.completion_mask)
    shaped = objective.shaped_rewards(rewards, ratio, kl_coef)
    weights = objective.advantages(shaped, advantage, group_size, whiten)

    def loss_fn(params: Params, chunk: Rollout, chunk_weights: Array) -> Array:
        return objective.reinforce_loss(score(params, chunk), chunk.completion_mask, chunk_weights)

    def accumulate(total: Params, chunk: tuple[Rollout, Array]) -> tuple[Params, Array]:
        loss, grads = jax.value_and_grad(loss_fn)(state.params, *chunk)
        return jax.tree.map(lambda a, b: a + b / num_microbatches, total, grads), loss

    zeros = jax.tree.map(jnp.zeros_like, state.params)
    grads, losses = jax.lax.scan(accumulate, zeros, (chunks, _split(weights, num_microbatches)))
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    anchor = merging.ema_update(state.anchor_params, params, ema_rate)
    tokens = rollout.completion_mask.sum(dtype=jnp.float32)
    metrics = {
        "loss": losses.mean(),
        "reward": rewards.mean(),
        "shaped_reward": shaped.mean(),
        "anchor_kl": ratio.mean(),
        "nats_per_token": -policy_logps.sum() / tokens,
        "length": tokens / rewards.shape[0],
        "grad_norm": optax.global_norm(grads),
    }
    return TrainState(state.step + 1, params, anchor, opt_state), metrics


def run_policy(
    init_params: Params,
    frozen_params: Params,
    *,
    programs: Programs,
    sampler: sampling.Sampler,
    reward_fn: RewardFn,
    train_prompts: PromptBatch,
    mesh: Mesh,
    seed: int,
    iteration: int,
    run: int,
    num_steps: int,
    batch_size: int,
    group_size: int,
    checkpoint_every: int,
    directory: Path,
    on_step: loop.OnStep,
    after_step: Callable[[int, TrainState], None],
) -> Params:
    """The policy after num_steps steps from init_params. Prompts and keys follow from (seed, iteration, run, step)."""
    stream = f"iteration {iteration} run {run}"
    run_key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), iteration), run)

    def step_fn(state: TrainState, step: int) -> tuple[TrainState, Mapping[str, Any]]:
        count = len(train_prompts.example_ids)
        rows = batches.epoch_rows(count, batch_size // group_size, step, seed=seed, stream=stream)
        batch = batches.take(train_prompts, np.repeat(rows, group_size))
        params = trees.join(state.params, frozen_params)
        rollout = sampler(params, meshes.put_batch(mesh, batch), jax.random.fold_in(run_key, step))
        rewards = reward_fn(rollout)
        state, metrics = programs.update(state, frozen_params, rollout, meshes.put_batch(mesh, rewards.total))
        parts = {f"reward/{name}": jnp.mean(values) for name, values in rewards.parts.items()}
        return state, {**metrics, **parts}

    state = loop.run_steps(
        step_fn,
        lambda: programs.init(init_params),
        num_steps=num_steps,
        directory=directory,
        checkpoint_every=checkpoint_every,
        on_step=on_step,
        after_step=after_step,
    )
    return state.params


def _split(tree: Any, parts: int) -> Any:
    """[B, ...] to [parts, B / parts, ...]; row b goes to part b % parts, so every device keeps its own rows."""
    return jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), tree)


def _join(chunks: Array) -> Array:
    """The inverse of `_split`."""
    return chunks.swapaxes(0, 1).reshape(-1, *chunks.shape[2:])
