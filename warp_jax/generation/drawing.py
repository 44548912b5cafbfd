"""Drawing the next token from logits: temperature, top-k, top-p, then inversion of the cumulative distribution.

Inversion needs two random numbers a token; the usual Gumbel noise needs one for each entry of the vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from warp_jax.types import Array

BLOCKS = 128  # pieces of the vocabulary; a multiple of the mesh axis `tensor`, so each chip has whole ones


class SamplingConfig(NamedTuple):
    """Settings of sampling."""

    max_new_tokens: int  # C, the stop token included
    temperature: float  # > 0, divides the logits
    stop_ids: tuple[int, ...]  # tokens that end a completion; they are part of it
    pad_id: int  # fills a completion after its stop token
    top_k: int = 0  # keep only the k likeliest tokens; 0 = all
    top_p: float = 1.0  # keep only the smallest set of likeliest tokens with this probability; 1 = all

    @property
    def truncates(self) -> bool:
        """True if tokens are left out."""
        return self.top_k > 0 or self.top_p < 1


def kept_logits(logits: Array, config: SamplingConfig) -> Array:
    """Logits after temperature, top-k and top-p, in this order; -inf for tokens that are left out: [B, V] -> [B, V]."""
    logits = logits.astype(jnp.float32) / config.temperature
    if config.top_k:
        kth = jax.lax.top_k(logits, min(config.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if config.top_p < 1:
        logits = jnp.where(_outside_nucleus(logits, config.top_p), -jnp.inf, logits)
    return logits


def pack(kept: Array) -> Array:
    """Bits of the tokens that `kept_logits` keeps: [B, V] -> uint8 [B, ceil(V / 8)], see `Rollout.allowed`."""
    return jnp.packbits(kept > -jnp.inf, axis=-1)


def restrict(logits: Array, allowed: Array) -> Array:
    """Logits with -inf for tokens that are left out: [..., V], allowed: uint8 [..., ceil(V / 8)] from `pack`."""
    bits = jnp.unpackbits(allowed, axis=-1, count=logits.shape[-1])
    return jnp.where(bits.astype(bool), logits, -jnp.inf)


def uniforms(keys: Array, positions: Array) -> Array:
    """The random numbers for positions int32 [B] of the sequences with these keys [B]: float32 [B, 2], in (0, 1).

    They are the middles of the 2^23 steps of float32: 0 would draw the first token, however unlikely it is.
    """

    def pair(key: Array, position: Array) -> Array:
        return jax.random.uniform(jax.random.fold_in(key, position), (2,)) + 2**-24

    return jax.vmap(pair)(keys, positions)


def draw(logits: Array, uniforms: Array) -> tuple[Array, Array]:
    """Draw a token of each row from softmax(logits): int32 [B], and its log-probability: float32 [B], nats.

    A block of the vocabulary is drawn first, then a token in it. A token with logit -inf is never drawn. The error of a
    probability is about 1e-7, from the rounding of the sums.

    Args:
        logits: float32 [B, V].
        uniforms: float32 [B, 2], random numbers in (0, 1).
    """
    batch, vocab = logits.shape
    size = -(-vocab // BLOCKS)
    padded = jnp.pad(logits, ((0, 0), (0, BLOCKS * size - vocab)), constant_values=-jnp.inf)
    highest = padded.max(axis=1, keepdims=True)
    weights = jnp.exp(padded - highest).reshape(batch, BLOCKS, size)
    sums = weights.sum(axis=2)
    block = _invert(sums, uniforms[:, 0])
    in_block = _invert(jnp.take_along_axis(weights, block[:, None, None], axis=1)[:, 0], uniforms[:, 1])
    token = block * size + in_block
    drawn = jnp.take_along_axis(logits, token[:, None], axis=1) - highest
    return token.astype(jnp.int32), drawn[:, 0] - jnp.log(sums.sum(axis=1))


def _invert(weights: Array, uniform: Array) -> Array:
    """First index of each row whose cumulative weight exceeds this share of the total; its weight is above 0.

    weights: [B, N], >= 0; uniform: [B], in (0, 1).
    """
    cumulative = jnp.where(weights > 0, jnp.cumsum(weights, axis=1), 0.0)  # rounding may lift a weight of 0
    return jnp.argmax(cumulative > uniform[:, None] * cumulative.max(axis=1, keepdims=True), axis=1)


def _outside_nucleus(logits: Array, top_p: float) -> Array:
    """Mask of the tokens outside the smallest set of likeliest tokens whose probability reaches top_p: bool [B, V]."""
    order = jnp.argsort(-logits, axis=-1)
    probs = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    ranks = jnp.argsort(order, axis=-1)
    return jnp.take_along_axis(before >= top_p, ranks, axis=-1)
