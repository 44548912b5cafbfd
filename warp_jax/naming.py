"""Names of weights, and the layer that a name belongs to. Works on strings, without JAX.

A leaf is STACKED if its path has the key `layers` (or a key of the caller's choice) and the next key is not a number:
then its first axis runs over the layers, as in `flax.linen.scan`. A stack under `layers_from_20` starts at layer 20.
Each slice of a stacked leaf has its own name, so that layers in one stack, several stacks or none have the same names.
"""

import re
from typing import NamedTuple

_LAYER = re.compile(r"^(?:.*?[/.])??(?:layers|h|blocks?|layer)[/._](\d+)(?=[/._]|$)")


def is_stacked(name: str, under: str | None = "layers") -> bool:
    """Return True if the leaf is stacked under the key `under`. None: no leaf is stacked."""
    stack = _stack_of(name, under)
    return stack is not None and bool(stack.rest) and not stack.rest[0].isdigit()


def stack_name(name: str, under: str | None = "layers") -> str | None:
    """Name of the stack that a stacked leaf is in, such as 'decoder/layers_from_20'; None if it is not stacked."""
    stack = _stack_of(name, under)
    return None if stack is None or not is_stacked(name, under) else name.removesuffix("/" + "/".join(stack.rest))


def layer_names(name: str, num_layers: int, under: str | None = "layers") -> list[str]:
    """Names of the slices of a stacked leaf, e.g. 'layers/0/attn/q/kernel'."""
    stack = _stack_of(name, under) or _Stack([], 0, name.split("/"))
    return ["/".join([*stack.before, str(i), *stack.rest]) for i in range(stack.first, stack.first + num_layers)]


class _Stack(NamedTuple):
    before: list[str]  # keys up to `layers`
    first: int  # number of the stack's first layer
    rest: list[str]  # keys after `layers`


def _stack_of(name: str, under: str | None) -> _Stack | None:
    parts = name.split("/")
    for place, part in enumerate(parts):
        head, _, first = part.partition("_from_")
        if under is not None and head == under and (part == under or first.isdigit()):
            return _Stack([*parts[:place], under], int(first or 0), parts[place + 1 :])
    return None


def num_inputs(name: str) -> int:
    """Number of a kernel's input axes, which come before its output axes; 0 for a weight that is no kernel."""
    if not name.endswith("kernel"):
        return 0
    return 2 if name.endswith("attention/o/kernel") else 1


def layer_of(name: str) -> str:
    """Default merging unit of a leaf: its transformer layer, else its module (embedding, final norm, head)."""
    match = _LAYER.match(name)
    if match:
        return match.group(0)
    module, _, _ = name.rpartition("/")
    return module or name


def layer_number(name: str) -> int | None:
    """Number of the transformer layer in a name, from 0; None for a name outside layers."""
    match = _LAYER.match(name)
    return int(match.group(1)) if match else None


def in_layer(name: str) -> bool:
    """Return True if the name contains a transformer layer."""
    return layer_number(name) is not None
