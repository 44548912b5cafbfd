"""Merging units: the weights that share one angle. Works on names, without JAX."""

from collections.abc import Callable

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
