"""Check of compiled programs against a chip's memory, and a search for the nearest setting that fits."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from warp_jax.settings import Settings
from warp_jax.tpu_fit.compile import EVALUATION, Compiled, Plan, chip_bytes, compile_program

Change = Mapping[str, Any]  # new config values by path
PlanFn = Callable[[Settings], Plan]
CheckFn = Callable[[Plan, Sequence[str]], "Fit"]  # plan, names of programs
MOST_TRIES = 16  # of a search; each takes minutes


class Fit(NamedTuple):
    """Compiled programs, and the memory that they may use."""

    programs: tuple[Compiled, ...]
    resident: Mapping[str, int]  # bytes per chip of the trees that stay in memory between programs
    limit: float  # bytes per chip that may be in use
    chips: int  # in the mesh

    @property
    def failing(self) -> list[str]:
        """Names of the programs that do not fit."""
        return [p.name for p in self.programs if p.error or p.total > self.limit]


def check(plan: Plan, names: Sequence[str] = (), *, limit: float, on_program: Callable[[Compiled], None]) -> Fit:
    """Compile the programs of a plan, or those of `names`, and compare their memory with `limit` bytes per chip."""
    compiled = []
    for program in plan.programs:
        if not names or program.name in names:
            compiled.append(compile_program(program))
            on_program(compiled[-1])
    resident = {name: chip_bytes(tree) for name, tree in plan.resident.items()}
    return Fit(tuple(compiled), resident, limit, plan.mesh.size)


def search(
    settings: Settings, failing: list[str], names: Sequence[str], *, make_plan: PlanFn, check_plan: CheckFn
) -> Change | None:
    """Find config changes after which the failing programs, at least one, and all others fit, or return None.

    Changes that keep the experiment the same are tried first. Every try is compiled: the failing programs, then the
    rest of `names` (empty means all). A change is skipped if make_plan raises ValueError.
    """
    changes = dict[str, Any]()
    for _ in range(MOST_TRIES):
        for change in _changes(settings, failing[0]):
            with contextlib.suppress(ValueError):  # if the mesh does not divide the model or a batch
                changed = settings.replace(change)
                plan = make_plan(changed)
                break
        else:
            return None
        settings, changes = changed, {**changes, **change}
        suspects = _of_names(plan, failing)
        rest = [name for name in _of_names(plan, names) if name not in suspects]
        failing = check_plan(plan, suspects).failing or (check_plan(plan, rest).failing if rest else [])
        if not failing:
            return changes
    return None


def _of_names(plan: Plan, names: Sequence[str]) -> list[str]:
    """Programs of these names (empty: all), in training and evaluation: their number depends on the batch sizes."""
    bases = [name.removesuffix(EVALUATION) for name in names]
    return [p.name for p in plan.programs if not bases or p.name.removesuffix(EVALUATION) in bases]


def _changes(settings: Settings, failing: str) -> list[Change]:
    """Changes that could make a program smaller, first those that keep the experiment the same."""
    data, fsdp, tensor = settings.mesh
    batch, pieces, chunk = settings.rl.batch_size, settings.rl.num_microbatches, settings.model.logits_chunk
    update, kl, evaluated = failing == "update", failing == "KL to SFT", settings.evaluation.batch_size
    halves = failing in ("generation", "reward") and batch % 2 == 0  # the update's smallest piece is the same then
    candidates: list[tuple[bool, Change]] = [
        (update and settings.model.remat != "full", {"model.remat": "full"}),
        (update, {"rl.num_microbatches": 2 * pieces}),
        (failing == "SFT step", {"sft.num_microbatches": 2 * settings.sft.num_microbatches}),
        ((update or kl) and not 0 < chunk <= 64, {"model.logits_chunk": 64}),
        ((kl or failing.endswith(EVALUATION)) and evaluated % 2 == 0, {"evaluation.batch_size": evaluated // 2}),
        (fsdp % 2 == 0 and tensor < 64, {"mesh": (data, fsdp // 2, tensor * 2)}),
        (halves, {"rl.batch_size": batch // 2}),
        (halves and pieces % 2 == 0, {"rl.batch_size": batch // 2, "rl.num_microbatches": pieces // 2}),
    ]
    return [change for applies, change in candidates if applies]


def check_names(plan: Plan, names: Sequence[str]) -> None:
    """Raise ValueError if the plan has no program of one of these names."""
    known = [program.name for program in plan.programs]
    for name in names:
        if name not in known:
            raise ValueError(f"--programs: got {name!r}, want all, or some of: {', '.join(known)}")
