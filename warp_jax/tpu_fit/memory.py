"""Check of compiled programs against a chip's memory, and a search for the nearest setting that fits."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from warp_jax.tpu_fit.compile import EVALUATION, Compiled, Plan, chip_bytes, compile_program

Change = Mapping[str, Any]  # new values of a config by their paths
MOST_TRIES = 16  # of a search; each takes minutes


class Fit(NamedTuple):
    """Compiled programs against a chip. limit: bytes that may be in use; chips: of the mesh."""

    programs: tuple[Compiled, ...]
    resident: Mapping[str, int]
    limit: float
    chips: int

    @property
    def failing(self) -> list[str]:
        """Names of the programs that do not fit."""
        return [p.name for p in self.programs if p.error or p.total > self.limit]


def check(plan: Plan, limit: float, names: Sequence[str] = (), on_program: Callable[[Compiled], None] = print) -> Fit:
    """Compile the programs of a plan (or those of these names) and weigh them; on_program hears each as it is done."""
    done = []
    for program in plan.programs:
        if names and program.name not in names:
            continue
        done.append(compile_program(plan, program))
        on_program(done[-1])
    resident = {name: chip_bytes(tree) for name, tree in plan.resident.items()}
    return Fit(tuple(done), resident, limit, plan.mesh.size)


def search(
    config: ConfigDict,
    make_plan: Callable[[ConfigDict], Plan],
    failing: list[str],
    limit: float,
    *,
    names: Sequence[str] = (),
    on_program: Callable[[Compiled], None] = print,
) -> Change | None:
    """The changes, least first, after which all programs (or those of these names) fit; None if none is known. Each
    try is compiled: first what failed, then the rest. A change for which make_plan raises ValueError is not made.
    """
    made = dict[str, Any]()
    for _ in range(MOST_TRIES):
        if not failing:
            return made
        accepted = next(_accepted(config, failing[0], make_plan), None)
        if accepted is None:
            return None
        change, config, plan = accepted
        made |= change
        failing = _failing(plan, limit, failing, names, on_program)
    return None if failing else made


def _accepted(
    config: ConfigDict, failing: str, make_plan: Callable[[ConfigDict], Plan]
) -> Iterator[tuple[Change, ConfigDict, Plan]]:
    """The changes that give a config which can be planned, each with both."""
    for change in _changes(config, failing):
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict(change)
        with contextlib.suppress(ValueError):  # the mesh does not suit the model, or the batch the mesh
            yield change, changed, make_plan(changed)


def _failing(
    plan: Plan, limit: float, suspects: Sequence[str], names: Sequence[str], on_program: Callable[[Compiled], None]
) -> list[str]:
    """Which of these names do not fit: the suspects, or if they fit, any other. A program for training and the same
    one for evaluation go together: they are two or one, as their batches differ or not.
    """
    asked = _of_names(plan, names) if names else [program.name for program in plan.programs]
    first = _of_names(plan, suspects)
    rest = [name for name in asked if name not in first]
    return check(plan, limit, first, on_program).failing or (
        check(plan, limit, rest, on_program).failing if rest else []
    )


def _of_names(plan: Plan, names: Sequence[str]) -> list[str]:
    bases = [name.removesuffix(EVALUATION) for name in names]
    return [program.name for program in plan.programs if program.name.removesuffix(EVALUATION) in bases]


def _changes(config: ConfigDict, failing: str) -> Iterator[Change]:
    """What could make a program smaller: first what leaves the experiment as it is."""
    data, fsdp, tensor = config.mesh
    batch, pieces, chunk = config.rl.batch_size, config.rl.num_microbatches, config.model.logits_chunk
    if failing == "update" and config.model.remat != "full":
        yield {"model.remat": "full"}
    if failing == "update":
        yield {"rl.num_microbatches": 2 * pieces}
    if failing in ("update", "KL to SFT") and not 0 < chunk <= 64:
        yield {"model.logits_chunk": 64}
    if failing.endswith(EVALUATION) or failing == "KL to SFT":
        yield from _halved({"evaluation.batch_size": config.evaluation.batch_size})
    if fsdp % 2 == 0 and tensor < 64:
        yield {"mesh": (data, fsdp // 2, tensor * 2)}
    if failing in ("generation", "reward"):  # the update knows no smaller batch than a row a chip
        yield from _halved({"rl.batch_size": batch})
        yield from _halved({"rl.batch_size": batch, "rl.num_microbatches": pieces})


def _halved(sizes: Mapping[str, int]) -> Iterator[Change]:
    """All sizes by two, if all are even."""
    if not any(size % 2 for size in sizes.values()):
        yield {path: size // 2 for path, size in sizes.items()}


def check_names(plan: Plan, names: Sequence[str]) -> None:
    """Raise ValueError if the plan has no program of one of these names."""
    known = [program.name for program in plan.programs]
    for name in names:
        if name not in known:
            raise ValueError(f"programs: got {name!r}, want all, or some of: {', '.join(known)}")
