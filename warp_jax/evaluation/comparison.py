"""Tables of finished workdirs: their results, methods at equal KL, and fronts against the runs of a baseline."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from warp_jax import files
from warp_jax.evaluation import fronts, statistics, summary
from warp_jax.evaluation.measure import Evaluation
from warp_jax.evaluation.points import Point, read_points

RESAMPLES = 1000
REACHED = 0.8  # share of the shortest curve, so that resamples reach this KL too

COLUMNS = (
    "workdir | seed | SFT reward | final reward | gain (SE) | final gold | final KL | median angle of each iteration | "
    "last front minus the one before, at KL (95 % interval)"
)


class Table(NamedTuple):
    """A table of text."""

    columns: list[str]
    rows: list[list[str]]


def tables(workdirs: Sequence[Path], baselines: Sequence[Path] = (), kl: float | None = None) -> list[Table]:
    """All tables of finished workdirs. kl: where methods are compared (nats); None: 80 % of the shortest curve.

    Raises ValueError if a baseline has another SFT policy, reward, prompts or seed.
    """
    found = [Table(COLUMNS.split(" | "), [read_row(workdir) for workdir in [*workdirs, *baselines]])]
    measured = [workdir for workdir in [*workdirs, *baselines] if (workdir / "front.csv").is_file()]
    curves = {name: curve for workdir in measured for name, curve in read_curves(workdir).items()}
    if curves:
        kl = kl or REACHED * min(curve.kl[:, 0].max() for curve in curves.values())
        found.append(Table(METHOD_COLUMNS.format(f"{kl:.3g}").split(" | "), method_rows(curves, kl)))
    for baseline in baselines:
        rows = [row for workdir in workdirs for row in baseline_rows(workdir, baseline)]
        found.append(Table(BASELINE_COLUMNS.split(" | "), rows))
    return found


def read_row(workdir: Path) -> list[str]:
    """Cells of the row of one workdir."""
    numbers = files.read_json(workdir / "summary.json")
    seed = files.read_json(workdir / "config.json")["seed"]
    paths = workdir.glob("iteration_*/geometry.json")
    geometries = [files.read_json(path) for path in sorted(paths, key=lambda path: int(path.parent.name.split("_")[1]))]
    return [
        workdir.name,
        str(seed),
        *(f"{numbers[name]:.3f}" for name in ("sft_reward", "final_reward")),
        _or_dash(numbers["gain_in_standard_errors"], "{:.1f}"),
        _or_dash(numbers["final_gold_reward"], "{:.3f}"),
        f"{numbers['final_sft_kl']:.2f}",
        " / ".join(_or_dash(_median_angle(geometry), "{:.0f}") for geometry in geometries),
        "; ".join(_difference(d) for entry in numbers["iterations_compared"][-1:] for d in entry["reward_difference"]),
    ]


def _median_angle(geometry: dict[str, Any]) -> float | None:
    """Median angle in degrees over all units and pairs of runs; None with a single run."""
    angles = [angle for unit in geometry["angles_degrees"] for m, row in enumerate(unit) for angle in row[:m]]
    return float(np.median(angles)) if angles else None


def _or_dash(value: float | None, style: str) -> str:
    return "-" if value is None else style.format(value)


def _difference(row: dict[str, Any]) -> str:
    value, low, high = (_or_dash(row[name], "{:+.3f}") for name in ("value", "low", "high"))
    return f"{value} at {row['sft_kl']:.1f} ({low} .. {high})"


BASELINE_COLUMNS = (
    "workdir | baseline | step | KL | reward | front's reward at this KL, minus this reward | KL saved at this reward"
)


def baseline_rows(workdir: Path, baseline: Path) -> list[list[str]]:
    """Rows of the third table, one for each policy that the baseline saved."""
    points, others = read_points(workdir), read_points(baseline)
    ours, theirs = points[0].evaluation, others[0].evaluation
    if not _same_sft(ours, theirs):
        raise ValueError(
            f"baseline: want the same SFT policy, reward, prompts and seed in both; {workdir} and {baseline} differ"
        )
    front = summary.front_members(points, max(p.iteration for p in points))
    policies = [p for p in others if p.stage == "policy"]
    resamples = statistics.resample(ours.clusters, RESAMPLES, files.read_json(workdir / "config.json")["seed"])
    return [
        [
            workdir.name,
            baseline.name,
            str(row["step"]),
            f"{row['sft_kl']:.2f}",
            f"{row['reward']:.3f}",
            _interval(row, "reward_above", "{:+.3f}"),
            _interval(row, "kl_saved", "{:+.0%}"),
        ]
        for row in summary.front_against_policies(front, policies, resamples)
    ]


METHOD_COLUMNS = (
    "method | largest KL | reward at KL {0} | minus the first | gold at KL {0} | gold minus the first | "
    "area under the reward, above SFT's, to KL {0}"
)


class Curve(NamedTuple):
    """A method: its K policies by rising KL, with means over R resamples of the prompts (the first: no resample)."""

    sft: Evaluation  # of its workdir; methods are paired if it is the same
    kl: np.ndarray  # [K, 1 + R], nats
    reward: np.ndarray  # [K, 1 + R]
    gold: np.ndarray  # [K, 1 + R]
    num_clusters: int


def read_curves(workdir: Path) -> dict[str, Curve]:
    """The curves of one workdir by name."""
    points = read_points(workdir)
    found = {workdir.name: summary.front_members(points, max(p.iteration for p in points))}
    policies = [point for point in points if point.stage == "policy"]
    if len({(point.iteration, point.run) for point in policies}) == 1:
        found[f"{workdir.name}: its run"] = [points[0], *policies]
    if (workdir / "best_of_n" / "front.csv").is_file():
        found[f"{workdir.name}: best of N"] = read_points(workdir / "best_of_n")
    sft = points[0].evaluation
    resamples = statistics.resample(sft.clusters, RESAMPLES, 0)  # equal ones for equal prompts

    def means(name: str, members: list[Point]) -> np.ndarray:
        return resamples.means(np.stack([getattr(point.evaluation, name) for point in members]))

    def curve(members: list[Point]) -> Curve:
        kl, reward, gold = (means(name, members) for name in ("sft_kl", "reward", "gold_reward"))
        return Curve(sft, kl, reward, gold, resamples.num_clusters)

    return {name: curve(members) for name, members in found.items()}


def method_rows(curves: dict[str, Curve], kl: float) -> list[list[str]]:
    """Rows of the table of methods."""
    first, *_ = curves.values()
    rows = []
    for name, curve in curves.items():
        cells = [name, f"{curve.kl[:, 0].max():.2f}"]
        for column in ("reward", "gold"):
            at, other = (fronts.along_curve(c.kl, getattr(c, column), kl) for c in (curve, first))
            is_paired = curve is not first and _same_sft(curve.sft, first.sft)
            cells += [_estimate(at, curve), _estimate(at - other, curve, "{:+.4g}") if is_paired else "-"]
        rows.append([*cells, _estimate(fronts.area(curve.kl, curve.reward, kl), curve)])
    return rows


def _estimate(values: np.ndarray, curve: Curve, style: str = "{:.4g}") -> str:
    """A value and its 95 % interval; "-" if the curve does not reach it, or has no gold. values: [1 + R]."""
    (found,) = statistics.intervals(values[None], curve.num_clusters)
    if np.isnan(found.value):
        return "-"
    return f"{style.format(found.value)} ({style.format(found.low)} .. {style.format(found.high)})"


def _same_sft(ours: Evaluation, theirs: Evaluation) -> bool:
    """True if two workdirs have the same SFT policy, reward, prompts and seed."""
    same_reward = ours.reward.shape == theirs.reward.shape and np.allclose(ours.reward, theirs.reward, atol=1e-4)
    return bool(same_reward and np.array_equal(ours.completion_ids, theirs.completion_ids))


def _interval(row: dict[str, Any], name: str, style: str) -> str:
    if row[name] is None:
        return "not reached"
    value, low, high = (_or_dash(row[name + end], style) for end in ("", "_low", "_high"))
    return f"{value} ({low} .. {high})"
