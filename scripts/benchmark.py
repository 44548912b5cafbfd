"""Benchmark the stages of training against other programs, or against another checkout of warp_jax.

  python scripts/benchmark.py --stages=decode --shapes=1x32+64,16x32+64 --out=/tmp/speed.json
  python scripts/benchmark.py --against=trl --shapes=16x32+16-64
  python scripts/benchmark.py --against=../warp_jax_before --stages=startup,help,update --repeats=7

Each program runs in a process of its own, on random weights of a model like SmolLM2-135M in float32, with the same
number of tokens. They take turns; a ratio is the median over the pairs. Prints a table with the speed of the machine,
and writes all runs to --out. Another program is installed in a virtual environment when it is first needed.
"""

import contextlib
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from etils import epy
from speed import peers, protocol, sides
from speed.sides import Command, Side, Worker

from warp_jax import cli, files

with epy.lazy_imports():  # at their first use: --help does not wait for JAX
    import jax
    import jax.numpy as jnp
    from rich import console
    from rich import table as tables

AGAINST = flags.DEFINE_string(
    "against",
    "torch",
    f"One of {', '.join(peers.PEERS)}; 'plain': without WARP's average of the policy, against a fixed anchor; the "
    "folder of another checkout of warp_jax; or nothing.",
)
STAGES = flags.DEFINE_list(
    "stages",
    [],
    "Stages to run: decode, score, update, rl_step, merge, evaluate; startup: --config up to its "
    "first step, by default of configs/tiny.py; "
    "help: main --help; end_to_end: all of --config. Default: those of the other program.",
)
SHAPES = flags.DEFINE_list(
    "shapes",
    ["16x32+64"],
    "Sizes: sequences x tokens of the prompt + new tokens. 16x32+16-64 draws the number of new tokens evenly.",
)
REPEATS = flags.DEFINE_integer("repeats", 5, "Pairs of runs.", lower_bound=1)
TRAINED = flags.DEFINE_integer("trained_layers", 0, "Train the last so many layers; 0 = all weights.", lower_bound=0)
CONFIG = flags.DEFINE_string("config", "", "Config file of the job of startup or end_to_end, in both checkouts.")
ENVIRONMENTS = flags.DEFINE_string("environments", str(peers.CACHE), "Folder for the other programs; not deleted.")
OUT = flags.DEFINE_string("out", "", "JSON file for the results.")
MAX_LOAD = flags.DEFINE_float("max_load", 0.2, "Cores that other processes may use; a pair with more is repeated.")
ROOT = Path(__file__).parents[1]
MAIN = ["-m", "warp_jax.main"]
OURS = ("decode", "score", "update", "rl_step")
COMMANDS = ("startup", "help", "end_to_end")


def command(stage: str, checkout: Path) -> Command:
    """The side that runs a command of a checkout."""
    if stage == "help":
        return Command(checkout, [*MAIN, "--help"])
    job = [*MAIN, f"--config={CONFIG.value or 'configs/tiny.py'}", "--workdir={workdir}"]
    return Command(checkout, job, until="sft/metrics.jsonl" if stage == "startup" else "")


def make_sides(stage: str, shape: str) -> list[Side]:
    """Our side, and the other one if there is one."""
    against, here = AGAINST.value, Path(sys.executable)
    checkouts = [ROOT] if not against else [ROOT, Path(against).absolute()]
    if stage in COMMANDS:
        return [command(stage, checkout) for checkout in checkouts]
    batch, prompt, shortest, longest = protocol.parse_shape(shape) or (1, 1, 1, 1)
    samples = 2 if batch > 1 else 1
    work = protocol.Work(stage, batch, prompt, shortest, longest, samples, TRAINED.value)
    if against in peers.PEERS:
        program, requirements, _ = peers.PEERS[against]
        python = peers.python_of(against, requirements, Path(ENVIRONMENTS.value))
        return [Worker(here, "with_jax.py", work, ROOT), Worker(python, program, work)]
    if against == "plain":
        return [Worker(here, "with_jax.py", work._replace(is_plain=plain), ROOT) for plain in (False, True)]
    return [Worker(here, "with_jax.py", work, checkout) for checkout in checkouts]


def other_load(seconds: float = 2.0) -> float:
    """Cores that are busy while this process sleeps."""
    before = sides.busy_seconds()
    time.sleep(seconds)
    return (sides.busy_seconds() - before) / seconds


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
        # half is read, half is written
        "copy_gb_s": big.nbytes / best(lambda: np.copyto(big[: 1 << 25], big[1 << 25 :])) / 1e9,
        "numpy_gflop_s": flops / best(lambda: left @ right.T) / 1e9,
        "xla_gflop_s": flops / best(lambda: product(*on_device).block_until_ready()) / 1e9,
    }


def measure(stage: str, shape: str) -> dict[str, Any]:
    """Run a stage on both sides, in turn."""
    with contextlib.ExitStack() as stack:
        both = [stack.enter_context(side) for side in make_sides(stage, shape)]
        disturbed = sides.run_pairs(both, REPEATS.value, MAX_LOAD.value)
    result: dict[str, Any] = {"stage": stage, "shape": shape, "disturbed": disturbed}
    result |= {name: side.runs for name, side in zip(("ours", "theirs"), both, strict=False)}
    _, _, shortest, longest = protocol.parse_shape(shape) or (1, 1, 1, 1)
    counts = {run["tokens"] for side in both for run in side.runs if "tokens" in run}
    if len(counts) > 1 and shortest == longest:
        raise RuntimeError(f"{stage} {shape}: runs have {min(counts)} and {max(counts)} tokens; please report it")
    if len(both) > 1:
        ratios = [b["seconds"] / a["seconds"] for a, b in zip(*(side.runs for side in both), strict=True)]
        result["times_as_fast"] = statistics.median(ratios)
    return result


def row(result: dict[str, Any]) -> list[str]:
    """The row of the table: medians of both sides, the largest peaks, and the mean number of tokens a sequence."""
    both = [result[name] for name in ("ours", "theirs") if name in result]

    def each(name: str, form: str, reduce: Any = statistics.median, unit: float = 1.0) -> list[str]:
        return [f"{reduce(run[name] for run in runs) / unit:{form}}" for runs in both if name in runs[0]]

    batch = (protocol.parse_shape(result["shape"]) or (1,))[0]
    seconds = [*each("seconds", ".3f"), "", ""][:2]
    ratio = f"{result['times_as_fast']:.3f}" if "times_as_fast" in result else ""
    more = each("peak_bytes", ".2f", max, 1e9), each("generate_s", ".2f"), each("tokens", ".1f", statistics.mean, batch)
    return [result["stage"], result["shape"], *seconds, ratio, *map(" / ".join, more)]


def check() -> tuple[str, ...]:
    """Check the flags, and return the stages to run."""
    against, known = AGAINST.value, (*OURS, "merge", "evaluate", *COMMANDS)
    if against in peers.PEERS:
        known = stages = peers.PEERS[against].stages
    elif against == "plain":
        known = stages = ("update", "rl_step")
    elif against and not (Path(against) / "warp_jax").is_dir():
        names = ", ".join(peers.PEERS)
        cli.fail(f"--against: got {against!r}, want {names}, plain, or the folder of a checkout of warp_jax")
    else:
        stages = OURS
    stages = tuple(STAGES.value) or stages
    if odd := [stage for stage in stages if stage not in known]:
        cli.fail(f"--stages: got {odd[0]!r}, want with --against={against} some of {', '.join(known)}")
    if "end_to_end" in stages and not CONFIG.value:
        cli.fail("--config is missing; try --config=configs/tiny.py with --stages=end_to_end")
    for shape in SHAPES.value:
        batch, _, shortest, longest = protocol.parse_shape(shape) or (0, 0, 0, 0)
        if not batch:
            cli.fail(f"--shapes: got {shape!r}, want such as 16x32+64 or 16x32+16-64")
        if shortest < longest and against in peers.ONE_LENGTH:
            cli.fail(f"--shapes: got {shape!r}, want one length of completions with --against={against}")
        if against == "llama_cpp" and batch > 1:
            cli.fail(f"--shapes: got {shape!r}, want 1 sequence with --against=llama_cpp")
        if batch % 2 and (batch > 1 or {"update", "rl_step"} & {*stages}):
            cli.fail(f"--shapes: got {shape!r}, want an even number of sequences: a prompt has 2 completions")
    return stages


def main(argv: list[str]) -> None:
    """Run all stages and shapes, and print the table."""
    del argv
    stages = check()
    load = other_load()
    if load > MAX_LOAD.value:
        cli.fail(f"other processes use {load:.1f} cores, want at most --max_load={MAX_LOAD.value}", cli.TRY_AGAIN)
    results: dict[str, Any] = {"against": AGAINST.value, "machine": machine(), "runs": []}
    facts = ", ".join(f"{name} {value:.0f}" for name, value in results["machine"].items())
    columns = "stage", "size", "warp_jax [s]", f"{AGAINST.value} [s]", "times as fast", "peak GB", "generating [s]"
    table = tables.Table(*columns, "tokens", title=facts)
    for stage in stages:
        for shape in ["-"] if stage in (*COMMANDS, "merge") else SHAPES.value:
            try:
                result = measure(stage, shape)
            except RuntimeError as error:
                cli.fail(str(error), cli.TRY_AGAIN if isinstance(error, sides.DisturbedError) else cli.UNEXPECTED)
            results["runs"].append(result)
            table.add_row(*row(result))
            if OUT.value:
                files.write_json(Path(OUT.value), results)
    console.Console(width=120).print(table)


if __name__ == "__main__":
    cli.run(main, required=(), example="--stages=decode,update --shapes=16x32+64")
