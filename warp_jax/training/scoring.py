"""Log-probabilities of given tokens, and the KL between two policies.

Logits [B, S, V] are the largest array of a language model. To save memory, only `chunk` positions of each row (0 = all)
have logits at a time: the head is applied to one piece of the sequence after another, also in the backward pass.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from warp_jax.generation import drawing
from warp_jax.models.attention import SharedPrompt
from warp_jax.types import ApplyFn, Array, Params, Rollout, States

Targets = Any  # of N positions: a pytree of arrays [B, N, ...]
# logits of each policy [B, c, V], targets of c positions -> [B, c]
Reduce = Callable[[Sequence[Array], Targets], Array]


def per_token_logps(
    apply_fn: ApplyFn, params: Params, rollout: Rollout, temperature: float, *, chunk: int = 0, copies: int = 1
) -> Array:
    """Log pi(y_t | x, y_<t) of each completion token: float32 [B, C], nats, 0 where masked.

    With rollout.allowed, pi is renormalised over the tokens that the sampler kept, which do not depend on `params`.
    copies: so many neighbouring rows have the same prompt, which is computed once for them.
    """

    def logps_of(logits: Sequence[Array], targets: Targets) -> Array:
        scaled, (token_ids, allowed) = logits[0] / temperature, targets
        if allowed is not None:
            scaled = drawing.restrict(scaled, allowed)
        target_logits = jnp.take_along_axis(scaled, token_ids[..., None], axis=-1)[..., 0]
        return target_logits - jax.nn.logsumexp(scaled, axis=-1)

    return _map_completion(apply_fn, [params], rollout, reduce=logps_of, chunk=chunk, copies=copies)


def sequence_kl(
    apply_fn: ApplyFn,
    params: Params,
    reference_params: Params,
    rollout: Rollout,
    temperature: float,
    *,
    chunk: int = 0,
    states: States | None = None,
    trunk_layers: int = 0,
) -> Array:
    """KL(policy || reference) of whole completions, estimated on samples of the policy: float32 [B], nats, >= 0.

    Exact KL between the two next-token distributions, summed over the positions of the sampled tokens. This estimate
    has the same expectation as the sampled log-ratio, and far less variance. The completions are drawn from all tokens,
    without top-k and top-p.

    states: of the policy's tokens, from sampling; then only the reference is computed, above the first `trunk_layers`
    layers, which policy and reference share.
    """

    def kl(logits: Sequence[Array], targets: Targets) -> Array:
        return _next_token_kl(logits[0] / temperature, logits[1] / temperature)

    policies = [params, reference_params]
    if states is None:
        return _map_completion(apply_fn, policies, rollout, reduce=kl, chunk=chunk).sum(axis=1)
    token_ids, mask = _fed(rollout)
    length = rollout.completion_ids.shape[1]
    if states.trunk is None:
        reference, _ = apply_fn(reference_params, token_ids, mask, None, num_outputs=length, method="hidden")
    else:
        reference = apply_fn(reference_params, states.trunk[:, :-1], mask, trunk_layers, length, method="above")
    hidden, targets = [states.final[:, -length - 1 : -1], reference], jnp.asarray(rollout.completion_ids)
    values = _map_hidden(apply_fn, policies, hidden, targets, reduce=kl, chunk=chunk)
    return jnp.where(rollout.completion_mask, values, 0.0).sum(axis=1)


def next_token_losses(apply_fn: ApplyFn, params: Params, token_ids: Array, mask: Array, *, chunk: int = 0) -> Array:
    """-log pi(token | tokens before) of all tokens except the first: token_ids, mask [B, S] -> [B, S - 1], nats."""

    def losses(logits: Sequence[Array], targets: Targets) -> Array:
        return optax.softmax_cross_entropy_with_integer_labels(logits[0], targets)

    return map_logits(apply_fn, [params], token_ids[:, :-1], mask[:, :-1], token_ids[:, 1:], reduce=losses, chunk=chunk)


def map_logits(
    apply_fn: ApplyFn,
    policies: Sequence[Params],
    token_ids: Array,
    mask: Array,
    targets: Targets,
    *,
    reduce: Reduce,
    chunk: int,
) -> Array:
    """Apply reduce(logits, targets) to the last N positions: [B, N].

    Args:
        apply_fn: the model of all policies.
        policies: parameters of whole models.
        token_ids: int32 [B, S].
        mask: bool [B, S], True = real token.
        targets: what `reduce` needs of the last N positions, such as their tokens.
        reduce: see `Reduce`; c = N, or the length of a piece.
        chunk: see the top of this file.
    """
    length = _length(targets)
    if not chunk or length <= chunk:
        logits = [apply_fn(params, token_ids, mask, None, num_outputs=length)[0] for params in policies]
        return reduce(logits, targets)
    hidden = [apply_fn(p, token_ids, mask, None, num_outputs=length, method="hidden")[0] for p in policies]
    return _map_hidden(apply_fn, policies, hidden, targets, reduce=reduce, chunk=chunk)


def _map_hidden(
    apply_fn: ApplyFn,
    policies: Sequence[Params],
    hidden: list[Array],
    targets: Targets,
    *,
    reduce: Reduce,
    chunk: int,
) -> Array:
    """`map_logits` from the inputs of the heads of all policies, each [B, N, D]."""
    length = _length(targets)
    pieces = -(-length // chunk) if chunk else 1

    def reduce_piece(piece: tuple[list[Array], Targets]) -> Array:
        states, piece_targets = piece
        logits = [apply_fn(p, h, method="head") for p, h in zip(policies, states, strict=True)]
        return reduce(logits, piece_targets)

    if pieces == 1:
        return reduce_piece((hidden, targets))
    results = jax.lax.map(jax.checkpoint(reduce_piece), jax.tree.map(lambda x: _cut(x, pieces), (hidden, targets)))
    return results.swapaxes(0, 1).reshape(len(hidden[0]), -1)[:, :length]


def _length(targets: Targets) -> int:
    """N, the number of positions."""
    length: int = jax.tree.leaves(targets)[0].shape[1]
    return length


def _next_token_kl(logits: Array, reference: Array) -> Array:
    """KL of two distributions: logits [..., V] -> [...], nats. It reads the logits once: on a CPU, 5 times as fast."""
    high, reference_high = (x.max(axis=-1, keepdims=True) for x in (logits, reference))
    gap = (logits - high) - (reference - reference_high)
    weights, reference_weights = jnp.exp(logits - high), jnp.exp(reference - reference_high)

    def add(sums: tuple[Array, ...], values: tuple[Array, ...]) -> tuple[Array, ...]:
        return tuple(x + y for x, y in zip(sums, values, strict=True))

    blocks = math.gcd(logits.shape[-1], drawing.BLOCKS)  # summed apart: one sum of so many terms loses digits
    terms = (x.reshape(*x.shape[:-1], blocks, -1) for x in (weights, weights * gap, reference_weights - weights))
    sums = jax.lax.reduce(tuple(terms), (jnp.float32(0),) * 3, add, (logits.ndim,))
    total, weighted, change = (x.sum(axis=-1) for x in sums)
    return jnp.maximum(weighted / total + jnp.log1p(change / total), 0.0)  # rounding gives -1e-7 too


def _map_completion(
    apply_fn: ApplyFn, policies: Sequence[Params], rollout: Rollout, *, reduce: Reduce, chunk: int, copies: int = 1
) -> Array:
    """Apply reduce(logits, targets) to the positions that predict the completion tokens: [B, C], 0 where masked."""
    targets = jnp.asarray(rollout.completion_ids), rollout.allowed
    if copies == 1 or rollout.completion_ids.shape[1] == 1:  # of one token, no token of the completion is read
        token_ids, mask = _fed(rollout)
        values = map_logits(apply_fn, policies, token_ids, mask, targets, reduce=reduce, chunk=chunk)
    else:
        hidden = [_hidden_of_copies(apply_fn, params, rollout, copies) for params in policies]
        values = _map_hidden(apply_fn, policies, hidden, targets, reduce=reduce, chunk=chunk)
    return jnp.where(rollout.completion_mask, values, 0.0)


def _hidden_of_copies(apply_fn: ApplyFn, params: Params, rollout: Rollout, copies: int) -> Array:
    """Inputs of the head that predict the completions [B, C, D], from rows with a prompt and its completions."""
    shared = SharedPrompt(rollout.prompt_ids.shape[1], copies)
    prompt_ids, prompt_mask = (jnp.asarray(x)[::copies] for x in (rollout.prompt_ids, rollout.prompt_mask))
    token_ids = shared.join(prompt_ids, rollout.completion_ids[:, :-1])
    mask = shared.join(prompt_mask, rollout.completion_mask[:, :-1])
    hidden, _ = apply_fn(params, token_ids, mask, None, shared=shared, method="hidden")
    first, rest = shared.split(hidden)
    return jnp.concatenate([shared.repeat(first[:, -1:]), rest], axis=1)


def _fed(rollout: Rollout) -> tuple[Array, Array]:
    """The tokens that a model reads to predict the completions, and their mask: [B, P + C - 1]."""
    token_ids = jnp.concatenate([rollout.prompt_ids, rollout.completion_ids], axis=1)[:, :-1]
    return token_ids, jnp.concatenate([rollout.prompt_mask, rollout.completion_mask], axis=1)[:, :-1]


def _cut(x: Array, pieces: int) -> Array:
    """Cut [B, N, ...] into [pieces, B, ceil(N / pieces), ...], padded with zeros at the end."""
    size = -(-x.shape[1] // pieces)
    spare = size * pieces - x.shape[1]
    padded = jnp.pad(x, [(0, spare if axis == 1 else 0) for axis in range(x.ndim)])
    return padded.reshape(x.shape[0], pieces, size, *x.shape[2:]).swapaxes(0, 1)
