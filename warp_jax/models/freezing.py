"""Train part of a model: regular expressions select weights by name. The others are frozen.

Frozen weights have no Adam moments, anchor or task vector. Names are those of single layers, such as
'layers/20/attention/q/kernel' or 'embed/embedding'. A leaf stacks several layers and is trained or frozen as a whole,
so a stack is cut wherever a pattern matches different weights in two neighbouring layers.
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


def layer_groups(shapes: Any, *patterns: str) -> tuple[int, ...]:
    """Number of layers of each stack that each of the patterns needs; () if one stack is enough.

    shapes: parameters (arrays or shapes) with all layers in one stack. patterns: regular expressions, searched for in
    each name. Raises ValueError if no weight matches all of them.
    """
    leaf_names = [_names_of(name, leaf) for name, leaf in flatten_dict(shapes, sep="/").items()]
    if not any(all(_matches(name, patterns)) for names in leaf_names for name in names):
        examples = ", ".join(sorted(names[-1] for names in leaf_names)[:3])
        wanted = " and ".join(map(repr, patterns))
        first = any(all(_matches(name, patterns[:1])) for names in leaf_names for name in names)
        name = "lora.targets" if first else "trainable"
        raise ValueError(f"{name}: no weight matches {wanted}; names look like {examples}")
    layered = [names for names in leaf_names if naming.in_layer(names[0])]
    matches_per_layer = zip(*([_matches(name, patterns) for name in names] for names in layered), strict=True)
    sizes = tuple(len(list(group)) for _, group in itertools.groupby(matches_per_layer))
    return sizes if len(sizes) > 1 else ()


def split(params: Params, *patterns: str) -> tuple[Params, Params]:
    """Split parameters into (trained, frozen): a trained one matches all patterns. `trees.join` is the inverse.

    Stacks must be cut as in `layer_groups`.
    """
    leaves = flatten_dict(params, sep="/")
    trained = {name: leaf for name, leaf in leaves.items() if all(_matches(_names_of(name, leaf)[0], patterns))}
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


def _matches(name: str, patterns: Sequence[str]) -> list[bool]:
    """One flag for each pattern that is searched for in the name."""
    return [bool(re.search(pattern, name)) for pattern in patterns]


def _names_of(name: str, leaf: Any) -> list[str]:
    """One name for each layer of a stacked leaf; otherwise the leaf's own name."""
    return naming.layer_names(name, leaf.shape[0]) if naming.is_stacked(name) else [name]
