"""Benchmark the stages of training against transformers and torch, or against another checkout of warp_jax.

  python scripts/benchmark.py --out=/tmp/speed.json
  python scripts/benchmark.py --stages=update --shapes=16x32+64 --against=../warp_jax_before --repeats=7

Each program runs in a process of its own, on the same random weights of a model like SmolLM2-135M in float32, with the
same number of tokens. They take turns; a ratio is the median over the pairs. Prints a table with the speed of the
machine, and writes the seconds of each run to --out. Needs `pip install torch transformers` for --against=torch.
"""

import dataclasses
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from warp_jax import cli, files

STAGES = flags.DEFINE_list("stages", ["decode", "score", "update", "rl_step"], "Stages to run.")
SHAPES = flags.DEFINE_list("shapes", ["16x32+64"], "Sizes: sequences x tokens of the prompt + new tokens.")
AGAINST = flags.DEFINE_string("against", "torch", "'torch', or the folder of another checkout of warp_jax.")
REPEATS = flags.DEFINE_integer("repeats", 5, "Pairs of runs.", lower_bound=1)
TRAINED = flags.DEFINE_integer("trained_layers", 0, "Train the last so many layers; 0 = all weights.", lower_bound=0)
OUT = flags.DEFINE_string("out", "", "JSON file for the results.")
MAX_LOAD = flags.DEFINE_float("max_load", 0.2, "Refuse to start if other processes use more than so many cores.")
ROOT = Path(__file__).parents[1]
SHAPE = re.compile(r"([1-9]\d*)x([1-9]\d*)\+([1-9]\d*)")


@dataclasses.dataclass
class Worker:
    """A process that runs one stage whenever it is asked to."""

    process: subprocess.Popen[str]
    seconds: list[float] = dataclasses.field(default_factory=list)
    peak_bytes: int = 0

    @classmethod
    def start(cls, program: str, folder: Path, stage: str, shape: str) -> "Worker":
        """Start a worker and wait until it has compiled."""
        batch, prompt, new = map(int, SHAPE.fullmatch(shape).groups())  # type: ignore[union-attr]  # checked in main
        work: dict[str, Any] = {"stage": stage, "batch": batch, "prompt": prompt, "new": new}
        work |= {"samples": 2 if batch > 1 else 1, "trained_layers": TRAINED.value}
        command = [sys.executable, str(ROOT / "scripts" / "speed" / program), json.dumps(work)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        worker = cls(subprocess.Popen(command, text=True, env={**os.environ, "PYTHONPATH": str(folder)}, **pipes))
        worker._read()
        return worker

    def run(self) -> float:
        """Run once; return the seconds."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        result = self._read()
        self.peak_bytes = result["peak_bytes"]
        self.seconds.append(result["seconds"])
        return self.seconds[-1]

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(self.process.args)} ended: run it alone to see why")  # type: ignore[arg-type]
        result: dict[str, Any] = json.loads(line)
        return result


def other_load(seconds: float = 2.0) -> float:
    """Cores that are busy while this process sleeps."""

    def busy() -> float:
        numbers = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
        return sum(numbers) - numbers[3] - numbers[4]  # without idle and waiting for disks

    before = busy()
    time.sleep(seconds)
    return (busy() - before) / os.sysconf("SC_CLK_TCK") / seconds


def machine() -> dict[str, float]:
    """GB/s of a copy, and GFLOP/s of float32 products [1536, 576] x [576, 1536] in numpy and in XLA."""
    big = np.ones(1 << 26, np.float32)
    left, right = (np.random.default_rng(i).normal(size=s).astype(np.float32) for i, s in enumerate(((1536, 576),) * 2))
    product = jax.jit(lambda a, b: a @ b.T)
    on_device = jnp.asarray(left), jnp.asarray(right)
    flops = 2 * 1536 * 576 * 1536

    def best(function: Any) -> float:
        times = []
        for _ in range(9):
            began = time.perf_counter()
            function()
            times.append(time.perf_counter() - began)
        return min(times)

    return {
        "cores": os.cpu_count() or 0,
        "copy_gb_s": 2 * big.nbytes / best(lambda: np.copyto(big[: 1 << 25], big[1 << 25 :])) / 2e9,
        "numpy_gflop_s": flops / best(lambda: left @ right.T) / 1e9,
        "xla_gflop_s": flops / best(lambda: product(*on_device).block_until_ready()) / 1e9,
    }


def measure(stage: str, shape: str) -> dict[str, Any]:
    """Run a stage here and in the other program, in turn; each is first in every second pair."""
    against = AGAINST.value
    workers = [Worker.start("with_jax.py", ROOT, stage, shape)]
    try:
        other = ("with_torch.py", ROOT) if against == "torch" else ("with_jax.py", Path(against).absolute())
        workers.append(Worker.start(*other, stage, shape))
        for number in range(REPEATS.value):
            for worker in workers if number % 2 == 0 else workers[::-1]:
                worker.run()
    finally:
        for worker in workers:
            worker.stop()
    ours, theirs = workers
    ratios = [b / a for a, b in zip(ours.seconds, theirs.seconds, strict=True)]
    return {
        "stage": stage,
        "shape": shape,
        "ours_s": ours.seconds,
        "theirs_s": theirs.seconds,
        "times_as_fast": statistics.median(ratios),
        "ours_peak_gb": ours.peak_bytes / 1e9,
        "theirs_peak_gb": theirs.peak_bytes / 1e9,
    }


def main(argv: list[str]) -> None:
    """Run all stages and shapes, and print the table."""
    del argv
    if odd := [shape for shape in SHAPES.value if not SHAPE.fullmatch(shape)]:
        cli.fail(f"--shapes: got {odd[0]!r}, want such as 16x32+64")
    load = other_load()
    if load > MAX_LOAD.value:
        cli.fail(f"other processes use {load:.1f} cores, want at most --max_load={MAX_LOAD.value}", cli.TRY_AGAIN)
    results: dict[str, Any] = {"against": AGAINST.value, "machine": machine(), "runs": []}
    facts = ", ".join(f"{name} {value:.0f}" for name, value in results["machine"].items())
    table = Table("stage", "size", "warp_jax [s]", f"{AGAINST.value} [s]", "times as fast", "peak GB", title=facts)
    for stage in STAGES.value:
        for shape in SHAPES.value:
            run = measure(stage, shape)
            results["runs"].append(run)
            ours, theirs = (statistics.median(run[name]) for name in ("ours_s", "theirs_s"))
            memory = f"{run['ours_peak_gb']:.1f} / {run['theirs_peak_gb']:.1f}"
            table.add_row(stage, shape, f"{ours:.3f}", f"{theirs:.3f}", f"{run['times_as_fast']:.2f}", memory)
            if OUT.value:
                files.write_json(Path(OUT.value), results)
    Console(width=110).print(table)


if __name__ == "__main__":
    cli.run(main, required=(), example="--stages=decode,update --shapes=16x32+64")
