"""Supervised training: fine-tuning a policy on text (SFT), and a reward model on human labels."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from warp_jax import trees
from warp_jax.data import batches
from warp_jax.parallel import meshes
from warp_jax.rewards import reward_functions
from warp_jax.training import loop, microbatches, scoring
from warp_jax.types import ApplyFn, Array, Params

Batch = Mapping[str, Any]
State = tuple[Params, Any]  # trained params, the optimizer's state
LossFn = Callable[[Params, Batch], tuple[Array, Mapping[str, Array]]]  # params of the whole model -> loss, metrics
ROW = "row"  # in a batch: the number of each row in its data, int32 [B]
COUNTED = "counted"  # in a batch: True for the tokens whose loss counts, bool [B, S]; missing: all after the first
ROW_VALUES = "row_values"  # among metrics: loss or score of each row, float32 [B]; it is not logged


def language_loss(
    apply_fn: ApplyFn, params: Params, batch: Batch, *, logits_chunk: int = 0
) -> tuple[Array, Mapping[str, Array]]:
    """Mean negative log-likelihood of the `counted_tokens`, in nats per token. batch: token_ids, mask [B, S]."""
    losses = scoring.next_token_losses(apply_fn, params, batch["token_ids"], batch["mask"], chunk=logits_chunk)
    counted = counted_tokens(batch)
    losses = jnp.where(counted, losses, 0)
    loss = losses.sum() / jnp.maximum(counted.sum(dtype=jnp.float32), 1)
    return loss, {"loss": loss, ROW_VALUES: losses.sum(axis=1)}


def counted_tokens(batch: Batch) -> Array:
    """True for each token after the first whose loss counts: mask [..., S] -> bool [..., S - 1]."""
    mask = batch["mask"]
    return mask[..., :-1] & batch.get(COUNTED, mask)[..., 1:]


def num_counted(batch: Batch) -> Array:
    """Number of `counted_tokens`."""
    return counted_tokens(batch).sum(dtype=jnp.float32)


def token_weights(parts: Batch) -> Array:
    """Weight of the mean loss of each part in that of the whole batch, 1 on average: mask [parts, B, S] -> [parts]."""
    counts = counted_tokens(parts).sum(axis=(1, 2), dtype=jnp.float32)
    return counts / counts.mean()


def label_loss(apply_fn: ApplyFn, params: Params, batch: Batch) -> tuple[Array, Mapping[str, Array]]:
    """Cross-entropy of 0/1 labels, with the score as log-odds. batch: token_ids, mask [B, S], labels [B]."""
    scores = reward_functions.sequence_scores(apply_fn, params, batch["token_ids"], batch["mask"])
    labels = batch["labels"].astype(jnp.float32)
    loss = optax.sigmoid_binary_cross_entropy(scores, labels).mean()
    accuracy = jnp.mean((scores > 0) == (labels > 0))
    return loss, {"loss": loss, "accuracy": accuracy, ROW_VALUES: scores}


def bradley_terry_loss(apply_fn: ApplyFn, params: Params, batch: Batch) -> tuple[Array, Mapping[str, Array]]:
    """Mean of -log sigmoid(score of the preferred sequence - score of the other) over B / 2 pairs.

    batch: token_ids, mask [B, S]; row i of the first half is preferred to row i of the second half.
    """
    scores = reward_functions.sequence_scores(apply_fn, params, batch["token_ids"], batch["mask"])
    preferred, other = jnp.split(scores, 2)
    loss = -jax.nn.log_sigmoid(preferred - other).mean()
    return loss, {"loss": loss, "accuracy": jnp.mean(preferred > other), ROW_VALUES: scores}


REWARD_LOSSES = {"label": label_loss, "bradley_terry": bradley_terry_loss}


def paired_rows(labels: np.ndarray, batch_size: int, step: int, *, seed: int, stream: str) -> np.ndarray:
    """Row numbers of one batch for the reward model: batch_size / 2 rows with label 1, then as many with label 0."""
    halves = []
    for label in (1, 0):
        rows = np.flatnonzero(labels == label)
        halves.append(rows[batches.epoch_rows(len(rows), batch_size // 2, step, seed=seed, stream=f"{stream} {label}")])
    return np.concatenate(halves)


class Trace(NamedTuple):
    """Quantities that a step computes, in this order."""

    row_values: Array  # loss or score of each row, [B]
    loss: Array
    gradient: Params
    new_params: Params


def make_programs(
    mesh: Mesh, loss_fn: LossFn, params: Params, optimizer: optax.GradientTransformation, num_microbatches: int = 1
) -> loop.Programs[State]:
    """Compile init and update for trained params shaped like `params`.

    num_microbatches: parts of the batch whose gradients are accumulated, weighed by their tokens; above 1, loss_fn must
    be a mean over `counted_tokens`.
    """
    cut = microbatches.Cut(num_microbatches, group_size=1)

    def init(params: Params) -> State:
        copy = jax.tree.map(lambda x: jnp.array(x, copy=True), params)
        return copy, optimizer.init(copy)

    def update(state: State, frozen: Params, batch: Batch) -> tuple[State, Mapping[str, Array], Trace]:
        params, opt_state = state
        parts = cut.split(batch)
        weights = token_weights(parts) if num_microbatches > 1 else jnp.ones(1)

        def gradient(chunk: tuple[Batch, Array]) -> tuple[Params, Mapping[str, Array]]:
            part, weight = chunk

            def weighed(params: Params) -> tuple[Array, Mapping[str, Array]]:
                loss, metrics = loss_fn(trees.join(params, frozen), part)
                return weight * loss, metrics

            return jax.grad(weighed, has_aux=True)(params)

        grads, stacked = microbatches.mean_gradient(gradient, (parts, weights), params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        values = cut.join(stacked.pop(ROW_VALUES, stacked["loss"]))
        metrics = {name: (weights * value).mean() for name, value in stacked.items()}
        metrics |= {"grad_norm": optax.global_norm(grads), "param_norm": optax.global_norm(params)}
        metrics[loop.BAD_ROWS] = jnp.where(jnp.isfinite(values), -1, batch.get(ROW, -1))
        return (params, opt_state), metrics, Trace(values, metrics["loss"], grads, params)

    return loop.make_programs(mesh, params, init, update)


class Task(NamedTuple):
    """One supervised training. params, frozen_params: the trained and the other leaves of the model at its start."""

    loss_fn: LossFn
    params: Params
    frozen_params: Params
    batch_fn: Callable[[int], Batch]  # of a step
    held_out_batch: Callable[[int], Batch]  # number 0, 1, ...
    held_out_batches: Callable[[], int] = lambda: 1  # number of batches that hold the held-out rows once
    num_microbatches: int = 1  # see `make_programs`
    weight: Callable[[Batch], Array] = lambda batch: jnp.ones(())  # of a batch in the held-out means


def fit(task: Task, optimizer: optax.GradientTransformation, mesh: Mesh, schedule: loop.Schedule) -> Params:
    """Minimise the loss over `task.params`, or resume from a saved state; return the trained leaves."""
    programs = make_programs(mesh, task.loss_fn, task.params, optimizer, task.num_microbatches)
    step_fn = functools.partial(train_step, programs, task, mesh)
    return loop.run_steps(step_fn, lambda: programs.init(task.params), schedule)[0]


def train_step(
    programs: loop.Programs[State], task: Task, mesh: Mesh, state: State, step: int
) -> tuple[State, Mapping[str, Array]]:
    """One step on the batch of that step."""
    return programs.update(state, task.frozen_params, meshes.put_batch(mesh, task.batch_fn(step)))


def held_out(task: Task, params: Params, num_batches: int, mesh: Mesh) -> dict[str, float]:
    """Mean of the loss and other metrics over the first held-out batches, weighed by `task.weight`.

    params: those of the whole model. Raises FloatingPointError if one is not finite.
    """

    @jax.jit
    def metrics_fn(params: Params, batch: Batch) -> tuple[dict[str, Array], Array]:
        metrics = task.loss_fn(params, batch)[1]
        return {name: value for name, value in metrics.items() if name != ROW_VALUES}, task.weight(batch)

    held_out_batches = (meshes.put_batch(mesh, task.held_out_batch(number)) for number in range(num_batches))
    rows, weights = zip(*(jax.device_get(metrics_fn(params, batch)) for batch in held_out_batches), strict=True)
    means = {name: float(np.average([row[name] for row in rows], weights=weights)) for name in rows[0]}
    if bad := [f"{name} is {value}" for name, value in means.items() if not np.isfinite(value)]:
        raise FloatingPointError(f"held out: {', '.join(bad)}, want finite; lower learning_rate")
    return means
