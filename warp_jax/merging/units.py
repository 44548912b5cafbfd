"""Merging units: which weights share one angle. Strings only."""

from collections.abc import Callable

from warp_jax import naming

Unit = str | Callable[[str], str]


def unit_of(name: str, unit: Unit = "layer") -> str:
    """The unit of a leaf or tensor."""
    return unit_function(unit)(name)


def unit_function(unit: Unit) -> Callable[[str], str]:
    """The function leaf name -> unit name that an option stands for."""
    if callable(unit):
        return unit
    named: dict[str, Callable[[str], str]] = {
        "layer": naming.layer_of,
        "tensor": lambda name: name,
        "model": lambda name: "model",
    }
    if unit not in named:
        raise ValueError(f"unit: got {unit!r}, want 'layer', 'tensor', 'model' or a function name -> unit name")
    return named[unit]
