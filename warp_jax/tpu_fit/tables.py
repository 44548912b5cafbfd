"""Reports on compiled programs: memory and time tables in Markdown, all figures as JSON, and command-line advice."""

import re
import shlex
from collections.abc import Mapping
from typing import Any

from warp_jax.experiment import architecture
from warp_jax.settings import Settings
from warp_jax.tpu_fit import roofline
from warp_jax.tpu_fit.chips import GIB, Chip
from warp_jax.tpu_fit.compile import Compiled
from warp_jax.tpu_fit.hlo import Traffic
from warp_jax.tpu_fit.memory import Change, Fit

FIGURES = ("arguments", "temporaries", "peak", "co_resident", "total")  # columns in GiB
UNKNOWN = ("temporaries", "peak", "total")  # if the compiler refused the program


def table(fit: Fit, chip: Chip, spare: float) -> str:
    """Memory and traffic of all programs and the verdict, as Markdown. `spare`: share of memory to leave free."""
    header = ["program", "compile s", *(f"{name} GiB" for name in FIGURES), "share of chip", "sent per chip"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for p in fit.programs:
        cells = ["-" if p.error and name in UNKNOWN else f"{getattr(p, name) / GIB:.2f}" for name in FIGURES]
        share = "TOO LARGE" if p.error else f"{100 * p.total / chip.hbm_bytes:.0f} %"
        lines.append(f"| {p.name} | {p.seconds:.0f} | {' | '.join(cells)} | {share} | {traffic(p)} |")
    resident = ", ".join(f"{name} {count / GIB:.2f}" for name, count in fit.resident.items() if count)
    lines += ["", f"In memory between programs, GiB per chip: {resident}; sum {sum(fit.resident.values()) / GIB:.2f}."]
    capacity = chip.hbm_bytes / GIB
    lines += [f"A {chip.name} chip has {capacity:.2f} GiB for programs; {100 * spare:.0f} % must stay free."]
    for p in fit.programs:
        if p.error:
            lines += ["", f"{p.name} alone is too large:", *(f"  {line}" for line in biggest_buffers(p.error))]
    verdict = "All programs fit." if not fit.failing else f"DOES NOT FIT: {', '.join(fit.failing)}."
    return "\n".join([*lines, "", verdict])


def traffic(program: Compiled) -> str:
    """Bytes that one chip sends: per run of the program, and per generated token."""
    parts = []
    for share, unit in ((program.traffic.once, ""), (program.traffic.per_loop_step, " per token")):
        kinds = [f"{kind} {size(t.bytes)} in {t.count}" for kind, t in share.items() if t.count]
        if kinds:
            parts.append(f"{size(_sent(share))}{unit} ({', '.join(kinds)})")
    return "; ".join(parts) or "nothing"


def size(count: float) -> str:
    """Format a number of bytes, such as 1.5 MB, in powers of 1000."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def biggest_buffers(error: str) -> list[str]:
    """Extract the memory that a program needs, and its five largest buffers, from an out-of-memory error of XLA."""
    lines = [line.strip() for line in error.splitlines()]
    found = [line for line in lines if re.search(r"Used .* of .* hbm|exceeds available HBM", line)][:1]
    for i, line in enumerate(lines):
        if re.match(r"\d+\. Size: ", line) and len(found) <= 5:
            names = [re.sub(r"^(Operator: op_name=|Shape: )", "", x) for x in lines[i + 1 : i + 3]]
            found.append(f"{line.split('. ', 1)[1]}, {', '.join(names)}")
    return found or lines[:1]


def step_table(settings: Settings, fit: Fit, chip: Chip) -> str:
    """Lower bound on the time of an RL step as Markdown, with the network traffic of the compiled programs."""
    policy, reward_model = architecture.planned(settings)
    works = {"generation": roofline.generation(policy, settings)}
    if reward_model is not None:
        works["reward"] = roofline.scoring(reward_model, settings)
    works["update"] = roofline.update(policy, settings)
    completion = settings.sampling.max_new_tokens
    sent = {p.name: _sent(p.traffic.once) + completion * _sent(p.traffic.per_loop_step) for p in fit.programs}
    return bounds_table(works, sent, chip)


def bounds_table(works: Mapping[str, roofline.Work], sent: Mapping[str, float], chip: Chip) -> str:
    """Lower bounds on the time of programs and their sum as Markdown. `sent`: bytes that a chip sends per program."""
    header = "| program | compute ms | memory ms | network ms | lower bound ms | limited by |"
    lines = [header, "|---" * 6 + "|"]
    total = 0.0
    for name, work in works.items():
        times = roofline.seconds(work, sent.get(name, 0.0), chip)
        slowest = max(times, key=lambda resource: times[resource])
        total += times[slowest]
        cells = " | ".join(f"{1000 * time:.3g}" for time in times.values())
        lines.append(f"| {name} | {cells} | {1000 * times[slowest]:.3g} | {slowest} |")
    return "\n".join([*lines, f"| sum | | | | {1000 * total:.3g} | |"])


def _sent(traffic: Mapping[str, Traffic]) -> float:
    return sum(t.bytes for t in traffic.values())


def advice(changes: Change | None) -> str:
    """The flags that make a config fit, quoted for a shell; None: the search had no result."""
    if changes is None:
        return "No nearby setting fits; use more chips, or chips with more memory."
    flags = [f"--config.{path}={str(value).replace(' ', '')}" for path, value in changes.items()]
    return f"It fits with {shlex.join(flags)}"


def as_json(fit: Fit, chip: Chip) -> dict[str, Any]:
    """All figures of a check for a JSON file, in bytes per chip."""
    programs = []
    for p in fit.programs:
        moved = {share: {k: t._asdict() for k, t in kinds.items()} for share, kinds in p.traffic._asdict().items()}
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
