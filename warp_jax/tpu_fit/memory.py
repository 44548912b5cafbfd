"""Whether all programs of a config fit the chips, a table that shows it, and the nearest setting that does fit."""

import contextlib
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from warp_jax.models.transformer import TransformerConfig
from warp_jax.tpu_fit import roofline
from warp_jax.tpu_fit.chips import GIB, Chip
from warp_jax.tpu_fit.compile import EVALUATION, Compiled, Plan, chip_bytes, compile_program
from warp_jax.tpu_fit.hlo import Traffic

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


def table(fit: Fit, chip: Chip, spare: float) -> str:
    """Markdown: programs with their memory and traffic, then what is alive between them, and the verdict."""
    lines = [
        "| program | compile s | arguments GiB | temporaries | peak | beside | in use | of the chip | a chip sends |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for p in fit.programs:
        figures = [p.arguments, p.temporaries, p.peak, p.beside, p.total]
        cells = ["-" if p.error and i in (1, 2, 4) else f"{x / GIB:.2f}" for i, x in enumerate(figures)]
        share = "TOO LARGE" if p.error else f"{100 * p.total / chip.hbm_bytes:.0f} %"
        lines.append(f"| {p.name} | {p.seconds:.0f} | {' | '.join(cells)} | {share} | {traffic(p)} |")
    lines += ["", "Between programs, GiB a chip: " + resident_line(fit)]
    lines += [f"A chip of {chip.name} has {chip.hbm_bytes / GIB:.2f} GiB, of which {100 * spare:.0f} % stay free."]
    for p in fit.programs:
        if p.error:
            lines += ["", f"{p.name} alone is too large:", *(f"  {line}" for line in biggest_buffers(p.error))]
    verdict = "All programs fit." if not fit.failing else f"DOES NOT FIT: {', '.join(fit.failing)}."
    return "\n".join([*lines, "", verdict])


def resident_line(fit: Fit) -> str:
    """What is alive between the programs, and its sum."""
    parts = [f"{name} {size / GIB:.2f}" for name, size in fit.resident.items() if size]
    return f"{', '.join(parts)}; together {sum(fit.resident.values()) / GIB:.2f}."


def traffic(program: Compiled) -> str:
    """Bytes that a chip sends: in all, and for a generated token."""
    parts = []
    for share, unit in ((program.traffic.once, ""), (program.traffic.per_loop_step, " a token")):
        kinds = [f"{kind} {size(t.bytes)} in {t.count}" for kind, t in share.items() if t.count]
        if kinds:
            total = sum(t.bytes for t in share.values())
            parts.append(f"{size(total)}{unit} ({', '.join(kinds)})")
    return "; ".join(parts) or "nothing"


def size(count: float) -> str:
    """Bytes in the unit that people read: 1.5 MB, powers of 1000."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def biggest_buffers(error: str, count: int = 5) -> list[str]:
    """The lines of an out-of-memory error of XLA that name how much it wants and its largest buffers."""
    lines = [line.strip() for line in error.splitlines()]
    found = [line for line in lines if re.search(r"Used .* of .* hbm|exceeds available HBM", line)][:1]
    for i, line in enumerate(lines):
        if re.match(r"\d+\. Size: ", line) and len(found) <= count:
            names = [re.sub(r"^(Operator: op_name=|Shape: )", "", x) for x in lines[i + 1 : i + 3]]
            found.append(f"{line.split('. ', 1)[1]}, {', '.join(names)}")
    return found or lines[:1]


def step_table(
    config: ConfigDict, policy: TransformerConfig, reward_model: TransformerConfig | None, fit: Fit, chip: Chip
) -> str:
    """Markdown: what a step of RL takes at least, its network traffic being that of the compiled programs."""
    data, fsdp, tensor = config.mesh
    completion = config.sampling.max_new_tokens
    sizes = roofline.Sizes(config.rl.batch_size, config.sampling.prompt_tokens, completion, data * fsdp, tensor)
    works = {"generation": roofline.generation(policy, sizes)}
    if reward_model is not None:
        works["reward"] = roofline.scoring(reward_model, sizes)
    in_pieces = 0 < config.model.logits_chunk < completion
    works["update"] = roofline.update(policy, sizes, remat=policy.remat == "full", in_pieces=in_pieces)
    sent = {p.name: _sent(p.traffic.once) + completion * _sent(p.traffic.per_loop_step) for p in fit.programs}
    return roofline.table(works, sent, chip)


def _sent(traffic: Mapping[str, Traffic]) -> float:
    return sum(t.bytes for t in traffic.values())


def advice(changes: Change | None) -> str:
    """What to change on the command line, in words; quoted for a shell."""
    if changes is None:
        return "No nearby setting fits; take more chips, or chips with more memory."
    flags = [f"--config.{path}={str(value).replace(' ', '')}" for path, value in changes.items()]
    return f"It fits with {shlex.join(flags)}"


def as_json(fit: Fit, chip: Chip) -> dict[str, Any]:
    """All figures, bytes a chip."""
    programs = []
    for p in fit.programs:
        moved = {
            share: {kind: t._asdict() for kind, t in getattr(p.traffic, share).items()}
            for share in ("once", "per_loop_step")
        }
        programs.append({**p._asdict(), "total": p.total, "traffic": moved, "fits": p.name not in fit.failing})
    return {
        "chip": chip.name,
        "hbm_bytes": chip.hbm_bytes,
        "limit_bytes": fit.limit,
        "chips": fit.chips,
        "fits": not fit.failing,
        "resident": dict(fit.resident),
        "programs": programs,
    }
