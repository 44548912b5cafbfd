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
from ml_collections import ConfigDict

from warp_jax import evaluate, files, pareto, plots, prompts
from warp_jax.evaluate import Evaluation
from warp_jax.prepare import Setup
from warp_jax.warp import Point

COMPARED_KLS = 5  # number of KLs at which two fronts are compared


def write_report(config: ConfigDict, setup: Setup, points: Sequence[Point], workdir: Path) -> str:
    """Write all files and return the summary line."""
    matplotlib.use("Agg")
    rows = [as_row(point) for point in points]
    files.write_text(workdir / "front.csv", to_csv(rows))
    summary = summarise(config, points)
    files.write_json(workdir / "summary.json", summary)
    front = plots.draw_fronts(rows)
    files.write_bytes(workdir / "front.png", front)
    geometries = [
        files.read_json(workdir / f"iteration_{i}" / "geometry.json") for i in range(1, config.warp.num_iterations + 1)
    ]
    sections = [
        ("Fronts of reward against KL", _image(front)),
        ("Trajectory of each run", _image(plots.draw_trajectories(rows))),
        ("Angles between the runs", _image(plots.draw_angles(geometries)) if config.warp.num_runs > 1 else "one run"),
        ("Summary", f"<p>{html.escape(summary_line(summary))}</p>" + _comparison_table(summary)),
        ("Samples before and after", _samples_table(config, setup, points)),
        ("All points", _table(rows)),
        ("Config", f"<pre>{html.escape(json.dumps(json.loads(config.to_json()), indent=2))}</pre>"),
    ]
    body = "".join(f"<h2>{title}</h2>{content}" for title, content in sections)
    files.write_text(workdir / "report.html", _PAGE.format(body=body))
    return f"{summary_line(summary)}; report: {workdir / 'report.html'}"


def as_row(point: Point) -> dict[str, Any]:
    """A point as a row of front.csv."""
    fields = point._asdict()
    evaluation = fields.pop("evaluation")
    return {**fields, **evaluate.summary(evaluation)}


def to_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as comma-separated text under a header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def summarise(config: ConfigDict, points: Sequence[Point]) -> dict[str, Any]:
    """The numbers of the summary line, and each iteration's front against the one before, at common KLs."""
    sft, final = points[0], _merged(points, config.warp.num_iterations)
    gain = np.asarray(final.evaluation.reward, np.float64) - sft.evaluation.reward
    front = [p for p in points if p.stage == "liti" and p.iteration == config.warp.num_iterations]
    chosen = None
    if config.front.kl_budget:
        kls, rewards = (
            np.array([m.mean() for m in column]) for column in zip(*map(_kl_and_reward, front), strict=True)
        )
        index = pareto.best_under_budget(kls, rewards, config.front.kl_budget)
        chosen = None if index is None else as_row(front[index])
    return {
        "sft_reward": float(sft.evaluation.reward.mean()),
        "final_reward": float(final.evaluation.reward.mean()),
        "final_gold_reward": _number(final.evaluation.gold_reward.mean()),
        "final_sft_kl": float(final.evaluation.sft_kl.mean()),
        "gain_in_standard_errors": float(gain.mean() / (gain.std(ddof=1) / np.sqrt(len(gain)))),
        "kl_budget": config.front.kl_budget,
        "best_eta_under_budget": chosen,
        "iterations_compared": [
            {"iterations": [i - 1, i], "reward_difference": _compare(config, points, i)}
            for i in range(2, config.warp.num_iterations + 1)
        ],
    }


def summary_line(summary: dict[str, Any]) -> str:
    """One line for people."""
    gold = f", gold {summary['final_gold_reward']:.3f}" if summary["final_gold_reward"] is not None else ""
    line = (
        f"reward {summary['sft_reward']:.3f} (SFT) -> {summary['final_reward']:.3f} "
        f"({summary['gain_in_standard_errors']:+.1f} standard errors{gold}) "
        f"at {summary['final_sft_kl']:.2f} nats from SFT"
    )
    if summary["kl_budget"]:
        best = summary["best_eta_under_budget"]
        chosen = f"eta {best['eta']:g} with reward {best['reward']:.3f}" if best else "no eta"
        line += f"; best under {summary['kl_budget']:g} nats: {chosen}"
    return line


def _compare(config: ConfigDict, points: Sequence[Point], iteration: int) -> list[dict[str, float]]:
    """Front of `iteration` minus the front before it, with 95 % bootstrap intervals over prompts."""
    fronts = []
    for number in (iteration - 1, iteration):
        members = [points[0], *(p for p in points if p.stage == "liti" and p.iteration == number)]
        kls, rewards = zip(*map(_kl_and_reward, members), strict=True)
        fronts.append((np.stack(kls), np.stack(rewards)))
    (kl_a, reward_a), (kl_b, reward_b) = fronts
    at = pareto.common_kls(kl_a.mean(1), reward_a.mean(1), kl_b.mean(1), reward_b.mean(1), COMPARED_KLS)
    found = pareto.compare_fronts(
        kl_a, reward_a, kl_b, reward_b, at=at.tolist(), resamples=config.report.bootstrap_resamples, seed=config.seed
    )
    return [{"sft_kl": c.kl, **c.difference._asdict()} for c in found]


def _number(value: Any) -> float | None:
    """JSON has no nan, which stands for no gold reward."""
    return None if np.isnan(value) else float(value)


def _kl_and_reward(point: Point) -> tuple[np.ndarray, np.ndarray]:
    return point.evaluation.sft_kl, point.evaluation.reward


def _merged(points: Sequence[Point], iteration: int) -> Point:
    return next(p for p in points if p.stage == "merged" and p.iteration == iteration)


def _samples_table(config: ConfigDict, setup: Setup, points: Sequence[Point]) -> str:
    """The same prompts under SFT and under the final merge."""
    chosen = np.linspace(0, config.evaluation.num_prompts - 1, config.report.num_samples).astype(int)
    shown = prompts.take(setup.eval_prompts, chosen)
    texts = setup.tokenizer.decode(np.asarray(shown.prompt_ids), np.asarray(shown.prompt_mask))
    rows: list[dict[str, Any]] = [{"prompt": text} for text in texts]
    ends: dict[str, Evaluation] = {
        "SFT": points[0].evaluation,
        "final merge": _merged(points, config.warp.num_iterations).evaluation,
    }
    for name, evaluation in ends.items():
        texts = setup.tokenizer.decode(evaluation.completion_ids[chosen], evaluation.completion_mask[chosen])
        for row, text, reward in zip(rows, texts, evaluation.reward[chosen], strict=True):
            row[name], row[f"{name} reward"] = text, float(reward)
    return _table(rows)


def _comparison_table(summary: dict[str, Any]) -> str:
    tables = []
    for entry in summary["iterations_compared"]:
        before, after = entry["iterations"]
        title = (
            f"Reward of the front of iteration {after} minus that of iteration {before}, at common KLs (95 % interval)"
        )
        tables.append(f"<p>{title}</p>" + (_table(entry["reward_difference"]) or "<p>no common KL</p>"))
    return "".join(tables)


def _table(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return ""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in rows[0])
    lines = ["".join(f"<td>{_cell(value)}</td>" for value in row.values()) for row in rows]
    return f"<table><tr>{head}</tr>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _cell(value: Any) -> str:
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
