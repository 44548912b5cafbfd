"""Print one table over finished workdirs, for example of several seeds or of WARP and its baselines.

python scripts/compare.py runs/seed0 runs/seed1 runs/seed2
"""

import statistics
from pathlib import Path
from typing import Any

from absl import app

from warp_jax import cli, files

COLUMNS = (
    "workdir | seed | SFT reward | final reward | gain (SE) | final gold | final KL | median angle of each iteration | "
    "last front minus the one before, at KL (95 % interval)"
)


def read_row(workdir: Path) -> list[str]:
    """The cells of one workdir."""
    summary = files.read_json(workdir / "summary.json")
    seed = files.read_json(workdir / "config.json")["seed"]
    geometries = [files.read_json(path) for path in _iterations(workdir)]
    return [
        workdir.name,
        str(seed),
        *(f"{summary[name]:.3f}" for name in ("sft_reward", "final_reward")),
        f"{summary['gain_in_standard_errors']:.1f}",
        f"{summary['final_gold_reward']:.3f}",
        f"{summary['final_sft_kl']:.2f}",
        " / ".join(f"{_median_angle(geometry):.0f}" for geometry in geometries),
        "; ".join(_difference(d) for entry in summary["iterations_compared"][-1:] for d in entry["reward_difference"]),
    ]


def _iterations(workdir: Path) -> list[Path]:
    return sorted(workdir.glob("iteration_*/geometry.json"), key=lambda path: int(path.parent.name.split("_")[1]))


def _median_angle(geometry: dict[str, Any]) -> float:
    """Degrees, median over the units and the pairs of runs."""
    return statistics.median(
        angle for unit in geometry["angles_degrees"] for m, row in enumerate(unit) for angle in row[:m]
    )


def _difference(difference: dict[str, float]) -> str:
    return "{value:+.3f} at {sft_kl:.1f} ({low:+.3f} .. {high:+.3f})".format(**difference)


def main(argv: list[str]) -> None:
    """Entry point."""
    workdirs = [Path(name) for name in argv[1:]]
    unfinished = [str(path) for path in workdirs if not (path / "summary.json").is_file()]
    if unfinished or not workdirs:
        cli.fail(f"want finished workdirs; no summary.json in: {', '.join(unfinished) or 'none given'}")
    print(f"| {COLUMNS} |\n|{'---|' * (COLUMNS.count('|') + 1)}")
    for workdir in workdirs:
        print(f"| {' | '.join(read_row(workdir))} |")


if __name__ == "__main__":
    app.run(main)
