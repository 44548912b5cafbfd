"""Sampling completions: all prompt tokens are processed at once (prefill), then one token is drawn per step.

A prompt is processed once for all of its samples. See `slots` for how sequences share the rows of the cache.

`apply_fn(params, token_ids, mask, cache, num_outputs=n)` returns the logits of the last n positions and the new cache;
`make_cache(batch, capacity)` returns an empty cache, such as `transformer.Cache`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from warp_jax import trees
from warp_jax.generation import slots
from warp_jax.generation.drawing import SamplingConfig
from warp_jax.models import partitioning
from warp_jax.parallel import meshes
from warp_jax.types import ApplyFn, Array, Params, PromptBatch, Rollout, States


class Sampler(NamedTuple):
    """Compiled sampling in two parts; a call with (params, prompts, key, copies) runs both.

    lay_out: params -> a copy for generation, see `laid_out`. Leaves that already have this form are not copied.
    generate: (that copy, prompts [B, P], key, copies) -> Rollout; see `sample`.
    generate_with_states: (that copy, prompts [K, B, P], key, first) -> Rollout and `States`, both [K, B, ...], of K
    batches that share B slots; first = number of the first completion among those of the key. States of masked tokens
    mean nothing.
    """

    lay_out: Callable[[Params], Params]
    generate: Callable[..., Rollout]
    generate_with_states: Callable[..., tuple[Rollout, States]]

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
    trunk_layers: int = 0,
    sampling_mesh: Mesh | None = None,
) -> Sampler:
    """Compile both parts for whole models with the shapes and shardings of `params`, whose activations have `dtype`.

    sampling_mesh: mesh of the copied weights, a `meshes.regroup` of `mesh`, over which rollouts are split; None = mesh.
    trunk_layers: number of layers of the trunk, see `States`.
    """
    sampling_mesh = sampling_mesh or mesh
    copiers = jax.tree.map(make_copier, params, laid_out(sampling_mesh, params, dtype))

    def lay_out(params: Params) -> Params:
        """Copy when all work on `params` is done: then the previous copy is no longer in memory."""
        if any(isinstance(copier, jax.stages.Wrapped) for copier in jax.tree.leaves(copiers)):
            jax.block_until_ready(params)
        return jax.tree.map(lambda copier, leaf: copier(leaf), copiers, params)

    def compiled(run: Callable[..., Any], axis: int = 0) -> Callable[..., Any]:
        """Keep rows, which lie along `axis`, on their chips until the end: else XLA moves them in each layer."""
        inside, outside = (meshes.batch_sharding(each, axis) for each in (sampling_mesh, mesh))

        @functools.partial(jax.jit, out_shardings=outside, static_argnames="copies")
        def generate(params: Params, prompts: PromptBatch, key: Array, **options: Any) -> Any:
            prompts = jax.lax.with_sharding_constraint(prompts, inside)
            return jax.lax.with_sharding_constraint(run(params, prompts, key, **options), inside)

        return generate

    given: dict[str, Any] = {"config": config, "may_halve": meshes.batch_devices(mesh) == 1}
    rollout = functools.partial(sample, apply_fn, make_cache, **given)
    with_states = functools.partial(sample_with_states, apply_fn, make_cache, trunk_layers=trunk_layers, **given)
    return Sampler(
        lay_out, compiled(rollout), compiled(functools.partial(_in_slots, with_states, sampling_mesh), axis=1)
    )


def _in_slots(
    draw: Callable[..., Any], mesh: Mesh, params: Params, prompts: PromptBatch, key: Array, *, first: Array | int = 0
) -> Any:
    """Sample for K batches of prompts [K, B, P] in B slots; each batch device has a queue, its rows of every batch."""

    def run(params: Params, prompts: PromptBatch, key: Array, numbers: Array) -> Any:
        queue, numbers = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (prompts, numbers))
        sampled = draw(params, queue, key, numbers=numbers, num_slots=prompts.prompt_ids.shape[1])
        return jax.tree.map(lambda x: x.reshape(*prompts.example_ids.shape, *x.shape[1:]), sampled)

    shape = prompts.example_ids.shape
    if meshes.batch_devices(mesh) > 1:
        whole, rows = PartitionSpec(), meshes.batch_sharding(mesh, axis=1).spec
        run = meshes.map_shards(run, mesh, (whole, rows, whole, rows), rows, meshes.BATCH)
    return run(params, prompts, key, first + jnp.arange(math.prod(shape)).reshape(shape))


def laid_out(mesh: Mesh, params: Params, dtype: str) -> Params:
    """Shape, dtype and sharding of each weight of a copy for generation: jax.ShapeDtypeStruct.

    It has the dtype of the activations, except the scales of norms, which compute in float32. It is split over the mesh
    axis `tensor` only, so no weight moves between chips for each token.
    """

    def like(path: tuple[Any, ...], leaf: Array, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        is_scale = trees.path_name(path).endswith("scale")
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype if is_scale else jnp.dtype(dtype), sharding=sharding)

    return jax.tree_util.tree_map_with_path(like, params, partitioning.decode_shardings(mesh, params))


def make_copier(leaf: Array, like: jax.ShapeDtypeStruct) -> Callable[[Array], Array]:
    """Compile the copy of one leaf, because XLA makes a temporary of all that a program copies; or return the leaf."""
    if leaf.dtype == like.dtype and leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim):
        return lambda leaf: leaf
    return jax.jit(lambda leaf: leaf.astype(like.dtype), out_shardings=like.sharding)


def sample(
    apply_fn: ApplyFn,
    make_cache: Callable[[int, int], Any],
    params: Params,
    prompts: PromptBatch,
    key: Array,
    *,
    config: SamplingConfig,
    **options: Any,
) -> Rollout:
    """Sample `copies` completions of each prompt, until all have stopped or have max_new_tokens tokens.

    The same key gives the same completions, up to rounding, on any mesh and in any number of slots; a larger
    max_new_tokens only adds tokens. `per_token_logps` belong to the distribution after temperature, top-k and top-p.

    options: copies = completions of each prompt, in neighbouring rows; numbers = int32 [copies * B], of the completions
    among those of this key, None = from 0; num_slots = rows that decode together, 0 = all; may_halve: see
    `slots.make_plan`.
    """

    def step(token_ids: Array, mask: Array, cache: Any) -> tuple[Array, Any, tuple[()]]:
        logits, cache = apply_fn(params, token_ids, mask, cache, num_outputs=1)
        return logits[:, 0], cache, ()

    return _decode(slots.Model(step, make_cache), prompts, key, config, **options)[0]


def sample_with_states(
    apply_fn: ApplyFn,
    make_cache: Callable[[int, int], Any],
    params: Params,
    prompts: PromptBatch,
    key: Array,
    *,
    config: SamplingConfig,
    trunk_layers: int,
    **options: Any,
) -> tuple[Rollout, States]:
    """Sample as `sample`, and return the `States` of all tokens too: [B, P + C, D]."""

    def step(token_ids: Array, mask: Array, cache: Any) -> tuple[Array, Any, States]:
        states, cache = apply_fn(params, token_ids, mask, cache, trunk_layers=trunk_layers, method="states")
        return apply_fn(params, states.final[:, -1:], method="head")[:, 0], cache, states

    return _decode(slots.Model(step, make_cache), prompts, key, config, **options)


def _decode(
    model: slots.Model,
    prompts: PromptBatch,
    key: Array,
    config: SamplingConfig,
    *,
    copies: int = 1,
    numbers: Array | None = None,
    num_slots: int = 0,
    may_halve: bool = False,
) -> tuple[Rollout, Any]:
    """Completions, and what the model's step keeps of each token. Options as in `sample`."""
    chex.assert_rank([prompts.prompt_ids, prompts.prompt_mask], 2)
    count = copies * len(prompts.prompt_ids)
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(count) if numbers is None else numbers)
    plan = slots.make_plan(count, copies, num_slots, config.max_new_tokens, may_halve=may_halve)
    columns, lengths = slots.decode(model, prompts, keys, config, plan)
    before = prompts.prompt_ids.shape[1]
    mask = jnp.arange(config.max_new_tokens)[None] < lengths[:, None]
    ids, logps, allowed = jax.tree.map(lambda x: x[:, before:], columns[:3])
    if copies > 1:
        prompts = jax.tree.map(lambda x: jnp.repeat(x, copies, axis=0), prompts)
    if allowed is not None:
        allowed = jnp.where(mask[..., None], allowed, 0)
    ids, logps = jnp.where(mask, ids, config.pad_id), jnp.where(mask, logps, 0.0)
    return Rollout(*prompts, ids, mask, logps, allowed), columns.kept
