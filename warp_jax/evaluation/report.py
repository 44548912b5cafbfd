"""What a job leaves for people: front.csv, front.png, summary.json and one self-contained report.html."""

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
from warp_jax.evaluation import plots, summary
from warp_jax.evaluation.measure import Evaluation, load_evaluation
from warp_jax.evaluation.points import Point, evaluation_name
from warp_jax.settings import Settings
from warp_jax.types import PromptBatch


def write_report(
    settings: Settings, tokenizer: Tokenizer, eval_prompts: PromptBatch, points: Sequence[Point], workdir: Path
) -> str:
    """Write all files and return the summary line."""
    matplotlib.use("Agg")
    rows = [summary.as_row(point) for point in points]
    files.write_text(workdir / "front.csv", to_csv(rows))
    numbers = summary.summarise(settings, points)
    files.write_json(workdir / "summary.json", numbers)
    front = plots.draw_fronts(rows)
    files.write_bytes(workdir / "front.png", front)
    geometries = [
        files.read_json(workdir / f"iteration_{i}" / "geometry.json")
        for i in range(1, settings.warp.num_iterations + 1)
    ]
    sections = [
        ("Fronts of reward against KL", _image(front)),
        ("Trajectory of each run", _image(plots.draw_trajectories(rows))),
        ("Angles between the runs", _image(plots.draw_angles(geometries)) if settings.warp.num_runs > 1 else "one run"),
        ("Summary", f"<p>{html.escape(summary.one_line(numbers))}</p>" + _comparison_tables(numbers)),
        ("Samples before and after", _samples_table(settings, tokenizer, eval_prompts, points)),
        ("All points", _table(rows)),
        ("Config", f"<pre>{html.escape(json.dumps(settings.as_json(), indent=2))}</pre>"),
    ]
    body = "".join(f"<h2>{title}</h2>{content}" for title, content in sections)
    files.write_text(workdir / "report.html", _PAGE.format(body=body))
    return f"{summary.one_line(numbers)}; report: {workdir / 'report.html'}"


def read_points(workdir: Path) -> list[Point]:
    """The points of a finished workdir, from its front.csv and evaluations."""
    points = []
    for row in csv.DictReader((workdir / "front.csv").read_text().splitlines()):
        numbers = int(row["iteration"]), int(row["run"]), float(row["eta"]), int(row["step"])
        path = workdir / "evaluations" / f"{evaluation_name(row['stage'], *numbers)}.npz"
        points.append(Point(row["stage"], *numbers, load_evaluation(path)))
    return points


def to_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as comma-separated text under a header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _samples_table(settings: Settings, tokenizer: Tokenizer, eval_prompts: PromptBatch, points: Sequence[Point]) -> str:
    """The same prompts under SFT and under the final merge."""
    chosen = np.linspace(0, settings.evaluation.num_prompts - 1, settings.report.num_samples).astype(int)
    shown = batches.take(eval_prompts, chosen)
    asked = np.asarray(shown.prompt_ids), np.asarray(shown.prompt_mask)
    texts = tokenizer.decode(*asked)
    rows: list[dict[str, Any]] = [{"prompt": text} for text in texts]
    ends: dict[str, Evaluation] = {
        "SFT": points[0].evaluation,
        "final merge": summary.merged_point(points, settings.warp.num_iterations).evaluation,
    }
    for name, evaluation in ends.items():
        _, texts = tokenizer.decode_answers(
            *asked, evaluation.completion_ids[chosen], evaluation.completion_mask[chosen]
        )
        for row, text, reward in zip(rows, texts, evaluation.reward[chosen], strict=True):
            row[name], row[f"{name} reward"] = text, float(reward)
    return _table(rows)


def _comparison_tables(numbers: dict[str, Any]) -> str:
    tables = []
    for entry in numbers["iterations_compared"]:
        before, after = entry["iterations"]
        title = (
            f"Reward of the front of iteration {after} minus that of iteration {before}, at common KLs (95 % interval)"
        )
        tables.append(f"<p>{title}</p>" + (_table(entry["reward_difference"]) or "<p>no common KL</p>"))
    title = (
        "Each iteration's front against its own runs: its reward at the run's KL minus the run's reward, and the share "
        "of KL it saves at the run's reward (95 % intervals); empty where the front does not reach"
    )
    return "".join([*tables, f"<p>{title}</p>", _table(numbers["front_against_runs"])])


def _table(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return ""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in rows[0])
    lines = ["".join(f"<td>{_cell(value)}</td>" for value in row.values()) for row in rows]
    return f"<table><tr>{head}</tr>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return "" if np.isnan(value) else f"{value:.4g}"
    return html.escape(str(value))


def _image(png: bytes) -> str:
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


_PAGE = """<!doctype html><meta charset="utf-8"><title>WARP report</title>
<style>body{{font:15px/1.5 sans-serif;max-width:75em;margin:2em auto;padding:0 1em}}img{{max-width:100%}}
table{{border-collapse:collapse;font-size:13px}}td,th{{border:1px solid #ccc;padding:.2em .5em;text-align:left}}
pre{{background:#f6f6f6;padding:1em;overflow:auto}}</style><h1>WARP report</h1>{body}
"""
