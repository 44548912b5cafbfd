"""The transformer as functions of a bare parameter tree."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from warp_jax.models import partitioning
from warp_jax.models.transformer import Transformer, TransformerConfig
from warp_jax.types import ApplyFn, Array, Params


def make_apply_fn(config: TransformerConfig, mesh: Mesh | None = None) -> ApplyFn:
    """Make a function (params, token_ids, mask, ...) -> (outputs, cache), as in `Transformer`; mesh: shard over it."""
    model = Transformer(config, mesh)
    return lambda params, *args, **kwargs: model.apply({"params": params}, *args, **kwargs)


def init_params(config: TransformerConfig, key: Array) -> Params:
    """Random initial parameters, float32."""
    return Transformer(config).init(key, jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool))["params"]


def random_params(config: TransformerConfig, mesh: Mesh, seed: int) -> Params:
    """`init_params` of a seed, laid out on a mesh."""
    layout = partitioning.param_shardings(mesh, param_shapes(config))
    return jax.jit(functools.partial(init_params, config), out_shardings=layout)(jax.random.key(seed))


@functools.cache
def param_shapes(config: TransformerConfig) -> Params:
    """Tree of jax.ShapeDtypeStruct: shape and dtype of every parameter, without computing any."""
    return jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
