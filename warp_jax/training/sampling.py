"""Sampling completions: all prompt tokens are processed at once (prefill), then one token is drawn per step.

A prompt is processed once for all of its samples. `slots` tells how the sequences share the rows of the cache.

`apply_fn(params, token_ids, mask, cache, num_outputs=n)` returns the logits of the last n positions and the new cache;
`make_cache(batch, capacity)` returns an empty cache, such as `transformer.Cache`.
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
from warp_jax.training import slots
from warp_jax.training.drawing import SamplingConfig
from warp_jax.types import ApplyFn, Array, Params, PromptBatch, Rollout, States


class Sampler(NamedTuple):
    """Compiled sampling in two parts; a call with (params, prompts, key, copies) runs both.

    lay_out: params -> a copy for generation, in the dtype of the activations and split over the mesh axis `tensor`
    only, so no weight moves between chips for each token. Returns its argument if that already has this form.
    generate: (that copy, prompts, key, other arguments of `sample` by name) -> Rollout.
    generate_with_states: the same, and the `States` of all tokens [B, P + C, D]; those of masked tokens mean nothing.
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
) -> Sampler:
    """Compile both parts for whole models shaped like `params`, whose activations have `dtype`.

    trunk_layers: number of layers of the trunk, see `States`.
    """

    def cast(path: tuple[Any, ...], leaf: Array) -> Array:
        """Cast all weights except the scales of norms, which compute in float32."""
        return leaf if trees.path_name(path).endswith("scale") else leaf.astype(dtype)

    def lay_out(params: Params) -> Params:
        return jax.tree_util.tree_map_with_path(cast, params)

    shapes = jax.eval_shape(lay_out, params)
    layout = partitioning.decode_shardings(mesh, shapes)
    same_dtypes = all(jax.tree.leaves(jax.tree.map(lambda x, y: x.dtype == y.dtype, shapes, params)))
    is_laid_out = same_dtypes and mesh.shape["fsdp"] == 1
    options: Any = {"config": config, "may_halve": meshes.batch_devices(mesh) == 1}
    compiled = functools.partial(
        jax.jit, out_shardings=meshes.batch_sharding(mesh), static_argnames=("copies", "num_slots")
    )
    return Sampler(
        lay_out=(lambda params: params) if is_laid_out else jax.jit(lay_out, out_shardings=layout),
        generate=compiled(functools.partial(sample, apply_fn, make_cache, **options)),
        generate_with_states=compiled(
            functools.partial(sample_with_states, apply_fn, make_cache, trunk_layers=trunk_layers, **options)
        ),
    )


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

    The same key gives the same completions on any mesh, in any number of slots, and for any max_new_tokens up to the
    length. `per_token_logps` belong to the distribution after temperature, top-k and top-p. options: see `_decode`.
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
    """As `sample`; return the model's `States` of all tokens too."""

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
    first: Array | int = 0,
    num_slots: int = 0,
    may_halve: bool = False,
) -> tuple[Rollout, Any]:
    """Completions, and what the model's step keeps of each token.

    copies: completions of each prompt, in neighbouring rows. first: number of the first completion among those of this
    key. num_slots: rows that decode together; 0 = all. may_halve: see `slots.make_plan`.
    """
    chex.assert_rank([prompts.prompt_ids, prompts.prompt_mask], 2)
    count = copies * len(prompts.prompt_ids)
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(first + jnp.arange(count))
    plan = slots.make_plan(count, copies, num_slots, config.max_new_tokens, may_halve=may_halve)
    columns, lengths = slots.decode(model, prompts, keys, config, plan)
    before = prompts.prompt_ids.shape[1]
    mask = jnp.arange(config.max_new_tokens)[None] < lengths[:, None]
    ids, logps = (x[:, before:] for x in columns[:2])
    if copies > 1:
        prompts = jax.tree.map(lambda x: jnp.repeat(x, copies, axis=0), prompts)
    rollout = Rollout(*prompts, jnp.where(mask, ids, config.pad_id), mask, jnp.where(mask, logps, 0.0))
    return rollout, columns.kept
