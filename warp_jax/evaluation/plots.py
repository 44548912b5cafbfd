"""Plots of the report, as PNG bytes."""

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

Row = dict[str, Any]  # of front.csv
LABELS = {"reward": "reward", "gold_reward": "gold reward", "sft_kl": "KL to SFT (nats per sequence)"}


def draw_fronts(rows: Sequence[Row], baseline: Sequence[Row] = ()) -> bytes:
    """Plot reward and gold reward against KL to SFT: fronts, runs, and the run of a baseline; rows[0] is SFT."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 5))
    for axis, column in zip(axes, ("reward", "gold_reward"), strict=True):
        for iteration in sorted({row["iteration"] for row in rows if row["stage"] == "liti"}):
            color = f"C{iteration - 1}"
            front = sorted([rows[0], *_select(rows, "liti", iteration)], key=lambda row: row["sft_kl"])
            _errorbar(axis, front, column, marker="o", color=color, label=f"iteration {iteration}: front (LITI)")
            for stage, line in (("anchor", ":"), ("average", "-.")):
                for run in sorted({row["run"] for row in _select(rows, stage, iteration)}):
                    points = [rows[0], *(row for row in _select(rows, stage, iteration) if row["run"] == run)]
                    label = f"iteration {iteration}, run {run}: front of its {stage}"
                    axis.plot(*_columns(points, "sft_kl", column), linestyle=line, color=color, label=label)
            for row in _select(rows, "policy", iteration):
                axis.plot(row["sft_kl"], row[column], marker="x", color=color, alpha=0.6, linestyle="none")
        if baseline:
            trajectory = [baseline[0], *(row for row in baseline if row["stage"] == "policy")]
            _errorbar(axis, trajectory, column, marker="s", color="black", linestyle="--", label="baseline: one run")
        axis.plot([], [], marker="x", color="grey", linestyle="none", label="single runs, one point per evaluation")
        axis.set(xlabel=LABELS["sft_kl"], ylabel=LABELS[column])
        axis.legend()
    return _png(figure)


def draw_measures(rows: Sequence[Row]) -> bytes:
    """Plot each measure of the fronts, other than rewards, against KL to SFT; rows[0] is SFT."""
    known = [name for name in ("gold_gap", "similarity", "text_loss") if np.isfinite(rows[0].get(name, np.nan))]
    passes = [name for name in rows[0] if re.fullmatch(r"pass_at_\d+", name)]
    names = ["distinct_2", *known, *passes[:1], *passes[1:][-1:]]  # passes of 1 and of all completions
    figure, axes = plt.subplots(1, len(names), figsize=(4 * len(names), 3.5), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        for iteration in sorted({row["iteration"] for row in rows if row["stage"] == "liti"}):
            front = sorted([rows[0], *_select(rows, "liti", iteration)], key=lambda row: row["sft_kl"])
            _errorbar(axis, front, name, marker="o", color=f"C{iteration - 1}", label=f"iteration {iteration}")
        axis.set(xlabel=LABELS["sft_kl"], ylabel=name)
    axes[0, 0].legend()
    return _png(figure)


def draw_trajectories(rows: Sequence[Row]) -> bytes:
    """Plot reward and KL to SFT of each run against its training steps."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 4))
    runs = sorted({(row["iteration"], row["run"]) for row in rows if row["stage"] == "policy"})
    for axis, column in zip(axes, ("reward", "sft_kl"), strict=True):
        for iteration, run in runs:
            points = [row for row in _select(rows, "policy", iteration) if row["run"] == run]
            steps, values = _columns(points, "step", column)
            style: dict[str, Any] = {"marker": "o", "color": f"C{iteration - 1}", "alpha": run**-0.5}
            axis.plot(steps, values, label=f"iteration {iteration}, run {run}", **style)
        axis.set(xlabel="training step", ylabel=LABELS[column])
        axis.legend()
    return _png(figure)


def draw_angles(geometries: Sequence[dict[str, Any]]) -> bytes:
    """Plot the angle between the task vectors of every two runs, for each unit and iteration."""
    units = geometries[0]["units"]
    figure, axis = plt.subplots(figsize=(max(6, len(units)), 4))
    for number, geometry in enumerate(geometries, start=1):
        angles = np.array(geometry["angles_degrees"])
        pairs = angles[:, *np.triu_indices(angles.shape[-1], k=1)]
        labels = [f"iteration {number}", *[None] * (pairs.shape[1] - 1)]
        axis.plot(range(len(units)), pairs, marker="o", color=f"C{number - 1}", label=labels)
    axis.axhline(90, color="grey", linewidth=0.8, linestyle="--", label="orthogonal")
    axis.set(xlabel="unit of the merge", ylabel="angle between task vectors (degrees)", ylim=(0, None))
    axis.set_xticks(range(len(units)), units, rotation=60, ha="right")
    axis.legend()
    return _png(figure)


def _select(rows: Sequence[Row], stage: str, iteration: int) -> list[Row]:
    return [row for row in rows if row["stage"] == stage and row["iteration"] == iteration]


def _columns(rows: Sequence[Row], *names: str) -> list[list[Any]]:
    return [[row[name] for row in rows] for name in names]


def _errorbar(axis: Any, rows: Sequence[Row], column: str, **style: Any) -> None:
    """Draw a column, with its standard errors, against KL to SFT."""
    kls, values, errors = ([row.get(name, 0) for row in rows] for name in ("sft_kl", column, f"{column}_se"))
    axis.errorbar(kls, values, yerr=errors, **style)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.tight_layout()
    figure.savefig(buffer, format="png", dpi=100)
    plt.close(figure)
    return buffer.getvalue()
