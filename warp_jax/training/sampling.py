"""Sampling completions: all prompt tokens are processed at once (prefill), then one token is drawn per step.

A prompt is processed once for all of its samples.

`apply_fn(params, token_ids, mask, cache, num_outputs=n)` returns the logits of the last n positions and the new cache;
`make_cache(batch, capacity)` returns an empty cache, whose `repeat(copies)` repeats each row.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from warp_jax import trees
from warp_jax.models import partitioning
from warp_jax.parallel import meshes
from warp_jax.training import drawing
from warp_jax.training.drawing import SamplingConfig
from warp_jax.types import ApplyFn, Array, Params, PromptBatch, Rollout


class Sampler(NamedTuple):
    """Compiled sampling in two parts; a call with (params, prompts, key) runs both.

    lay_out: params -> a copy for generation, in the dtype of the activations and split over the mesh axis `tensor`
    only, so no weight moves between chips for each token. Returns its argument if that already has this form.
    generate: (that copy, prompts, key, copies=1) -> Rollout of `copies` completions a prompt, in consecutive rows.
    """

    lay_out: Callable[[Params], Params]
    generate: Callable[..., Rollout]

    def __call__(self, params: Params, prompts: PromptBatch, key: Array, copies: int = 1) -> Rollout:
        return self.generate(self.lay_out(params), prompts, key, copies=copies)


def make_sampler(
    mesh: Mesh,
    params: Params,
    *,
    apply_fn: ApplyFn,
    make_cache: Callable[[int, int], Any],
    dtype: str,
    config: SamplingConfig,
) -> Sampler:
    """Compile both parts for whole models shaped like `params`, whose activations have `dtype`."""

    def cast(path: tuple[Any, ...], leaf: Array) -> Array:
        """Cast all weights except the scales of norms, which compute in float32."""
        return leaf if trees.path_name(path).endswith("scale") else leaf.astype(dtype)

    def lay_out(params: Params) -> Params:
        return jax.tree_util.tree_map_with_path(cast, params)

    shapes = jax.eval_shape(lay_out, params)
    layout = partitioning.decode_shardings(mesh, shapes)
    same_dtypes = all(jax.tree.leaves(jax.tree.map(lambda x, y: x.dtype == y.dtype, shapes, params)))
    is_laid_out = same_dtypes and mesh.shape["fsdp"] == 1
    generate = functools.partial(sample, apply_fn, make_cache, config=config)
    return Sampler(
        lay_out=(lambda params: params) if is_laid_out else jax.jit(lay_out, out_shardings=layout),
        generate=jax.jit(generate, out_shardings=meshes.batch_sharding(mesh), static_argnames="copies"),
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
    copies: int = 1,
) -> Rollout:
    """Sample `copies` completions of each prompt, until all have stopped or have max_new_tokens tokens.

    The same key gives the same completions on any mesh. `per_token_logps` belong to the distribution after temperature,
    top-k and top-p.
    """
    chex.assert_rank([prompts.prompt_ids, prompts.prompt_mask], 2)
    length = config.max_new_tokens
    cache = make_cache(len(prompts.prompt_ids), prompts.prompt_ids.shape[1] + length)
    logits, cache = apply_fn(params, prompts.prompt_ids, prompts.prompt_mask, cache, num_outputs=1)
    if copies > 1:
        cache = cache.repeat(copies)
        logits, prompts = jax.tree.map(lambda x: jnp.repeat(x, copies, axis=0), (logits, prompts))
    batch = len(logits)
    uniforms = jax.random.uniform(key, (batch, length, 2))
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
        return _extend(loop._replace(cache=cache), logits[:, 0], uniforms, config)

    first = _extend(empty, logits[:, 0], uniforms, config)
    final = jax.lax.while_loop(lambda loop: (loop.step < length) & ~loop.done.all(), body, first)
    return Rollout(*prompts, final.completion_ids, final.completion_mask, final.logps)


def _extend(loop: _Loop, logits: Array, uniforms: Array, config: SamplingConfig) -> _Loop:
    """Draw and record the next token of every row that has not stopped: logits [B, V], uniforms [B, C, 2]."""
    alive = ~loop.done
    token, logp = drawing.draw(drawing.kept_logits(logits, config), uniforms[:, loop.step])
    token = jnp.where(alive, token, config.pad_id)
    return loop._replace(
        step=loop.step + 1,
        done=loop.done | jnp.isin(token, jnp.array(config.stop_ids, jnp.int32)),
        completion_ids=loop.completion_ids.at[:, loop.step].set(token),
        completion_mask=loop.completion_mask.at[:, loop.step].set(alive),
        logps=loop.logps.at[:, loop.step].set(jnp.where(alive, logp, 0.0)),
    )
