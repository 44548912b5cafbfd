"""Compare finished workdirs in one Markdown table, for example several seeds, or WARP and its baselines.

  python scripts/compare.py runs/seed0 runs/seed1 runs/seed2
  python scripts/compare.py --baseline=runs/sft_anchor --picture=compared.png runs/warp

The second table has a row for each method, at one KL (--kl) that all of them reach: the last front of each workdir, the
run of a baseline that has only one, and best-of-N of SFT if scripts/best_of_n.py has measured it.

With --baseline, a third table compares the last front of each workdir with every policy that the baseline saved: the
difference of reward at equal KL, and the KL saved at equal reward (95 % bootstrap intervals over prompts). Both
workdirs need the same SFT policy, reward, prompts and seed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from absl import flags
from etils import epy

from warp_jax import cli, files

with epy.lazy_imports():  # at their first use: --help does not wait for JAX
    import matplotlib

    from warp_jax import settings as typed
    from warp_jax.evaluation import columns, fronts, plots, report, statistics, summary

if TYPE_CHECKING:  # lazy imports have modules only
    from warp_jax.evaluation.measure import Evaluation
    from warp_jax.evaluation.points import Point

_BASELINE = flags.DEFINE_string("baseline", "", "Finished workdir of a baseline, compared with the last fronts.")
_PICTURE = flags.DEFINE_string("picture", "", "Path of a PNG to write: the fronts of one workdir, and the baseline.")
_KL = flags.DEFINE_float("kl", None, "KL (nats) at which methods are compared; default: 80 % of the shortest curve.", 0)
RESAMPLES = 1000
REACHED = 0.8  # share of the shortest curve, so that resamples reach this KL too

COLUMNS = (
    "workdir | seed | SFT reward | final reward | gain (SE) | final gold | final KL | median angle of each iteration | "
    "last front minus the one before, at KL (95 % interval)"
)


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
    """Rows of the second table, one for each policy that the baseline saved."""
    points, others = report.read_points(workdir), report.read_points(baseline)
    ours, theirs = points[0].evaluation, others[0].evaluation
    if not _same_sft(ours, theirs):
        cli.fail(
            f"--baseline: want the same SFT policy, reward, prompts and seed in both; {workdir} and {baseline} differ"
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
    "method | largest KL | reward at KL {0} | minus the first | gold at KL {0} | minus the first | "
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
    points = report.read_points(workdir)
    found = {workdir.name: summary.front_members(points, max(p.iteration for p in points))}
    policies = [point for point in points if point.stage == "policy"]
    if len({(point.iteration, point.run) for point in policies}) == 1:
        found[f"{workdir.name}: its run"] = [points[0], *policies]
    if (workdir / "best_of_n" / "front.csv").is_file():
        found[f"{workdir.name}: best of N"] = report.read_points(workdir / "best_of_n")
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


def print_table(columns: str, rows: list[list[str]]) -> None:
    """Print a Markdown table."""
    print(f"| {columns} |\n|{'---|' * (columns.count('|') + 1)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def main(argv: list[str]) -> None:
    """Check the workdirs, print the tables and draw the picture."""
    try:
        workdirs = list(dict.fromkeys(map(files.as_path, argv[1:])))  # runs/x/warp runs/x/*: the first row is warp's
        baselines = [files.as_path(_BASELINE.value)] if _BASELINE.value else []
    except ValueError as error:
        cli.fail(str(error))
    unfinished = [str(path) for path in [*workdirs, *baselines] if not (path / "summary.json").is_file()]
    if unfinished or not workdirs:
        cli.fail(f"want finished workdirs; no summary.json in: {', '.join(unfinished) or '(no workdir given)'}")
    if _PICTURE.value and not (baselines and len(workdirs) == 1):
        cli.fail("--picture: want --baseline and exactly one workdir")
    try:
        _compare(workdirs, baselines)
    except ValueError as error:  # a broken JSON file, for example
        cli.fail(error)


def _compare(workdirs: list[Path], baselines: list[Path]) -> None:
    print_table(COLUMNS, [read_row(workdir) for workdir in [*workdirs, *baselines]])
    measured = [workdir for workdir in [*workdirs, *baselines] if (workdir / "front.csv").is_file()]
    curves = {name: curve for workdir in measured for name, curve in read_curves(workdir).items()}
    if curves:
        kl = _KL.value or REACHED * min(curve.kl[:, 0].max() for curve in curves.values())
        print()
        print_table(METHOD_COLUMNS.format(f"{kl:.3g}"), method_rows(curves, kl))
    for baseline in baselines:
        print()
        print_table(BASELINE_COLUMNS, [row for workdir in workdirs for row in baseline_rows(workdir, baseline)])
    if _PICTURE.value:
        matplotlib.use("Agg")
        front, trajectory = map(_rows, (*workdirs, *baselines))
        files.write_bytes(Path(_PICTURE.value), plots.draw_fronts(front, trajectory))


def _rows(workdir: Path) -> list[dict[str, Any]]:
    settings = typed.from_saved(files.read_json(workdir / "config.json"))
    return columns.as_rows(report.read_points(workdir), settings.evaluation)


if __name__ == "__main__":
    cli.run(main, required=(), example="runs/seed0 runs/seed1", arguments=True)
