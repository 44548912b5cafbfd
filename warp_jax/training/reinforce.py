"""Policy-gradient training of one policy: lines 4 to 9 of WARP's Algorithm 1."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh

from warp_jax import merging, trees
from warp_jax.data import batches
from warp_jax.generation import sampling
from warp_jax.parallel import meshes
from warp_jax.settings.groups import Rl
from warp_jax.training import loop, microbatches, objective
from warp_jax.types import Array, Params, PromptBatch, RewardError, RewardFn, Rewards, Rollout, TrainState

ScoreFn = Callable[[Params, Rollout], Array]  # params of the whole model -> log-probability of each token [B, C], nats


class Trainer(NamedTuple):
    """Functions, data and settings shared by all runs."""

    programs: loop.Programs[TrainState]
    sampler: sampling.Sampler
    reward_fn: RewardFn
    train_prompts: PromptBatch
    frozen_params: Params  # leaves of the model that no run trains
    mesh: Mesh
    rl: Rl
    seed: int  # for the order of prompts and for sampling, together with iteration, run and step


class Weighed(NamedTuple):
    """The advantage of each completion and what it is made of, in this order. B completions of C tokens."""

    policy_logps: Array  # [B, C], nats
    anchor_logps: Array  # [B, C], nats
    log_ratio: Array  # [B], nats
    shaped_rewards: Array  # [B], reward units
    advantages: Array  # [B], reward units


class Trace(NamedTuple):
    """Quantities that a step computes from a rollout, in this order: those of `Weighed`, then the update's."""

    policy_logps: Array
    anchor_logps: Array
    log_ratio: Array
    shaped_rewards: Array
    advantages: Array
    losses: Array  # [rl.num_microbatches]
    gradient: Params
    new_policy: Params


def make_programs(
    mesh: Mesh,
    params: Params,
    *,
    optimizer: optax.GradientTransformation,
    stop_ids: tuple[int, ...] = (),
    **options: Any,
) -> loop.Programs[TrainState]:
    """Compile init and update for trained params shaped like `params`.

    stop_ids: tokens that end a completion, for the metric `truncated`. options: other arguments of `policy_update`.
    """

    def update(
        state: TrainState, frozen_params: Params, rollout: Rollout, rewards: Array
    ) -> tuple[TrainState, dict[str, Array], Trace]:
        state, metrics, trace = policy_update(state, frozen_params, rollout, rewards, optimizer=optimizer, **options)
        share = objective.truncated(rollout.completion_ids, rollout.completion_mask, stop_ids).mean(dtype=jnp.float32)
        return state, {**metrics, "truncated": share}, trace

    return loop.make_programs(mesh, params, functools.partial(init_state, optimizer), update)


def init_state(optimizer: optax.GradientTransformation, params: Params) -> TrainState:
    """Make the first state. Policy and anchor are copies: `params` stay valid when the state's buffers are reused."""
    policy = jax.tree.map(lambda x: jnp.array(x, copy=True), params)
    anchor = jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), params)
    return TrainState(jnp.zeros((), jnp.int32), policy, anchor, optimizer.init(policy))


def policy_update(
    state: TrainState,
    frozen_params: Params,
    rollout: Rollout,
    rewards: Array,
    *,
    score_fn: ScoreFn,
    optimizer: optax.GradientTransformation,
    rl: Rl,
    ema_rate: float,
) -> tuple[TrainState, dict[str, Array], Trace]:
    """One training step on a rollout: lines 7 to 9 of Algorithm 1.

    Gradients are accumulated over rl.num_microbatches parts of the batch. One forward pass of the policy gives its
    log-probabilities, then its gradient, if the advantages of a part depend on its own rows only; else all parts are
    scored before. One function scores policy and anchor, so they differ by rounding alone while their weights are
    equal, and XLA computes the frozen layers below the first trained one once for both.

    Args:
        state: trained weights, their anchor and the optimizer's state.
        frozen_params: the other leaves of the model, shared by policy and anchor.
        rollout: completions sampled from the policy; those of one prompt are consecutive rows.
        rewards: float32 [B], raw.
        score_fn: see `ScoreFn`.
        optimizer: the one that made state.opt_state.
        rl: settings of the update.
        ema_rate: mu, the weight of the new policy in the anchor; 0 freezes the anchor.
    """
    cut = microbatches.Cut(rl.num_microbatches, rl.samples_per_prompt if _has_whole_groups(rl, len(rewards)) else 1)

    def score(params: Params, rollout: Rollout) -> Array:
        return score_fn(trees.join(params, frozen_params), rollout)

    def gradient(chunk: tuple[Rollout, Array, Weighed | None]) -> tuple[Params, tuple[Array, Weighed]]:
        rollout, rewards, weighed = chunk
        policy_logps, pull_back = jax.vjp(lambda params: score(params, rollout), state.params)
        if weighed is None:
            weighed = _weigh(policy_logps, score(state.anchor_params, rollout), rollout, rewards, rl)
        loss_fn = jax.value_and_grad(objective.reinforce_loss)
        loss, slopes = loss_fn(policy_logps, rollout.completion_mask, weighed.advantages)
        return pull_back(slopes)[0], (loss, weighed)

    chunks, before = cut.split((rollout, rewards)), None
    if not scores_once(rl, len(rewards)):
        both = jax.lax.map(lambda x: (score(state.params, x[0]), score(state.anchor_params, x[0])), chunks)
        policy_logps, anchor_logps = cut.join(both)
        before = cut.split(_weigh(policy_logps, anchor_logps, rollout, rewards, rl))
    grads, (losses, parts) = microbatches.mean_gradient(gradient, (*chunks, before), state.params)
    weighed: Weighed = cut.join(parts)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    anchor = merging.ema_update(state.anchor_params, params, ema_rate)
    metrics = {
        "loss": losses.mean(),
        "grad_norm": optax.global_norm(grads),
        "param_norm": optax.global_norm(params),  # finite metrics imply a finite new state
        **_metrics(rollout, rewards, weighed),
    }
    return TrainState(state.step + 1, params, anchor, opt_state), metrics, Trace(*weighed, losses, grads, params)


def _weigh(policy_logps: Array, anchor_logps: Array, rollout: Rollout, rewards: Array, rl: Rl) -> Weighed:
    """The advantage of each completion of these rows."""
    ratio = objective.log_ratio(policy_logps, anchor_logps, rollout.completion_mask)
    shaped = objective.shaped_rewards(rewards, ratio, rl.kl_coef)
    weights = objective.advantages(shaped, rl.advantage, rl.samples_per_prompt, rl.whiten)
    if rl.importance_cap:
        sampler_logps, mask = rollout.per_token_logps, rollout.completion_mask
        weights *= objective.importance_weights(policy_logps, sampler_logps, mask, rl.importance_cap)
    return Weighed(policy_logps, anchor_logps, ratio, shaped, weights)


def _metrics(rollout: Rollout, rewards: Array, weighed: Weighed) -> dict[str, Array]:
    """Metrics of the completions of a step."""
    mask, policy_logps = rollout.completion_mask, weighed.policy_logps
    tokens = mask.sum(dtype=jnp.float32)
    return {
        "reward": rewards.mean(),
        "shaped_reward": weighed.shaped_rewards.mean(),
        "anchor_kl": weighed.log_ratio.mean(),
        "nats_per_token": -policy_logps.sum() / tokens,
        "length": tokens / rewards.shape[0],
        **objective.sampler_drift(rollout.per_token_logps, policy_logps, mask),
        loop.BAD_ROWS: _bad_rows(rollout, weighed.shaped_rewards, policy_logps),
    }


def scores_once(rl: Rl, rows: int) -> bool:
    """True if an update on `rows` completions scores the policy once: advantages are local to a microbatch."""
    if rl.num_microbatches == 1:
        return True
    if rl.whiten or rl.advantage == "batch_mean":
        return False
    return rl.advantage == "none" or _has_whole_groups(rl, rows)


def _has_whole_groups(rl: Rl, rows: int) -> bool:
    """True if `rows` completions can be cut into microbatches that keep the samples of a prompt together."""
    return rows % (rl.num_microbatches * rl.samples_per_prompt) == 0


def _bad_rows(rollout: Rollout, shaped: Array, policy_logps: Array) -> Array:
    """Rows of the data whose reward or log-probabilities are not finite, -1 for the others: int32 [B]."""
    logps = jnp.where(rollout.completion_mask, rollout.per_token_logps + policy_logps, 0.0)
    return jnp.where(jnp.isfinite(shaped + logps.sum(axis=1)), -1, rollout.example_ids)


class Run(NamedTuple):
    """One run of one iteration. Prompts and random keys of its steps depend only on these and on the trainer's seed."""

    name: str
    key: Array


def make_run(trainer: Trainer, iteration: int, run: int) -> Run:
    """Make the run with these numbers, from 1."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(trainer.seed), iteration), run)
    return Run(f"iteration {iteration} run {run}", key)


def run_policy(trainer: Trainer, init_params: Params, *, iteration: int, run: int, schedule: loop.Schedule) -> Params:
    """Train one policy from init_params, or resume its training; return the trained leaves of the policy."""
    step_fn = functools.partial(train_step, trainer, make_run(trainer, iteration, run))
    return loop.run_steps(step_fn, lambda: trainer.programs.init(init_params), schedule).params


def train_step(trainer: Trainer, run: Run, state: TrainState, step: int) -> tuple[TrainState, Mapping[str, Any]]:
    """One step of a run: sample, reward, update."""
    rollout, rewards = collect(trainer, run, state, step)
    total = meshes.put_batch(trainer.mesh, rewards.total)
    with jax.profiler.TraceAnnotation("update"):
        state, metrics = trainer.programs.update(state, trainer.frozen_params, rollout, total)
    parts = {f"reward/{name}": jnp.mean(values) for name, values in rewards.parts.items()}
    return state, {**metrics, **parts}


def shared_samples(rl: Rl, mesh: Mesh | AbstractMesh) -> int:
    """Samples that share the prefill of their prompt: all, or 1 if the prompts of a step do not divide by devices."""
    num_prompts = rl.batch_size // rl.samples_per_prompt
    return 1 if num_prompts % meshes.batch_devices(mesh) else rl.samples_per_prompt


def collect(trainer: Trainer, run: Run, state: TrainState, step: int) -> tuple[Rollout, Rewards]:
    """Sample the completions of a step and compute their rewards."""
    rl, mesh, copies = trainer.rl, trainer.mesh, shared_samples(trainer.rl, trainer.mesh)
    count, num_prompts = len(trainer.train_prompts.example_ids), rl.batch_size // rl.samples_per_prompt
    rows = batches.epoch_rows(count, num_prompts, step, seed=trainer.seed, stream=run.name)
    rows = np.repeat(rows, rl.samples_per_prompt // copies)
    prompts = meshes.put_batch(mesh, batches.take(trainer.train_prompts, rows))
    params = trees.join(state.params, trainer.frozen_params)
    with jax.profiler.TraceAnnotation("sample"):
        rollout = trainer.sampler(params, prompts, jax.random.fold_in(run.key, step), copies)
    try:
        with jax.profiler.TraceAnnotation("reward"):
            return rollout, trainer.reward_fn(rollout)
    except RewardError as error:
        raise RewardError(f"{run.name} step {step}: {error}") from error
