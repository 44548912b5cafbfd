"""Number of collectives in an optimized HLO module, and bytes that one chip sends in them.

The input is `jax.stages.Compiled.as_text()` of a TPU or CPU program. The entry and all that it calls count; a
conditional counts as its costlier branch, a loop as body times iterations. In a ring of n chips, one chip sends:
    all-gather: (n - 1) / n of its result; all-reduce: 2 (n - 1) / n of its operand;
    reduce-scatter and all-to-all: (n - 1) / n of the operand; collective-permute and send: the operand.
Sizes exclude the padding of tiled layouts. Groups of one chip are not counted.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple


class Traffic(NamedTuple):
    """Executions of one kind of collective, and the bytes that one chip sends in all of them."""

    count: int  # type: ignore[assignment]  # tuples have a method of this name
    bytes: float


class Collectives(NamedTuple):
    """Traffic by kind of collective, with the keys of SENT."""

    once: Mapping[str, Traffic]  # in one run of the module, without loops whose number of iterations is unknown
    per_loop_step: Mapping[str, Traffic]  # in one iteration of these loops, summed over them


# Bytes that one of n chips sends per byte of its operand.
SENT: Mapping[str, Callable[[int], float]] = {
    "all-gather": lambda n: n - 1,  # its result is n operands
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
    "send": lambda n: 1,  # to another slice
}
COPIES = ("copy", "copy-start", "copy-done", "bitcast", "convert")
NESTED = r"(?:[^()]|\((?:[^()]|\([^()]*\))*\))*"  # two levels of parentheses: tuples, and tiles such as T(8,128)
INSTRUCTION = re.compile(rf"\s+(ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\(({NESTED})\)(.*)")
HEADER = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*-> .*\{$")
CALLED = re.compile(r"\b(?:calls|to_apply|branch_computations|true_computation|false_computation)=(\{[^}]*\}|\S+)")


class _Op(NamedTuple):
    """An instruction as text: its shape before the parentheses, its operands inside, its attributes after them."""

    kind: str
    shape: str
    operands: str
    attributes: str

    @property
    def inputs(self) -> list[str]:
        return re.findall(r"%([\w.-]+)", self.operands)

    def attribute(self, name: str) -> str:
        """Text of an attribute: a word without %, or lists such as {{0,1},{1,0}}; "" if missing."""
        return (re.findall(rf"\b{name}=%?([\w.-]+|\{{[{{}},\d]*)", self.attributes) or [""])[0]


class _Computation(NamedTuple):
    """Instructions by name, and the name of the one that returns the result."""

    name: str
    ops: Mapping[str, _Op]
    root: str

    def source(self, name: str) -> _Op:
        """The instruction that computes a value, ignoring copies."""
        op = self.ops[name]
        return self.source(op.inputs[0]) if op.kind in COPIES else op

    def constant(self, name: str) -> int | None:
        """The value of an integer constant; None for other instructions."""
        op = self.source(name)
        return int(op.operands) if op.kind == "constant" and re.fullmatch(r"-?\d+", op.operands) else None

    def carried(self, name: str) -> int | None:
        """The index of a value in the tuple that a loop carries; None for other values."""
        op = self.source(name)
        from_loop = op.kind == "get-tuple-element" and self.ops[op.inputs[0]].kind == "parameter"
        return int(op.attribute("index")) if from_loop else None


def collectives(text: str) -> Collectives:
    """Count the collectives of a module. Raises ValueError if the text is not an optimized HLO module."""
    chips = math.prod(map(int, re.findall(r"(?:num_partitions|replica_count)=(\d+)", text.partition("\n")[0])))
    return _walk(*_parse(text.replace("replica_groups={}", f"replica_groups=[1,{chips}]<=[{chips}]")))


def _parse(text: str) -> tuple[Mapping[str, _Computation], str]:
    """Return all computations of a module by name, and the name of the entry."""
    computations, ops, entry, name = dict[str, _Computation](), dict[str, _Op](), "", ""
    for line in text.splitlines():
        if header := HEADER.match(line):
            name, ops = header[2], {}
            entry = name if header[1] else entry
        elif found := INSTRUCTION.match(line):
            ops[found[2]] = _Op(*found.group(4, 3, 5, 6))
            if found[1]:
                computations[name] = _Computation(name, ops, found[2])
    if entry not in computations:
        raise ValueError(f"hlo: got {len(text)} characters without an ENTRY, want jax.stages.Compiled.as_text()")
    return computations, entry


def _walk(module: Mapping[str, _Computation], name: str) -> Collectives:
    """Traffic of a computation and all that it calls."""
    computation = module[name]
    once, per_step = dict[str, Traffic](), dict[str, Traffic]()
    for op in computation.ops.values():
        found = _loop(module, computation, op) if op.kind == "while" else _sent(module, computation, op)
        _add(once, found.once)
        _add(per_step, found.per_loop_step)
    return Collectives(once, per_step)


def _sent(module: Mapping[str, _Computation], computation: _Computation, op: _Op) -> Collectives:
    """Traffic of an instruction and all that it calls. A conditional counts as its costlier branch."""
    if op.kind.removesuffix("-start") in SENT:
        return Collectives(_own(computation, op), {})
    if op.kind.endswith(("-done", "-update")):  # counted at their -start
        return Collectives({}, {})
    found = [_walk(module, name) for name in re.findall(r"[\w.-]+", " ".join(CALLED.findall(op.attributes)))]
    return max(found, key=lambda c: sum(t.bytes for part in c for t in part.values()), default=Collectives({}, {}))


def _loop(module: Mapping[str, _Computation], outside: _Computation, op: _Op) -> Collectives:
    """Traffic of a loop: `once` if its number of iterations is known. The condition runs once more than the body."""
    condition, body = op.attribute("condition"), op.attribute("body")
    trips = _trips(outside, op, module[condition], module[body])
    once, per_step = dict[str, Traffic](), dict[str, Traffic]()
    for name, times in ((condition, (trips or 0) + 1), (body, 1 if trips is None else trips)):
        inner = _walk(module, name)
        _add(per_step if trips is None else once, inner.once, times)
        _add(per_step, inner.per_loop_step)
    return Collectives(once, per_step)


def _trips(outside: _Computation, op: _Op, condition: _Computation, body: _Computation) -> int | None:
    """Iterations of a loop, from XLA's annotation or a counter with a constant bound; None if it may end early."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', op.attributes):
        return int(known[1])
    test, start, after = condition.ops[condition.root], outside.ops[op.inputs[0]], body.ops[body.root]
    if (test.kind, start.kind, after.kind, test.attribute("direction")) != ("compare", "tuple", "tuple", "LT"):
        return None
    index, bound = condition.carried(test.inputs[0]), condition.constant(test.inputs[1])
    if index is None or bound is None:
        return None
    first, step = outside.constant(start.inputs[index]), body.source(after.inputs[index])
    added = [body.constant(name) for name in step.inputs if step.kind == "add" and body.carried(name) != index]
    if first is None or len(added) != 1 or (by := added[0] or 0) <= 0:
        return None
    return max(0, math.ceil((bound - first) / by))


def _own(computation: _Computation, op: _Op) -> dict[str, Traffic]:
    """Traffic of a collective. XLA:TPU repeats it in every fusion that overlaps it; only the first one counts."""
    first = any("AsyncCollectiveStart" in other.attributes for other in computation.ops.values())
    n = _chips(op)
    if n < 2 or ("async_collective_fusion_config" in op.attributes and not first):
        return {}
    kind = op.kind.removesuffix("-start")
    if kind == "all-reduce" and computation.name.startswith("all-reduce-scatter"):  # each chip keeps a slice
        kind = "reduce-scatter"
    return {kind: Traffic(1, SENT[kind](n) * sum(_bytes(computation.ops[name].shape) for name in op.inputs))}


def _chips(op: _Op) -> int:
    """Number of chips in the group of a collective; 1 if it sends nothing to another chip."""
    if op.kind == "send":  # to the host, or through the host to another slice
        return 1 if "is_host_transfer=true" in op.attributes and "megascale" not in op.attributes else 2
    if op.kind.startswith("collective-permute"):
        pairs = re.findall(r"\{(\d+),(\d+)\}", op.attribute("source_target_pairs"))
        return 2 if any(source != target for source, target in pairs) else 1
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", op.attributes):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", op.attributes):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]* \{([^}]*)\}", op.attributes):  # ['x'=4,'y'=2] {'x'}
        sizes = dict(re.findall(r"([\w.-]+)'?=(\d+)", found[1]))
        axes = re.findall(r"([\w.-]+)'?(?::\(\d+\)(\d+))?", found[2])  # 'x':(2)4 is a part of 'x', of size 4
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    got = op.attributes.lstrip(", ")[:99]
    raise ValueError(f"hlo: replica_groups: got {got}; want {{{{0,1}}}}, [1,2]<=[2] or mesh['x'=2] {{'x'}}")


def _bytes(shape: str) -> float:
    """Bytes of an array or a tuple of arrays, such as (bf16[8,128]{1,0:T(8,128)(2,1)}, pred[])."""
    arrays = re.findall(r"(pred|[a-z]+(\d+)\w*)\[([\d,<=]*)\]", shape)
    return sum(int(bits or 8) / 8 * math.prod(map(int, re.findall(r"\d+", dims))) for _, bits, dims in arrays)


def _add(total: dict[str, Traffic], more: Mapping[str, Traffic], times: int = 1) -> None:
    for kind, traffic in more.items():
        count, size = total.get(kind, Traffic(0, 0.0))
        total[kind] = Traffic(count + times * traffic.count, size + times * traffic.bytes)
