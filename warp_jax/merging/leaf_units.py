"""Merging units of the leaves of a pytree."""

from typing import Any, NamedTuple

import jax
import numpy as np

from warp_jax import naming, trees
from warp_jax.merging import units


class Units(NamedTuple):
    """Units of a pytree, numbered in order of first use."""

    names: tuple[str, ...]
    of_leaf: tuple[
        np.ndarray, ...
    ]  # per leaf, in `jax.tree.leaves` order: its unit, int32 [], or its layers' units, [L]


def units_of(tree: Any, unit: units.Unit = "layer", stacked: str | None = "layers") -> Units:
    """Assign each leaf to a unit, and each layer of a leaf that is stacked under the key `stacked`."""
    unit_fn = units.unit_function(unit)
    numbers: dict[str, int] = {}
    index = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = trees.path_name(path)
        in_layers = leaf.ndim > 0 and naming.is_stacked(name, stacked)
        members = naming.layer_names(name, leaf.shape[0], stacked) if in_layers else [name]
        ids = np.array([numbers.setdefault(unit_fn(member), len(numbers)) for member in members], np.int32)
        index.append(ids if in_layers else ids[0])
    return Units(tuple(numbers), tuple(index))
