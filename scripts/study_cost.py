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
from speed import sides
from speed.protocol import Work, parse_shape

from warp_jax import cli, files

with epy.lazy_imports():  # at its first use: --help does not wait for it
    from scipy import optimize

OUT = flags.DEFINE_string("out", None, "CSV file for the points.")
REPEATS = flags.DEFINE_integer("repeats", 3, "Runs of each point; the median counts.", lower_bound=1)
MAX_LOAD = flags.DEFINE_float("max_load", 0.2, "Cores that other processes may use; a run with more is repeated.")
STAGES = flags.DEFINE_list("stages", ["decode", "update", "job"], "What to measure: decode, update, job.")
ROOT = Path(__file__).parents[1]

SIZES = {  # fields of Work
    "135M": {},
    "81M": {"layers": 15},
    "23M": {"layers": 10, "width": 288, "heads": 4, "kv_heads": 2, "mlp": 768, "vocab": 49152},
}
SHAPES = {
    "decode": ("4x32+32", "16x32+64", "16x32+128", "64x32+64"),
    "update": ("4x32+64", "16x8+24", "16x32+64", "16x32+96"),
}
STEPS = 40  # of each run
JOBS = [(1, 1), (2, 1), (4, 1), (2, 2), (1, 3)]  # M runs, I iterations


def weights(work: Work) -> tuple[int, int]:
    """Weights in the matrix products of all layers, and of the head."""
    head = work.sizes[5]
    attention = work.width * head * 2 * (work.heads + work.kv_heads)
    return work.layers * (attention + 3 * work.width * work.mlp), work.vocab * work.width


def work_of(stage: str, size: str, shape: str) -> Work:
    """The work of a stage, with two completions of each prompt."""
    batch, prompt, shortest, longest = parse_shape(shape) or (0, 0, 0, 0)
    return Work(stage, batch, prompt, shortest, longest, **SIZES[size])


def costs(work: Work) -> dict[str, float]:
    """TFLOP of products, GB of weights that are read, and of the cache of keys and values.

    decode: each prompt once, each completion token once; each step reads all weights and all columns of the cache.
    update: of a token, the forward pass of policy and anchor takes 2 FLOP a weight each, the backward pass 4; the head
    sees completions only.
    """
    layers, head = weights(work)
    new = work.batch * work.longest
    if work.stage == "decode":
        prompts = work.batch // work.samples * work.prompt
        column = 2 * work.layers * work.kv_heads * work.sizes[5] * work.batch
        return {
            "tflop": 2 * (layers * (prompts + new) + head * new) / 1e12,
            "weights_gb": 4 * (layers + head) * work.longest / 1e9,
            "cache_gb": 4 * column * (work.prompt + work.longest) * work.longest / 1e9,
        }
    tflop = 8 * (layers * (work.batch * work.prompt + new) + head * new) / 1e12
    return {"tflop": tflop, "weights_gb": 4 * (layers + head) / 1e9}


def run_stage(stage: str, size: str, shape: str) -> dict[str, float]:
    """Measure one point of a stage."""
    work = work_of(stage, size, shape)
    with sides.Worker(Path(sys.executable), "with_jax.py", work, ROOT) as worker:
        sides.run_pairs([worker], REPEATS.value, MAX_LOAD.value)
    return costs(work) | _median(worker)


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


def fit(points: list[dict[str, float]]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names of the terms, seconds per unit of each, and the relative error of each point."""
    names = [name for name in points[0] if name != "seconds"]
    terms = np.array([[point[name] for name in names] for point in points])
    seconds = np.array([point["seconds"] for point in points])
    found, _ = optimize.nnls(terms / seconds[:, None], np.ones(len(points)))
    return names, found, terms @ found / seconds - 1


def main(argv: list[str]) -> None:
    """Measure, fit, print and write."""
    del argv
    if unknown := set(STAGES.value) - {*SHAPES, "job"}:
        cli.fail(f"--stages={','.join(sorted(unknown))}: no such stage; want decode, update or job")
    rows = []
    for stage in STAGES.value:
        names = JOBS if stage == "job" else [(size, shape) for size in SIZES for shape in SHAPES[stage]]
        points = [run_job(*name) if stage == "job" else run_stage(stage, *name) for name in names]
        terms, found, errors = fit(points)
        print(stage, "=", " + ".join(f"{x:.4g} s * {name}" for x, name in zip(found, terms, strict=True)))
        sizes = np.abs(errors)
        print(f"  relative error: median {np.median(sizes):.1%}, largest {sizes.max():.1%}", flush=True)
        for name, point, error in zip(names, points, errors, strict=True):
            label = f"M={name[0]} I={name[1]}" if stage == "job" else " ".join(name)
            rows.append({"stage": stage, "point": label, **point, "fit_error": error})
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, *([_cell(row.get(name, "")) for name in columns] for row in rows)]
    files.write_text(Path(OUT.value), "".join(",".join(map(str, line)) + "\n" for line in lines))


def _cell(value: float | str) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    cli.run(main, required=("out",), example="--out=cost.csv")
