"""The picture of the fronts, as PNG bytes."""

import io
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
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
