"""Pytrees of weights: names of leaves, checks, and join."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


def path_name(path: tuple[Any, ...]) -> str:
    """Join the keys of a `jax.tree_util` path by '/', e.g. 'layers/attn/q/kernel'."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def check_floating(tree: Any, what: str) -> None:
    """Raise ValueError naming the first leaf that is not a floating-point array."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"{what}: leaf {path_name(path)!r} is {dtype or type(leaf)}, want a floating-point array; "
                "pass the weights only"
            )


def check_same_structure(reference: Any, other: Any, what: str) -> None:
    """Raise ValueError naming the first leaf of `other` that is missing, extra or has another shape."""
    expected = {path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(reference)}
    got = {path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(other)}
    for name in [*expected, *got]:
        if name not in got:
            raise ValueError(f"{what}: leaf {name!r} is missing")
        if name not in expected:
            raise ValueError(f"{what}: leaf {name!r} is not in the reference tree")
    for name, leaf in expected.items():
        if got[name].shape != leaf.shape:
            raise ValueError(f"{what}: leaf {name!r} has shape {got[name].shape}, want {leaf.shape}")
    structures: list[Any] = [jax.tree.structure(reference), jax.tree.structure(other)]
    if structures[0] != structures[1]:
        raise ValueError(
            f"{what}: same leaves, but containers differ from the reference tree's; want the same structure"
        )


def join(tree: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Join two trees of nested dicts. A leaf of both comes from the first one. Copies no array."""
    both = {key: join(tree[key], other[key]) for key in tree.keys() & other.keys() if isinstance(tree[key], Mapping)}
    return {**other, **tree, **both}
