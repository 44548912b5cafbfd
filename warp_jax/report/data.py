"""The data of the page: one JSON value for each workdir, gathered from its files and points. Nothing is written."""

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from warp_jax import files
from warp_jax.data import batches
from warp_jax.data.tokenizer import Tokenizer
from warp_jax.evaluation import columns, statistics, summary
from warp_jax.evaluation.points import Point, evaluation_name, kept_steps, last_step
from warp_jax.settings import Settings
from warp_jax.training import metric_writer
from warp_jax.types import PromptBatch

MAX_STEPS = 300  # points of a learning curve; longer runs show means of equally many steps
NUM_BUDGETS = 101  # KL budgets, from 0 to just above the largest KL of a front
MAX_DRIFT = 0.05  # share of tokens outside [0.9, 1.1] above which the report warns


class Results(NamedTuple):
    """The results of a workdir."""

    settings: Settings
    workdir: Path
    points: Sequence[Point]  # SFT first
    rows: list[dict[str, Any]]  # of front.csv, one for each point
    numbers: dict[str, Any] | None  # of summary.json; None: the job is not finished


class HeldOut(NamedTuple):
    """The held-out prompts of a workdir, as `Examiner.eval_prompts` has them."""

    tokenizer: Tokenizer
    prompts: PromptBatch


class RunLog(NamedTuple):
    """The metrics of one run."""

    iteration: int
    run: int
    rows: list[dict[str, Any]]  # of metrics.jsonl, one for each step


def make_results(
    settings: Settings, workdir: Path, points: Sequence[Point], numbers: dict[str, Any] | None = None
) -> Results:
    """Compute the rows of points. numbers: those of `summary.summarise`; without them, rows have the first columns."""
    if numbers is None:
        return Results(settings, workdir, points, [columns.summary_row(point) for point in points], None)
    return Results(settings, workdir, points, columns.as_rows(points, settings.evaluation), numbers)


def gather(results: Results, held_out: HeldOut | str, progress: Mapping[str, Any]) -> dict[str, Any]:
    """All that the page shows of a workdir, as JSON without nan.

    Args:
        results: its results up to now.
        held_out: its held-out prompts, or the reason why they cannot be shown.
        progress: the parts of the job and what is left of them, from `status.progress`.
    """
    settings, workdir, points, rows, numbers = results
    clusters, logs = points[0].evaluation.clusters, read_metrics(settings, workdir)
    shown = [{**row, "export": export_command(settings, workdir, p)} for row, p in zip(rows, points, strict=True)]
    gathered = {
        "name": workdir.name,
        "summary": summary.one_line(numbers) if numbers else "",
        "progress": progress,
        "half_width": statistics.half_width(len(np.unique(clusters))),
        "completions": len(clusters),
        "rows": shown,
        "curves": curves(logs),
        "geometry": geometry(settings, workdir),
        "budgets": budgets(settings, points),
        "kl_budget": settings.front.kl_budget,
        "answers": held_out if isinstance(held_out, str) else answers(settings, points, held_out),
        "tables": _tables(numbers) if numbers else [],
        "drift": drift(logs),
        "starts": [_flat(row) for row in metric_writer.read_rows(workdir / "starts.jsonl")],
        "config": settings.as_json(),
    }
    found: dict[str, Any] = _without_nan(gathered)
    return found


def export_command(settings: Settings, workdir: Path, point: Point) -> str | None:
    """The command that exports a point to a Hugging Face folder; None if its weights are not saved as a stage."""
    stage, iteration, run, eta, step, _ = point
    of_run = f"iteration_{iteration}/run_{run}"
    if eta == 0:
        name = "sft"
    elif stage == "policy" and step == last_step(settings, workdir, iteration, run):
        name = of_run
    elif stage == "policy" and step in kept_steps(settings, step):
        name = f"{of_run}/step_{step}"
    elif stage == "liti" and iteration == settings.warp.num_iterations:
        name = f"liti:{eta:g}"
    elif stage == "merged" or (stage == "liti" and eta == 1):
        name = f"iteration_{iteration}/merged"
    elif stage in ("anchor", "average") and eta == 1:
        name = f"{of_run}/{stage}"
    else:
        return None
    out = f"exported/{evaluation_name(*point[:5])}"
    return shlex.join(["warp-jax", "export", f"--workdir={workdir}", f"--stage={name}", f"--out={out}"])


def read_metrics(settings: Settings, workdir: Path) -> list[RunLog]:
    """The metrics of each run that has some."""
    warp, found = settings.warp, []
    for iteration in range(1, warp.num_iterations + 1):
        for run in range(1, warp.num_runs + 1):
            rows = metric_writer.read_rows(workdir / f"iteration_{iteration}" / f"run_{run}" / metric_writer.FILE)
            found += [RunLog(iteration, run, rows)] if rows else []
    return found


def curves(logs: Sequence[RunLog]) -> list[dict[str, Any]]:
    """The metrics of each run, thinned to at most MAX_STEPS points: means over `every` steps, at the last of them."""
    found = []
    for iteration, run, rows in logs:
        every = math.ceil(len(rows) / MAX_STEPS)
        groups = [rows[first : first + every] for first in range(0, len(rows), every)]
        values = {
            name: [_rounded(np.mean([row.get(name, math.nan) for row in group])) for group in groups]
            for name in sorted({name for row in rows for name in row} - {"step"})
        }
        steps = [group[-1]["step"] for group in groups]
        found.append({"iteration": iteration, "run": run, "every": every, "steps": steps, "values": values})
    return found


def geometry(settings: Settings, workdir: Path) -> list[dict[str, Any]]:
    """Angles in degrees [pairs of runs, units] and norms of task vectors [runs, units] of each merge."""
    found = []
    for iteration in range(1, settings.warp.num_iterations + 1):
        path = workdir / f"iteration_{iteration}" / "geometry.json"
        saved = files.read_json(path) if path.exists() else {}
        if "norms" not in saved:
            continue
        first, second = np.triu_indices(len(saved["norms"][0]), k=1)
        angles = np.array(saved["angles_degrees"])[:, first, second].T
        found.append(
            {
                "iteration": iteration,
                "units": saved["units"],
                "pairs": [f"{m + 1} and {n + 1}" for m, n in zip(first, second, strict=True)],
                "angles": angles.tolist(),
                "norms": np.array(saved["norms"]).T.tolist(),
            }
        )
    return found


def budgets(settings: Settings, points: Sequence[Point]) -> dict[str, list[dict[str, Any]]]:
    """The best eta of each iteration's front under each of many KL budgets, as summary.json has it for one budget."""
    found = {}
    for iteration in range(1, settings.warp.num_iterations + 1):
        if not (front := summary.front_members(points, iteration)[1:]):
            continue
        largest = max(float(point.evaluation.sft_kl.mean()) for point in front)
        grid = np.linspace(0, 1.05 * largest, NUM_BUDGETS).tolist()
        grid = sorted({*grid, *[settings.front.kl_budget] * (settings.front.kl_budget > 0)})
        best = summary.best_etas(settings, front, grid)
        found[str(iteration)] = [{"budget": kl, **(row or {})} for kl, row in zip(grid, best, strict=True)]
    return found


def answers(settings: Settings, points: Sequence[Point], held_out: HeldOut) -> dict[str, Any]:
    """Some held-out prompts, and their completions and rewards by SFT and at each eta of the iterations' fronts."""
    tokenizer, prompts = held_out
    chosen = np.linspace(0, len(prompts.example_ids) - 1, settings.report.num_samples).astype(int)
    shown = batches.take(prompts, chosen)
    asked = np.asarray(shown.prompt_ids), np.asarray(shown.prompt_mask)
    found = []
    for point in points:
        if point.stage in ("sft", "liti"):
            measured = point.evaluation
            _, texts = tokenizer.decode_answers(
                *asked, measured.completion_ids[chosen], measured.completion_mask[chosen]
            )
            numbers = {name: getattr(measured, name)[chosen].tolist() for name in ("reward", "gold_reward", "sft_kl")}
            found.append({"iteration": point.iteration, "eta": point.eta, "texts": texts, **numbers})
    return {"prompts": tokenizer.decode(*asked), "fronts": found}


def drift(logs: Sequence[RunLog]) -> list[dict[str, Any]]:
    """Mean of each drift metric over the steps of each run; runs of earlier versions have no such metrics."""
    found = []
    for iteration, run, rows in logs:
        steps = [row for row in rows if "drift/outside" in row]
        names = [name for name in steps[0] if name.startswith("drift/")] if steps else []
        means = {name.removeprefix("drift/"): float(np.mean([step[name] for step in steps])) for name in names}
        found += [{"iteration": iteration, "run": run, **means, "high": means["outside"] > MAX_DRIFT}] if means else []
    return found


def _tables(numbers: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tables of summary.json, with titles and notes."""
    runs = [{**row, "changes": ", ".join(f"{k} = {x}" for k, x in row["changes"].items())} for row in numbers["runs"]]
    found = [("Runs", _RUNS, runs)]
    for entry in numbers["iterations_compared"]:
        before, after = entry["iterations"]
        title = f"Reward of the front of iteration {after} minus that of iteration {before}, at equal KL to SFT"
        found.append((title, _DIFFERENCES, entry["reward_difference"]))
    found.append(("The front of each iteration compared with its runs", _AGAINST, numbers["front_against_runs"]))
    found.append(("Area under the gold gap of each front", _AREAS, numbers["gold_gap_areas"]))
    return [{"title": title, "note": note, "rows": rows} for title, note, rows in found]


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """A start with its versions, and lists as text."""
    flat = {**{k: x for k, x in row.items() if k != "versions"}, **row.get("versions", {})}
    return {name: ", ".join(map(str, value)) if isinstance(value, list) else value for name, value in flat.items()}


def _rounded(value: Any) -> float:
    return float(f"{value:.5g}")


def _without_nan(value: Any) -> Any:
    """A JSON value with None in place of nan and infinity."""
    if isinstance(value, Mapping):
        return {name: _without_nan(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_RUNS = "changes: settings of the run's entry in warp.runs."
_DIFFERENCES = "low, high: 95 % interval of each row by itself; simultaneous: of all rows together."
_AGAINST = """reward_above: reward of the front at the run's KL, minus the run's reward. kl_saved: share of the run's KL
that the front saves at the run's reward. low, high: 95 % interval. Empty cells: the front does not reach this KL or
reward, in the data or in more than 5 % of the resamples."""
_AREAS = "Standard deviations of SFT times nats, with the 95 % interval."
