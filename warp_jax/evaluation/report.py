"""Results of a job: front.csv, front.png, summary.json and report.html (one file that needs no other)."""

import base64
import csv
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from warp_jax import files
from warp_jax.data import batches
from warp_jax.data.tokenizer import Tokenizer
from warp_jax.evaluation import columns, plots, summary
from warp_jax.evaluation.measure import load_evaluation
from warp_jax.evaluation.points import Point, evaluation_name
from warp_jax.settings import Settings
from warp_jax.training import metric_writer
from warp_jax.types import PromptBatch

MAX_DRIFT = 0.05  # share of tokens outside [0.9, 1.1] above which the report warns


def write_report(
    settings: Settings, tokenizer: Tokenizer, eval_prompts: PromptBatch, points: Sequence[Point], workdir: Path
) -> str:
    """Write all files into workdir and return the summary line. points: those of the whole job, SFT first."""
    matplotlib.use("Agg")
    rows = columns.as_rows(points, settings.evaluation)
    files.write_text(workdir / "front.csv", to_csv(rows))
    numbers = summary.summarise(settings, points)
    files.write_json(workdir / "summary.json", numbers)
    front = plots.draw_fronts(rows)
    files.write_bytes(workdir / "front.png", front)
    geometries = [
        files.read_json(workdir / f"iteration_{i}" / "geometry.json")
        for i in range(1, settings.warp.num_iterations + 1)
    ]
    angles = _image(plots.draw_angles(geometries)) if settings.warp.num_runs > 1 else "<p>There is only one run.</p>"
    samples = _samples_table(settings, tokenizer, eval_prompts, points)
    sections = [
        ("Reward against KL to SFT", _image(front) + _FRONT_TEXT),
        ("Other measures against KL to SFT", _image(plots.draw_measures(rows)) + _MEASURES_TEXT),
        ("Reward and KL to SFT during training", _image(plots.draw_trajectories(rows)) + _runs_table(numbers)),
        ("Angles between the task vectors of the runs", angles),
        ("Summary", f"<p>{html.escape(summary.one_line(numbers))}</p>" + _comparison_tables(numbers)),
        ("Drift between sampler and update", drift_text(drift(settings, workdir))),
        ("Completions of SFT and of the final merged policy", samples),
        ("All evaluated policies (front.csv)", _table(rows)),
        ("Config", f"<pre>{html.escape(json.dumps(settings.as_json(), indent=2))}</pre>"),
    ]
    body = "".join(f"<h2>{title}</h2>{content}" for title, content in sections)
    files.write_text(workdir / "report.html", _PAGE.format(body=body))
    return f"{summary.one_line(numbers)}; report: {workdir / 'report.html'}"


def read_points(workdir: Path) -> list[Point]:
    """Read the points of a finished workdir from its front.csv and evaluations/."""
    points = []
    for row in csv.DictReader((workdir / "front.csv").read_text().splitlines()):
        numbers = int(row["iteration"]), int(row["run"]), float(row["eta"]), int(row["step"])
        path = workdir / "evaluations" / f"{evaluation_name(row['stage'], *numbers)}.npz"
        points.append(Point(row["stage"], *numbers, load_evaluation(path)))
    return points


def to_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Format rows as comma-separated text with a header line."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _samples_table(settings: Settings, tokenizer: Tokenizer, eval_prompts: PromptBatch, points: Sequence[Point]) -> str:
    """Completions of the same prompts by SFT and by the final merged policy."""
    chosen = np.linspace(0, len(eval_prompts.example_ids) - 1, settings.report.num_samples).astype(int)
    shown = batches.take(eval_prompts, chosen)
    prompts = np.asarray(shown.prompt_ids), np.asarray(shown.prompt_mask)
    rows: list[dict[str, Any]] = [{"prompt": text} for text in tokenizer.decode(*prompts)]
    (final,) = summary.select(points, "merged", settings.warp.num_iterations)
    for name, evaluation in (("SFT", points[0].evaluation), ("final merged policy", final.evaluation)):
        completions = evaluation.completion_ids[chosen], evaluation.completion_mask[chosen]
        _, texts = tokenizer.decode_answers(*prompts, *completions)
        for row, text, reward in zip(rows, texts, evaluation.reward[chosen], strict=True):
            row[name], row[f"{name} reward"] = text, float(reward)
    return _table(rows)


def drift(settings: Settings, workdir: Path) -> list[dict[str, Any]]:
    """Mean of each drift metric over the steps of each run; runs of earlier versions have no such metrics."""
    rows = []
    for iteration in range(1, settings.warp.num_iterations + 1):
        for run in range(1, settings.warp.num_runs + 1):
            metrics = metric_writer.read_rows(workdir / f"iteration_{iteration}" / f"run_{run}" / "metrics.jsonl")
            steps = [row for row in metrics if "drift/outside" in row]
            names = [name for name in steps[0] if name.startswith("drift/")] if steps else []
            means = {name.removeprefix("drift/"): float(np.mean([step[name] for step in steps])) for name in names}
            rows += [{"iteration": iteration, "run": run, **means}] if means else []
    return rows


def drift_text(rows: Sequence[dict[str, Any]]) -> str:
    """The table of `drift`, and a warning if a run has more than MAX_DRIFT."""
    high = [row for row in rows if row["outside"] > MAX_DRIFT]
    warning = (
        f"<p><b>Warning:</b> in {len(high)} of {len(rows)} runs, more than {MAX_DRIFT:.0%} of the tokens were sampled "
        "with a probability that differs by over 10 % from that of the update. Set rl.importance_cap (for example to "
        "2.0), or model.dtype to float32.</p>"
    )
    return (warning if high else "") + _DRIFT_TEXT + _table(rows)


def _runs_table(numbers: dict[str, Any]) -> str:
    """Steps of each run, and the settings of its entry in warp.runs."""
    rows = numbers["runs"]
    return _table([{**row, "changes": ", ".join(f"{key} = {x}" for key, x in row["changes"].items())} for row in rows])


def _comparison_tables(numbers: dict[str, Any]) -> str:
    tables = []
    for entry in numbers["iterations_compared"]:
        before, after = entry["iterations"]
        text = f"Reward of the front of iteration {after} minus that of iteration {before}, at equal KL to SFT"
        table = _table(entry["reward_difference"]) or "<p>The two fronts have no KL in common.</p>"
        interval = "low, high: 95 % interval of each row by itself; simultaneous: of all rows together"
        tables.append(f"<p>{text} ({interval}).</p>{table}")
    areas = _GAP_TEXT + _table(numbers["gold_gap_areas"])
    return "".join([*tables, areas, _RUNS_TEXT, _table(numbers["front_against_runs"])])


def _table(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return ""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in rows[0])
    lines = ["".join(f"<td>{_cell(value)}</td>" for value in row.values()) for row in rows]
    return f"<table><tr>{head}</tr>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if np.isnan(value) else f"{value:.4g}"
    return "" if value is None else html.escape(str(value))


def _image(png: bytes) -> str:
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


_FRONT_TEXT = """<p>Each line is the front of one iteration: LITI mixes of SFT (left end) and the merged policy. More
reward at equal KL is better. Bars are standard errors over prompts.</p>"""
_MEASURES_TEXT = """<p>gold_gap: gain in gold reward minus gain in reward, each in standard deviations of SFT; below 0,
the reward has risen more than the gold reward. distinct_n: share of distinct sequences of n tokens. similarity: share
of tokens that two completions of one prompt have in common. pass_at_k: probability that one of k completions passes.
text_loss: nats per token of texts that nothing was trained on (log of the perplexity).</p>"""
_DRIFT_TEXT = """<p>Log-probability of the sampler minus that of the update, in nats per token; 0 without rounding.
mean, std, max: mean, standard deviation and largest absolute value. outside: share of tokens with a probability ratio
outside [0.9, 1.1]. Each is the mean over the steps of a run.</p>"""
_GAP_TEXT = """<p>Area under the gold_gap of each front, standard deviations of SFT times nats (95 % interval).</p>"""
_RUNS_TEXT = """<p>The front of each iteration compared with the runs of that iteration.
reward_above: reward of the front at the run's KL, minus the run's reward.
kl_saved: share of the run's KL that the front saves at the run's reward.
low, high: 95 % interval. Empty cells: the front does not reach this KL or reward, in the data or in more than 5 % of
the resamples.</p>"""
_PAGE = """<!doctype html><meta charset="utf-8"><title>WARP report</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>body{{font:15px/1.5 sans-serif;max-width:75em;margin:2em auto;padding:0 1em}}img{{max-width:100%}}
table{{border-collapse:collapse;font-size:13px}}td,th{{border:1px solid #ccc;padding:.2em .5em;text-align:left}}
pre{{background:#f6f6f6;padding:1em;overflow:auto}}</style><h1>WARP report</h1>{body}
"""
