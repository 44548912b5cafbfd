"""Merge checkpoints on disk: policies trained from one init, by SLERP of their task vectors or a related method.

  warp-jax merge --init=sft --policies=run_1,run_2 --etas=0.1,0.3,1.0 --out=merged

writes merged/eta_0.1, merged/eta_0.3 and merged/eta_1, each a safetensors folder that transformers loads, and
merged/merge_report.json with the angles between the policies and what rounding undoes. See docs/merging.md.
"""

import os
import sys
import time
from pathlib import Path

from absl import flags

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # the merge has threads of its own
from warp_jax import cli
from warp_jax.merging import on_disk, rounding
from warp_jax.merging.coefficients import METHODS
from warp_jax.merging.units import UNITS
from warp_jax.storage.weight_files import OUTPUT_DTYPES

INIT = flags.DEFINE_string("init", None, "Folder of the weights where all policies started, e.g. SFT.")
POLICIES = flags.DEFINE_list("policies", [], "Folders of the trained policies (or LoRA adapters), separated by commas.")
OUT = flags.DEFINE_string("out", None, "New folder for the results: one folder eta_X per eta, and merge_report.json.")
ETAS = flags.DEFINE_list("etas", ["1.0"], "LITI rates from init (0) to the merge (1), separated by commas.")
METHOD = flags.DEFINE_enum("method", "slerp", list(METHODS), "Merging method; see docs/merging.md.")
UNIT = flags.DEFINE_enum("unit", "layer", list(UNITS), "The weights that share one angle.")
WEIGHTS = flags.DEFINE_list(
    "weights", [], "slerp: one per policy after the first; karcher, lerp, task_arithmetic: one each."
)
LINES_ALPHA = flags.DEFINE_float(
    "lines_alpha", None, "LiNeS: each eta grows with depth, from this share (0 to 1) of it in the first layer to all."
)
SKIP = flags.DEFINE_string("skip", None, "Regular expression: tensors in whose names it is found are kept from init.")
DTYPE = flags.DEFINE_enum("dtype", None, list(OUTPUT_DTYPES), "Dtype of the result; default: dtype of the policies.")
ROUND = flags.DEFINE_enum(
    "round", "nearest", list(rounding.METHODS), "stochastic keeps small changes in the mean; see docs/merging.md."
)
SEED = flags.DEFINE_integer("seed", 0, "Seed of stochastic rounding.", lower_bound=0)
MEMORY_GB = flags.DEFINE_float("memory_gb", 1.0, "Limit for weights in memory; the program itself takes 0.1 GB more.")


def main(argv: list[str]) -> None:
    """Merge the folders, and print a one-line summary."""
    del argv
    started = time.monotonic()
    out = Path(str(OUT.value))
    try:
        weights = cli.numbers(WEIGHTS) or None
        settings = on_disk.Settings(
            method=METHOD.value,
            unit=UNIT.value,
            weights=weights,
            etas=cli.numbers(ETAS),
            lines_alpha=LINES_ALPHA.value,
            skip=SKIP.value,
            dtype=DTYPE.value,
            memory_gb=MEMORY_GB.value,
            rounding=ROUND.value,
            seed=SEED.value,
        )
        report = on_disk.merge_folders(Path(str(INIT.value)), [Path(p) for p in POLICIES.value], out, settings)
    except (ValueError, OSError) as error:
        cli.fail(error)
    for line in report["warnings"]:
        print(f"warning: {line}", file=sys.stderr)
    if line := on_disk.order_line(report):
        print(line)
    print(f"{on_disk.summary_line(report)} in {time.monotonic() - started:.1f} s: {out}")


def start() -> None:
    """Parse the flags and run."""
    cli.run(
        main,
        required=("init", "policies", "out"),
        example="--init=sft --policies=run_1,run_2 --etas=0.3 --out=merged",
    )
