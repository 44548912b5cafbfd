"""Merging units: the weights that share one angle. Works on names, without JAX."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from warp_jax import naming

Unit = str | Callable[[str], str]
UNITS: dict[str, Callable[[str], str]] = {"layer": naming.layer_of, "tensor": str, "model": lambda name: "model"}


def unit_function(unit: Unit) -> Callable[[str], str]:
    """Turn the option `unit` into a function leaf name -> unit name. Raises ValueError for an unknown option."""
    if callable(unit):
        return unit
    if unit not in UNITS:
        raise ValueError(f"unit: got {unit!r}, want 'layer', 'tensor', 'model' or a function name -> unit name")
    return UNITS[unit]


def check_stacks(shapes: Mapping[str, tuple[int, ...]], stacked: str | None = "layers", layer_axis: int = 0) -> None:
    """Raise ValueError if leaves of one stack have different numbers of layers: layer_axis is that of another layout.

    shapes: of the leaves, by name. stacked: the key of the stacks.
    """
    stacks: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        stack = naming.stack_name(name, stacked)
        if stack is not None and shape:
            stacks.setdefault(stack, {})[name] = shape
    for stack, members in stacks.items():
        lengths = {shape[layer_axis]: name for name, shape in members.items()}
        if len(lengths) > 1:
            axes = range(min(map(len, members.values())))
            fitting = [str(axis) for axis in axes if len({shape[axis] for shape in members.values()}) == 1]
            (first, name), (second, other), *_ = lengths.items()
            raise ValueError(
                f"layer_axis: got {layer_axis}, where {name!r} has {first} layers and {other!r} has {second}; want an "
                f"axis with one length for all leaves under {stack!r}: {' or '.join(fitting) or 'there is none'}"
            )


def depth_shares(names: Sequence[str], alpha: float, not_merged: Sequence[str] = ()) -> np.ndarray:
    """Share of the LITI rate that each unit takes, [U]: LiNeS (arXiv 2410.17146), alpha + (1 - alpha) l / (L - 1).

    alpha: share of layer l = 0, from 0 to 1; the last layer takes 1. L is the largest layer number plus 1, also of the
    weights `not_merged`. Units outside layers (embedding, final norm, head) take alpha: the embedding comes before
    layer 0, and is often the head too. Raises ValueError for other alphas, and if no unit is in a layer.
    """
    numbers = [naming.layer_number(name) for name in names]
    inside = [number for number in numbers if number is not None]
    if not 0 <= alpha <= 1:
        raise ValueError(f"lines: got alpha {alpha}, want a number from 0 to 1")
    if not inside:
        raise ValueError(f"lines: no layer in the names of the units ({names[0]}, ...); want unit 'layer' or 'tensor'")
    last = max(*inside, *filter(None, map(naming.layer_number, not_merged)), 1)
    return np.array([alpha if number is None else alpha + (1 - alpha) * number / last for number in numbers])
