"""Policy-gradient training of one policy: lines 4 to 9 of WARP's Algorithm 1."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh

from warp_jax import trees
from warp_jax.data import batches
from warp_jax.generation import sampling
from warp_jax.models import lora, partitioning
from warp_jax.parallel import meshes
from warp_jax.settings.groups import LARGEST, Lora, Rl
from warp_jax.training import anchors, loop, microbatches, objective, optimizers
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
    lora: Lora = Lora()


class Weighed(NamedTuple):
    """The advantage of each completion and what it is made of, in this order. B completions of C tokens."""

    policy_logps: Array  # [B, C], nats
    anchor_logps: Array  # [B, C], nats
    log_ratio: Array  # [B], nats
    shaped_rewards: Array  # [B], reward units
    advantages: Array  # [B, 1], reward units; [B, C] with rl.kl_in "token_reward"


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


class Rule(NamedTuple):
    """Functions and settings of an update."""

    score_fn: ScoreFn
    optimizer: optax.GradientTransformation
    rl: Rl
    anchor: anchors.Anchor
    stop_ids: tuple[int, ...] = ()  # tokens that end a completion
    lora: Lora = Lora()

    def weights(self, params: Params, start: Params) -> Params:
        """Weights of a policy from what a run trains: its weights, or with LoRA the factors of their change."""
        return lora.expand(start, params, self.lora.alpha) if self.lora.rank else params


def make_programs(mesh: Mesh, params: Params, rule: Rule) -> loop.Programs[TrainState]:
    """Compile init and update for trained params shaped like `params`."""
    update = functools.partial(policy_update, rule)
    programs = loop.make_programs(mesh, params, functools.partial(init_state, rule), update)
    if not rule.lora.rank:
        return programs
    return programs._replace(weights=jax.jit(rule.weights, out_shardings=partitioning.param_shardings(mesh, params)))


def init_state(rule: Rule, params: Params, key: Array | None = None) -> TrainState:
    """Make the first state. Policy and anchor are copies: `params` stay valid when the state's buffers are reused.

    key: of the run, for the first factors of LoRA; None = jax.random.key(0).
    """
    if rule.lora.rank:
        key = jax.random.fold_in(jax.random.key(0) if key is None else key, LARGEST)  # steps have the numbers below
        policy = lora.init(key, params, rule.lora.rank)
    else:
        policy = jax.tree.map(lambda x: jnp.array(x, copy=True), params)
    opt_state: Any = rule.optimizer.init(policy)
    if rule.rl.kl_schedule == "adaptive":
        opt_state = opt_state, jnp.float32(rule.rl.kl_coef)
    return TrainState(jnp.zeros((), jnp.int32), policy, rule.anchor.init(params), opt_state)


def policy_update(
    rule: Rule, state: TrainState, frozen_params: Params, rollout: Rollout, rewards: Array
) -> tuple[TrainState, dict[str, Array], Trace]:
    """One training step on a rollout: lines 7 to 9 of Algorithm 1.

    Gradients are accumulated over rl.num_microbatches parts of the batch. One forward pass of the policy gives its
    log-probabilities, then its gradient, if the advantages of a part depend on its own rows only; else all parts are
    scored before. One function scores policy and anchor, so they differ by rounding alone while their weights are
    equal, and XLA computes the frozen layers below the first trained one once for both.

    Args:
        rule: see `Rule`.
        state: trained weights, their anchor and the optimizer's state.
        frozen_params: the other leaves of the model, shared by policy and anchor; with LoRA, all at the run's start.
        rollout: completions sampled from the policy; those of one prompt are consecutive rows.
        rewards: float32 [B], raw.
    """
    rl, anchor_params = rule.rl, rule.anchor.weights(state.anchor_params)
    opt_state, kl_coef = _kl_coef(rl, state)
    cut = microbatches.Cut(rl.num_microbatches, rl.samples_per_prompt if _has_whole_groups(rl, len(rewards)) else 1)
    weigh = functools.partial(_weigh, rule, kl_coef)

    def score(params: Params, rollout: Rollout) -> Array:
        return rule.score_fn(trees.join(params, frozen_params), rollout)

    def gradient(params: Params, chunk: tuple[Rollout, Array, Weighed | None]) -> tuple[Params, tuple[Array, Weighed]]:
        rollout, rewards, weighed = chunk
        policy_logps, pull_back = jax.vjp(lambda params: score(rule.weights(params, frozen_params), rollout), params)
        if weighed is None:
            weighed = weigh((policy_logps, score(anchor_params, rollout)), rollout, rewards)
        loss, slopes = jax.value_and_grad(functools.partial(_loss, rule, kl_coef))(policy_logps, weighed, rollout)
        return pull_back(slopes)[0], (loss, weighed)

    chunks, before = cut.split((rollout, rewards)), None
    if not scores_once(rl, len(rewards)):
        policy = rule.weights(state.params, frozen_params)
        both = jax.lax.map(lambda x: (score(policy, x[0]), score(anchor_params, x[0])), chunks)
        before = cut.split(weigh(cut.join(both), rollout, rewards))

    def descend(carry: tuple[Params, Any]) -> tuple[tuple[Params, Any], tuple[Params, Any]]:
        params, opt_state = carry
        grads, found = microbatches.mean_gradient(functools.partial(gradient, params), (*chunks, before), params)
        updates, opt_state = rule.optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), (grads, found)

    (params, opt_state), (grads, (losses, parts)) = _repeat(descend, (state.params, opt_state), rl.updates_per_rollout)
    weighed: Weighed = cut.join(parts)
    step, policy = state.step + 1, rule.weights(params, frozen_params)
    anchor = rule.anchor.update(state.anchor_params, policy, step)
    metrics = {
        "loss": losses.mean(),
        "grad_norm": optax.global_norm(grads),
        "param_norm": optax.global_norm(policy),  # finite metrics imply a finite new state
        **_metrics(rule, rollout, rewards, weighed),
        **({} if rl.kl_schedule == "constant" else {"kl_coef": kl_coef}),
    }
    if rl.kl_schedule == "adaptive":
        opt_state = opt_state, objective.adapted_kl_coef(kl_coef, weighed.log_ratio.mean(), rl)
    return TrainState(step, params, anchor, opt_state), metrics, Trace(*weighed, losses, grads, policy)


def _repeat(descend: Callable[..., Any], carry: Any, times: int) -> tuple[Any, Any]:
    """Descend so often; return the last carry, and what the last call returns beside it."""
    if times > 1:
        carry = jax.lax.fori_loop(1, times, lambda _, carry: descend(carry)[0], carry)
    return descend(carry)


def _kl_coef(rl: Rl, state: TrainState) -> tuple[Any, Any]:
    """The optimizer's state, and beta of this step in reward units per nat."""
    if rl.kl_schedule == "constant":
        return state.opt_state, rl.kl_coef
    if rl.kl_schedule == "adaptive":
        return state.opt_state
    schedule = optimizers.make_schedule(rl.kl_schedule, rl.kl_coef, rl.kl_coef_end, rl.kl_steps)
    return state.opt_state, schedule(state.step)


def _weigh(rule: Rule, kl_coef: float | Array, logps: tuple[Array, Array], rollout: Rollout, rewards: Array) -> Weighed:
    """The advantage of each completion of these rows. logps: of policy and anchor, [B, C]."""
    rl, mask, (policy_logps, anchor_logps) = rule.rl, rollout.completion_mask, logps
    ratios = objective.log_ratios(policy_logps, anchor_logps, mask)
    kl = jax.lax.stop_gradient(objective.kl_estimates(ratios, rl.kl_estimator))
    if rl.truncation_penalty:
        rewards = rewards - jnp.where(_cut_off(rule, rollout), rl.truncation_penalty, 0.0)
    shaped = rewards if rl.kl_in == "loss" else objective.shaped_rewards(rewards, kl.sum(axis=1), kl_coef)
    earlier = kl_coef * (jnp.cumsum(kl, axis=1) - kl) if rl.kl_in == "token_reward" else None
    weights = objective.advantages(shaped, rl.advantage, rl.samples_per_prompt, rl.whiten, earlier)
    if rl.importance_cap:
        capped = objective.importance_weights(policy_logps, rollout.per_token_logps, mask, rl.importance_cap)
        weights *= capped[:, None]
    if rl.mask_truncated:
        weights = jnp.where(_cut_off(rule, rollout)[:, None], 0.0, weights)
    return Weighed(*logps, ratios.sum(axis=1), shaped, weights)


def _loss(rule: Rule, kl_coef: float | Array, policy_logps: Array, weighed: Weighed, rollout: Rollout) -> Array:
    """The loss of these rows, a function of the policy's log-probabilities."""
    rl, mask = rule.rl, rollout.completion_mask
    if rl.updates_per_rollout == 1:
        loss = objective.reinforce_loss(policy_logps, mask, weighed.advantages)
    else:
        moved = objective.log_ratios(policy_logps, weighed.policy_logps, mask)
        loss = objective.clipped_loss(moved, mask, weighed.advantages, rl)
    if rl.kl_in == "loss":
        ratios = objective.log_ratios(policy_logps, weighed.anchor_logps, mask)
        kl = objective.kl_estimates(ratios, rl.kl_estimator).sum(axis=1)
        if rl.mask_truncated:
            kl = jnp.where(_cut_off(rule, rollout), 0.0, kl)
        loss += kl_coef * kl.mean()
    return loss


def _cut_off(rule: Rule, rollout: Rollout) -> Array:
    """True for each completion that ends at the maximum length, without a stop token: bool [B]."""
    return objective.truncated(rollout.completion_ids, rollout.completion_mask, rule.stop_ids)


def _metrics(rule: Rule, rollout: Rollout, rewards: Array, weighed: Weighed) -> dict[str, Array]:
    """Metrics of the completions of a step."""
    mask, policy_logps = rollout.completion_mask, weighed.policy_logps
    tokens = mask.sum(dtype=jnp.float32)
    return {
        "reward": rewards.mean(),
        "shaped_reward": weighed.shaped_rewards.mean(),
        "anchor_kl": weighed.log_ratio.mean(),
        "nats_per_token": -policy_logps.sum() / tokens,
        "length": tokens / rewards.shape[0],
        "truncated": _cut_off(rule, rollout).mean(dtype=jnp.float32),
        **objective.sampler_drift(rollout.per_token_logps, policy_logps, mask),
        loop.BAD_ROWS: _bad_rows(rollout, weighed.shaped_rewards, policy_logps),
    }


def scores_once(rl: Rl, rows: int) -> bool:
    """True if an update on `rows` completions scores the policy once: advantages are local to a microbatch."""
    if rl.updates_per_rollout > 1:
        return False
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
    fixed_params: Params  # leaves of the model that it does not train; with LoRA, all leaves at its start


def make_run(trainer: Trainer, init_params: Params, iteration: int, run: int) -> Run:
    """Make the run with these numbers, from 1."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(trainer.seed), iteration), run)
    fixed = trees.join(init_params, trainer.frozen_params) if trainer.lora.rank else trainer.frozen_params
    return Run(f"iteration {iteration} run {run}", key, fixed)


def run_policy(trainer: Trainer, init_params: Params, *, iteration: int, run: int, schedule: loop.Schedule) -> Params:
    """Train one policy from init_params, or resume its training; return the trained leaves of the policy."""
    this = make_run(trainer, init_params, iteration, run)
    step_fn = functools.partial(train_step, trainer, this)
    state = loop.run_steps(step_fn, lambda: trainer.programs.init(init_params, this.key), schedule)
    return trainer.programs.weights(state.params, init_params)


def train_step(trainer: Trainer, run: Run, state: TrainState, step: int) -> tuple[TrainState, Mapping[str, Any]]:
    """One step of a run: sample, reward, update."""
    rollout, rewards = collect(trainer, run, state, step)
    total = meshes.put_batch(trainer.mesh, rewards.total)
    with jax.profiler.TraceAnnotation("update"):
        state, metrics = trainer.programs.update(state, run.fixed_params, rollout, total)
    parts = {f"reward/{name}": jnp.mean(values) for name, values in rewards.parts.items()}
    return state, {**metrics, **parts}


def shared_samples(rl: Rl, mesh: Mesh | AbstractMesh, parts: int = 1) -> int:
    """Samples that share one computation of their prompt in a batch that is cut into `parts`: all, or 1 if the prompts
    of a part do not divide by devices.
    """
    num_prompts = rl.batch_size // rl.samples_per_prompt
    return 1 if num_prompts % (parts * meshes.batch_devices(mesh)) else rl.samples_per_prompt


def collect(trainer: Trainer, run: Run, state: TrainState, step: int) -> tuple[Rollout, Rewards]:
    """Sample the completions of a step and compute their rewards."""
    rl, mesh, copies = trainer.rl, trainer.mesh, shared_samples(trainer.rl, trainer.mesh)
    count, num_prompts = len(trainer.train_prompts.example_ids), rl.batch_size // rl.samples_per_prompt
    rows = batches.epoch_rows(count, num_prompts, step, seed=trainer.seed, stream=run.name)
    rows = np.repeat(rows, rl.samples_per_prompt // copies)
    prompts = meshes.put_batch(mesh, batches.take(trainer.train_prompts, rows))
    key = jax.random.fold_in(run.key, step)
    with jax.profiler.TraceAnnotation("sample"):
        weights = trainer.programs.weights(state.params, run.fixed_params)
        rollout = trainer.sampler(trees.join(weights, run.fixed_params), prompts, key, copies)
        del weights  # with LoRA, a copy
    try:
        with jax.profiler.TraceAnnotation("reward"):
            return rollout, trainer.reward_fn(rollout._replace(allowed=None))  # it may fetch the others
    except RewardError as error:
        raise RewardError(f"{run.name} step {step}: {error}") from error
