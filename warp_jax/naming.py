"""Names of weights: leaves of a tree, their layers, and stacks of layers. Strings only.

A leaf whose path holds the key `layers` (or another that the caller names) is taken as STACKED when the next key
is not a number: its first axis runs over the layers, as `flax.linen.scan` lays parameters out. A stack below
`layers_from_20` begins at layer 20. Each slice of a stacked leaf has a name of its own, so that weights in one stack,
in several and in none have the same names.
"""

import re
from typing import NamedTuple

_LAYER = re.compile(r"^(?:.*?[/.])??(?:layers|h|blocks?|layer)[/._](\d+)(?=[/._]|$)")


def is_stacked(name: str, under: str | None = "layers") -> bool:
    """True if the leaf's first axis runs over the layers: the key after `under` is not a number. None: never."""
    stack = _stack_of(name, under)
    return stack is not None and bool(stack.rest) and not stack.rest[0].isdigit()


def layer_names(name: str, num_layers: int, under: str | None = "layers") -> list[str]:
    """Names of the slices of a stacked leaf: 'layers/0/attn/q/kernel', ..."""
    stack = _stack_of(name, under) or _Stack([], 0, name.split("/"))
    return ["/".join([*stack.before, str(i), *stack.rest]) for i in range(stack.first, stack.first + num_layers)]


class _Stack(NamedTuple):
    before: list[str]  # keys up to that of the stack, without the number of its first layer
    first: int  # number of the stack's first layer
    rest: list[str]


def _stack_of(name: str, under: str | None) -> _Stack | None:
    parts = name.split("/")
    for place, part in enumerate(parts):
        head, _, first = part.partition("_from_")
        if under is not None and head == under and (part == under or first.isdigit()):
            return _Stack([*parts[:place], under], int(first or 0), parts[place + 1 :])
    return None


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
