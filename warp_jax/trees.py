"""Names of pytree leaves, and which leaves make up one merging unit.

A leaf whose path holds the key `layers` (or another that the caller names) is taken as STACKED when the next key
is not a number: its first axis runs over the layers, as `flax.linen.scan` lays parameters out. Each slice of a
stacked leaf has a name of its own, so that a stacked and an unstacked tree give the same units.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Unit = str | Callable[[str], str]
_LAYER = re.compile(r"^(?:.*?[/.])??(?:layers|h|blocks?|layer)[/._](\d+)(?=[/._]|$)")


class Units(NamedTuple):
    """names: one per unit. of_leaf: for each leaf in `jax.tree.leaves` order, the unit of the whole leaf
    (an int array of shape []) or of each of its layers (shape [L]).
    """

    names: tuple[str, ...]
    of_leaf: tuple[np.ndarray, ...]


def path_name(path: tuple[Any, ...]) -> str:
    """The keys of a `jax.tree_util` path joined by '/', e.g. 'layers/attn/q/kernel'."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def is_stacked(name: str, under: str | None = "layers") -> bool:
    """True if the leaf's first axis runs over the layers: the key after `under` is not a number. None: never."""
    parts = name.split("/")
    if under not in parts:
        return False
    following = parts[parts.index(under) + 1 :]
    return bool(following) and not following[0].isdigit()


def layer_names(name: str, num_layers: int, under: str | None = "layers") -> list[str]:
    """Names of the slices of a stacked leaf: 'layers/0/attn/q/kernel', ..."""
    parts = name.split("/")
    after = parts.index(under) + 1 if under in parts else 0
    return ["/".join([*parts[:after], str(i), *parts[after:]]) for i in range(num_layers)]


def layer_of(name: str) -> str:
    """The default unit of a leaf: its transformer layer, else its module (embedding, final norm, head)."""
    match = _LAYER.match(name)
    if match:
        return match.group(0)
    module, _, _ = name.rpartition("/")
    return module or name


def in_layer(name: str) -> bool:
    """True if `layer_of` finds a transformer layer in the name."""
    return bool(_LAYER.match(name))


def unit_of(name: str, unit: Unit = "layer") -> str:
    """The unit of a leaf or tensor."""
    return _unit_fn(unit)(name)


def _unit_fn(unit: Unit) -> Callable[[str], str]:
    if callable(unit):
        return unit
    named: dict[str, Callable[[str], str]] = {
        "layer": layer_of,
        "tensor": lambda name: name,
        "model": lambda name: "model",
    }
    if unit not in named:
        raise ValueError(f"unit: got {unit!r}, want 'layer', 'tensor', 'model' or a function name -> unit name")
    return named[unit]


def units_of(tree: Any, unit: Unit = "layer", stacked: str | None = "layers") -> Units:
    """Assign every leaf, or every layer of a leaf stacked under `stacked`, to its unit; in order of first use."""
    unit_fn = _unit_fn(unit)
    numbers: dict[str, int] = {}
    index = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = path_name(path)
        in_layers = leaf.ndim > 0 and is_stacked(name, stacked)
        names = layer_names(name, leaf.shape[0], stacked) if in_layers else [name]
        ids = np.array([numbers.setdefault(unit_fn(n), len(numbers)) for n in names], np.int32)
        index.append(ids if in_layers else ids[0])
    return Units(tuple(numbers), tuple(index))


def check_floating(tree: Any, what: str) -> None:
    """Raise ValueError naming the first leaf that is not a floating-point array."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"{what}: leaf {path_name(path)!r} is of {dtype or type(leaf)}, want a floating-point array; "
                "pass the weights only"
            )


def check_same_structure(reference: Any, other: Any, what: str) -> None:
    """Raise ValueError naming the first leaf of `other` that is missing, extra or of another shape."""
    expected = {path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(reference)}
    got = {path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(other)}
    for name in expected:
        if name not in got:
            raise ValueError(f"{what}: leaf {name!r} is missing")
    for name in got:
        if name not in expected:
            raise ValueError(f"{what}: leaf {name!r} is not in the reference tree")
    for name, leaf in expected.items():
        if got[name].shape != leaf.shape:
            raise ValueError(f"{what}: leaf {name!r} has shape {got[name].shape}, want {leaf.shape}")
    structures: list[Any] = [jax.tree.structure(reference), jax.tree.structure(other)]
    if structures[0] != structures[1]:
        raise ValueError(f"{what}: same leaves, but containers differ from the reference tree's")
