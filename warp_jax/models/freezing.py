"""Which weights are trained: a pattern on their names. The rest is frozen and has no moments, anchor or task vector.

Names are those of single layers, such as 'layers/20/attention/q/kernel' or 'embed/embedding'. Layers are stored in
stacks; a stack is cut where the pattern changes between two layers, so that each leaf is trained or frozen whole.
"""

import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp

from warp_jax import naming, trees
from warp_jax.types import Params


def layer_groups(pattern: str, shapes: Any) -> tuple[int, ...]:
    """Sizes of the stacks into which `pattern` cuts the layers of a tree with one stack; () if it cuts nothing.

    ValueError if the pattern is no regular expression, or no weight matches it.
    """
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"trainable: {pattern!r} is not a regular expression: {error}") from error
    names = [names_of(trees.path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)]
    if not any(expression.search(name) for of_leaf in names for name in of_leaf):
        examples = ", ".join(sorted(of_leaf[-1] for of_leaf in names)[:3])
        raise ValueError(f"trainable: no weight matches {pattern!r}; names are like {examples}")
    stacked = [of_leaf for of_leaf in names if naming.in_layer(of_leaf[0])]
    per_layer = zip(*([bool(expression.search(name)) for name in of_leaf] for of_leaf in stacked), strict=True)
    sizes = tuple(len(list(group)) for _, group in itertools.groupby(per_layer))
    return sizes if len(sizes) > 1 else ()


def split(params: Params, pattern: str) -> tuple[Params, Params]:
    """The trained leaves and the frozen ones of a tree whose stacks are cut for `pattern`; `trees.join` undoes it."""
    first_names = {
        trees.path_name(path): names_of(trees.path_name(path), leaf)[0]
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    return trees.split(params, lambda name: bool(re.search(pattern, first_names[name])))


def restacked(source: Params, like: Params) -> Params:
    """`like`, with each leaf whose layers are all in `source` taken from there, however the stacks of both are cut."""
    slices = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(source):
        names = names_of(trees.path_name(path), leaf)
        in_stack = naming.is_stacked(trees.path_name(path))
        slices.update({name: leaf[i] if in_stack else leaf for i, name in enumerate(names)})

    def take(path: tuple[Any, ...], leaf: Any) -> Any:
        names = names_of(trees.path_name(path), leaf)
        if not all(name in slices for name in names):
            return leaf
        found = [slices[name] for name in names]
        return jax.device_put(jnp.stack(found) if naming.is_stacked(trees.path_name(path)) else found[0], leaf.sharding)

    return jax.tree_util.tree_map_with_path(take, like)


def names_of(name: str, leaf: Any) -> list[str]:
    """Names of the layers of a leaf, or its own name if it is not stacked."""
    return naming.layer_names(name, leaf.shape[0]) if naming.is_stacked(name) else [name]
