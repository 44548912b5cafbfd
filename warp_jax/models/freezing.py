"""Train part of a model: a regular expression selects weights by name. The others are frozen.

Frozen weights have no Adam moments, anchor or task vector. Names are those of single layers, such as
'layers/20/attention/q/kernel' or 'embed/embedding'. A leaf stacks several layers and is trained or frozen as a whole,
so a stack is cut wherever the pattern matches different weights in two neighbouring layers.
"""

import itertools
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from warp_jax import naming, trees
from warp_jax.types import Params


def layer_groups(pattern: str, shapes: Any) -> tuple[int, ...]:
    """Number of layers of each stack that `pattern` needs; () if one stack is enough.

    pattern: regular expression, searched for in each name. shapes: parameters (arrays or shapes) with all layers in one
    stack. Raises ValueError if the pattern matches no weight.
    """
    expression = re.compile(pattern)
    leaf_names = [_names_of(name, leaf) for name, leaf in flatten_dict(shapes, sep="/").items()]
    if not any(expression.search(name) for names in leaf_names for name in names):
        examples = ", ".join(sorted(names[-1] for names in leaf_names)[:3])
        raise ValueError(f"trainable: no weight matches {pattern!r}; names look like {examples}")
    layered = [names for names in leaf_names if naming.in_layer(names[0])]
    trained_per_layer = zip(*([bool(expression.search(name)) for name in names] for names in layered), strict=True)
    sizes = tuple(len(list(group)) for _, group in itertools.groupby(trained_per_layer))
    return sizes if len(sizes) > 1 else ()


def split(params: Params, pattern: str) -> tuple[Params, Params]:
    """Split parameters into (trained, frozen); `trees.join` is the inverse. Stacks must be cut as in `layer_groups`."""
    leaves = flatten_dict(params, sep="/")
    trained = {name: leaf for name, leaf in leaves.items() if re.search(pattern, _names_of(name, leaf)[0])}
    frozen = {name: leaf for name, leaf in leaves.items() if name not in trained}
    return unflatten_dict(trained, sep="/"), unflatten_dict(frozen, sep="/")


def trunk_layers(trained: Params, stacks: Sequence[tuple[str, int, int]]) -> int:
    """Number of the first layers that are frozen together with the embedding. stacks: as in `TransformerConfig`."""
    if "embed" in trained:
        return 0
    return min((first for name, first, _ in stacks if name in trained), default=stacks[-1][2])


def restacked(source: Params, like: Params) -> Params:
    """Copy the weights of `source` into the stacks and shardings of `like`; leaves that it lacks stay as in `like`."""
    slices = {}
    for name, leaf in flatten_dict(source, sep="/").items():
        for i, slice_name in enumerate(_names_of(name, leaf)):
            slices[slice_name] = leaf[i] if naming.is_stacked(name) else leaf

    def take(path: tuple[Any, ...], leaf: Any) -> Any:
        name = trees.path_name(path)
        names = _names_of(name, leaf)
        if not all(name in slices for name in names):
            return leaf
        values = jnp.stack([slices[name] for name in names]) if naming.is_stacked(name) else slices[name]
        return jax.device_put(values, leaf.sharding)

    return jax.tree_util.tree_map_with_path(take, like)


def _names_of(name: str, leaf: Any) -> list[str]:
    """One name for each layer of a stacked leaf; otherwise the leaf's own name."""
    return naming.layer_names(name, leaf.shape[0]) if naming.is_stacked(name) else [name]
