"""Fit what a stage of training costs on this machine, against batch, length and model size; and a job, against M and I.

  python scripts/study_cost.py --out=docs/results/cost.csv

A stage's seconds are fitted as TFLOP of matrix products / speed + GB that it reads / bandwidth, without negative terms,
to the smallest relative error. Its products and reads are counted from the sizes. A job of
configs/tiny.py is fitted as fixed + I * per iteration + M * I * per run. Prints the fits, and the error of each point;
other work on the machine spoils them.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
from absl import flags
from etils import epy
from speed import cost_model, sides

from warp_jax import cli, files

with epy.lazy_imports():  # at its first use: --help does not wait for JAX
    from warp_jax.evaluation import columns

OUT = flags.DEFINE_string("out", None, "CSV file for the points.")
REPEATS = flags.DEFINE_integer("repeats", 3, "Runs of each point; the median counts.", lower_bound=1)
MAX_LOAD = flags.DEFINE_float("max_load", 0.2, "Cores that other processes may use; a run with more is repeated.")
STAGES = flags.DEFINE_list("stages", ["decode", "update", "job"], "What to measure: decode, update, job.")
ROOT = Path(__file__).parents[1]

SHAPES = {
    "decode": ("4x32+32", "16x32+64", "16x32+128", "64x32+64"),
    "update": ("4x32+64", "16x8+24", "16x32+64", "16x32+96"),
}
STEPS = 40  # of each run
JOBS = [(1, 1), (2, 1), (4, 1), (2, 2), (1, 3)]  # M runs, I iterations


def run_stage(stage: str, size: str, shape: str) -> dict[str, float]:
    """Measure one point of a stage."""
    work = cost_model.work_of(stage, size, shape)
    with sides.Worker(Path(sys.executable), "with_jax.py", work, ROOT) as worker:
        sides.run_pairs([worker], REPEATS.value, MAX_LOAD.value)
    return cost_model.costs(work) | _median(worker)


def run_job(num_runs: int, num_iterations: int) -> dict[str, float]:
    """Measure a whole job with compiled programs at hand, as after its first start."""
    with tempfile.TemporaryDirectory() as cache:
        numbers = [f"--config.warp.num_runs={num_runs}", f"--config.warp.num_iterations={num_iterations}"]
        numbers.append(f"--config.warp.steps_per_iteration={(STEPS,) * num_iterations}")
        options = ["--config=configs/tiny.py", f"--compilation_cache={cache}", *numbers]
        with sides.Command(ROOT, ["-m", "warp_jax.main", *options, "--workdir={workdir}"]) as command:
            sides.run_pairs([command], REPEATS.value, MAX_LOAD.value)
    return {"fixed": 1, "iterations": num_iterations, "runs": num_runs * num_iterations} | _median(command)


def _median(side: sides.Side) -> dict[str, float]:
    return {"seconds": statistics.median(run["seconds"] for run in side.runs)}


def main(argv: list[str]) -> None:
    """Measure, fit, print and write."""
    del argv
    if unknown := set(STAGES.value) - {*SHAPES, "job"}:
        cli.fail(f"--stages={','.join(sorted(unknown))}: no such stage; want decode, update or job")
    rows = []
    for stage in STAGES.value:
        names = JOBS if stage == "job" else [(size, shape) for size in cost_model.SIZES for shape in SHAPES[stage]]
        points = [run_job(*name) if stage == "job" else run_stage(stage, *name) for name in names]
        terms, found, errors = cost_model.fit(points)
        print(stage, "=", " + ".join(f"{x:.4g} s * {name}" for x, name in zip(found, terms, strict=True)))
        sizes = np.abs(errors)
        print(f"  relative error: median {np.median(sizes):.1%}, largest {sizes.max():.1%}", flush=True)
        for name, point, error in zip(names, points, errors, strict=True):
            label = f"M={name[0]} I={name[1]}" if stage == "job" else " ".join(name)
            rows.append({"stage": stage, "point": label, **point, "fit_error": error})
    fields = dict.fromkeys(key for row in rows for key in row)
    table = [{name: _cell(row.get(name, "")) for name in fields} for row in rows]
    files.write_text(Path(OUT.value), columns.to_csv(table))


def _cell(value: float | str) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    cli.run(main, required=("out",), example="--out=cost.csv")
