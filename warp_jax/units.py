"""Names of merging units: which weights share one angle. Strings only.

A leaf whose path holds the key `layers` (or another that the caller names) is taken as STACKED when the next key
is not a number: its first axis runs over the layers, as `flax.linen.scan` lays parameters out. Each slice of a
stacked leaf has a name of its own, so that stacked and unstacked weights give the same units.
"""

import re
from collections.abc import Callable

Unit = str | Callable[[str], str]
_LAYER = re.compile(r"^(?:.*?[/.])??(?:layers|h|blocks?|layer)[/._](\d+)(?=[/._]|$)")


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
    return unit_function(unit)(name)


def unit_function(unit: Unit) -> Callable[[str], str]:
    """The function leaf name -> unit name that an option stands for."""
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
