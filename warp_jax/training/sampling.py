"""Sampling completions: a prefill of the prompts, then one token a step. The policy is the temperature-scaled softmax.

`apply_fn(params, token_ids, mask, cache, num_outputs=n)` is `Transformer.apply` on the bare parameter tree;
`make_cache(batch, capacity)` gives its empty cache.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from warp_jax import trees
from warp_jax.models import partitioning
from warp_jax.parallel import meshes
from warp_jax.types import ApplyFn, Array, Params, PromptBatch, Rollout


class SamplingConfig(NamedTuple):
    """max_new_tokens: C, at most this many tokens, the stop token included. temperature > 0 divides the logits.
    top_k: keep the k likeliest tokens, 0 = all. top_p: keep the smallest set with this probability, 1 = all.
    stop_ids: tokens that end a completion (kept, and counted). pad_id: what fills the rest.
    """

    max_new_tokens: int
    temperature: float
    stop_ids: tuple[int, ...]
    pad_id: int
    top_k: int = 0
    top_p: float = 1.0


class Sampler(NamedTuple):
    """The compiled parts of sampling; called with (params, prompts, key) it runs both.

    lay_out: params -> the copy that generation reads: in the dtype of the activations and whole but for `tensor`, so
    that no weight moves between chips for a token. The same arrays where that is how they are.
    generate: that copy, prompts, key -> Rollout.
    """

    lay_out: Callable[[Params], Params]
    generate: Callable[[Params, PromptBatch, Array], Rollout]

    def __call__(self, params: Params, prompts: PromptBatch, key: Array) -> Rollout:
        return self.generate(self.lay_out(params), prompts, key)


def make_sampler(
    mesh: Mesh,
    params: Params,
    *,
    apply_fn: ApplyFn,
    make_cache: Callable[[int, int], Any],
    dtype: str,
    config: SamplingConfig,
) -> Sampler:
    """Jit the parts for whole models shaped like `params`, whose activations are of `dtype`."""

    def cast(path: tuple[Any, ...], leaf: Array) -> Array:
        """Norms compute in float32 and stay."""
        return leaf if trees.path_name(path).endswith("scale") else leaf.astype(dtype)

    def lay_out(params: Params) -> Params:
        return jax.tree_util.tree_map_with_path(cast, params)

    shapes = jax.eval_shape(lay_out, params)
    layout = partitioning.decode_shardings(mesh, shapes)
    same_dtypes = all(jax.tree.leaves(jax.tree.map(lambda x, y: x.dtype == y.dtype, shapes, params)))
    as_it_is = same_dtypes and mesh.shape["fsdp"] == 1
    generate = functools.partial(sample, apply_fn, make_cache, config=config)
    return Sampler(
        lay_out=(lambda params: params) if as_it_is else jax.jit(lay_out, out_shardings=layout),
        generate=jax.jit(generate, out_shardings=meshes.batch_sharding(mesh)),
    )


class _Loop(NamedTuple):
    step: Array  # tokens drawn so far
    cache: Any
    done: Array
    completion_ids: Array
    completion_mask: Array
    logps: Array


def sample(
    apply_fn: ApplyFn,
    make_cache: Callable[[int, int], Any],
    params: Params,
    prompts: PromptBatch,
    key: Array,
    *,
    config: SamplingConfig,
) -> Rollout:
    """Sample one completion for each prompt: a prefill, then one token a step until all rows have stopped.

    The same key gives the same completions on any mesh. `per_token_logps` are of the distribution sampled from,
    after temperature and truncation.
    """
    chex.assert_rank([prompts.prompt_ids, prompts.prompt_mask], 2)
    batch, prompt_length = prompts.prompt_ids.shape
    length = config.max_new_tokens
    cache = make_cache(batch, prompt_length + length)
    logits, cache = apply_fn(params, prompts.prompt_ids, prompts.prompt_mask, cache, num_outputs=1)
    empty = _Loop(
        step=jnp.zeros((), jnp.int32),
        cache=cache,
        done=jnp.zeros(batch, bool),
        completion_ids=jnp.full((batch, length), config.pad_id, jnp.int32),
        completion_mask=jnp.zeros((batch, length), bool),
        logps=jnp.zeros((batch, length), jnp.float32),
    )

    def body(loop: _Loop) -> _Loop:
        last = jax.lax.dynamic_slice_in_dim(loop.completion_ids, loop.step - 1, 1, axis=1)
        logits, cache = apply_fn(params, last, ~loop.done[:, None], loop.cache, num_outputs=1)
        return _draw(loop._replace(cache=cache), logits[:, 0], key, config)

    first = _draw(empty, logits[:, 0], key, config)
    final = jax.lax.while_loop(lambda loop: (loop.step < length) & ~loop.done.all(), body, first)
    return Rollout(*prompts, final.completion_ids, final.completion_mask, final.logps)


def _draw(loop: _Loop, logits: Array, key: Array, config: SamplingConfig) -> _Loop:
    """Draw the next token of every row that has not stopped, and record it."""
    alive = ~loop.done
    logps = sampled_logps(logits, config)
    token = jax.random.categorical(jax.random.fold_in(key, loop.step), logps).astype(jnp.int32)
    token_logp = jnp.take_along_axis(logps, token[:, None], axis=1)[:, 0]
    token = jnp.where(alive, token, config.pad_id)
    return loop._replace(
        step=loop.step + 1,
        done=loop.done | _is_stop(token, config.stop_ids),
        completion_ids=loop.completion_ids.at[:, loop.step].set(token),
        completion_mask=loop.completion_mask.at[:, loop.step].set(alive),
        logps=loop.logps.at[:, loop.step].set(jnp.where(alive, token_logp, 0.0)),
    )


def sampled_logps(logits: Array, config: SamplingConfig) -> Array:
    """Log-probabilities [B, V] that are sampled from: temperature, then top-k, then top-p, then renormalised."""
    logits = logits.astype(jnp.float32) / config.temperature
    if config.top_k:
        kth = jax.lax.top_k(logits, min(config.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if config.top_p < 1:
        logits = jnp.where(_outside_nucleus(logits, config.top_p), -jnp.inf, logits)
    return jax.nn.log_softmax(logits, axis=-1)


def _outside_nucleus(logits: Array, top_p: float) -> Array:
    """True for tokens outside the smallest set of likeliest tokens whose probability reaches top_p."""
    order = jnp.argsort(-logits, axis=-1)
    probs = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    ranks = jnp.argsort(order, axis=-1)
    return jnp.take_along_axis(before >= top_p, ranks, axis=-1)


def _is_stop(token: Array, stop_ids: Sequence[int]) -> Array:
    return jnp.isin(token, jnp.array(stop_ids, jnp.int32)) if stop_ids else jnp.zeros_like(token, bool)
