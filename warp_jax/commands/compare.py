"""Compare finished workdirs in one Markdown table, for example several seeds, or WARP and its baselines.

  warp-jax compare runs/seed0 runs/seed1 runs/seed2
  warp-jax compare --baseline=runs/sft_anchor --picture=compared.png runs/warp

The second table has a row for each method, at one KL (--kl) that all of them reach: the last front of each workdir, the
run of a baseline that has only one, and best-of-N of SFT if warp-jax best-of-n has measured it.

With --baseline, a third table compares the last front of each workdir with every policy that the baseline saved: the
difference of reward at equal KL, and the KL saved at equal reward (95 % bootstrap intervals over prompts). Both
workdirs need the same SFT policy, reward, prompts and seed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from absl import flags
from etils import epy

from warp_jax import cli, files

with epy.lazy_imports():  # at their first use: --help does not wait for JAX
    import matplotlib

    from warp_jax import settings as typed
    from warp_jax.evaluation import columns, comparison, plots, points

_BASELINE = flags.DEFINE_string("baseline", "", "Finished workdir of a baseline, compared with the last fronts.")
_PICTURE = flags.DEFINE_string("picture", "", "Path of a PNG to write: the fronts of one workdir, and the baseline.")
_KL = flags.DEFINE_float("kl", None, "KL (nats) at which methods are compared; default: 80 % of the shortest curve.", 0)


def print_table(table: comparison.Table) -> None:
    """Print a Markdown table."""
    print(f"| {' | '.join(table.columns)} |\n|{'---|' * len(table.columns)}")
    for row in table.rows:
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
    for number, table in enumerate(comparison.tables(workdirs, baselines, _KL.value)):
        print(end="\n" if number else "")
        print_table(table)
    if _PICTURE.value:
        matplotlib.use("Agg")
        front, trajectory = map(_rows, (*workdirs, *baselines))
        files.write_bytes(Path(_PICTURE.value), plots.draw_fronts(front, trajectory))


def _rows(workdir: Path) -> list[dict[str, Any]]:
    settings = typed.from_saved(files.read_json(workdir / "config.json"))
    return columns.as_rows(points.read_points(workdir), settings.evaluation)


def start() -> None:
    """Parse the flags and run."""
    cli.run(main, required=(), example="runs/seed0 runs/seed1", arguments=True)
