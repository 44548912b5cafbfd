"""Benchmark merging: time and memory against mergekit, peak memory of a large merge, bandwidth in memory.

  python scripts/merge_benchmark.py --what=in_memory                       # against the bandwidth of a copy
  python scripts/merge_benchmark.py --what=mergekit --workdir=/tmp/merge   # installs mergekit when first used
  python scripts/merge_benchmark.py --what=large --workdir=/tmp/merge      # writes three folders of 4 GB

Prints a table. Times are medians of paired runs: the programs or operations take turns.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from absl import flags
from etils import epy
from speed import peers, protocol, sides

from warp_jax import cli, files

with epy.lazy_imports():  # at their first use: --help does not wait for JAX
    import jax
    import jax.numpy as jnp
    from rich import console
    from rich import table as tables

    from warp_jax import merging
    from warp_jax.models import apply, transformer
    from warp_jax.pretrained import hf_config, hf_weights
    from warp_jax.storage import weight_files

WHAT = flags.DEFINE_enum("what", "in_memory", ["in_memory", "mergekit", "large"], "Benchmark to run.")
WORKDIR = flags.DEFINE_string("workdir", "/tmp/merge_benchmark", "Folder for checkpoints; not deleted.")
REPEATS = flags.DEFINE_integer("repeats", 5, "Number of paired runs.")
ROOT = Path(__file__).parents[1]
LOAD = """import sys, transformers
_, info = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"], info"""
# sizes of models: vocabulary, width, layers, heads, key-value heads, head size, mlp width
SMOLLM2_135M = protocol.Work("merge", 1, 1, 1, 1).sizes
SLICE_OF_7B = (8192, 4096, 1, 32, 32, 128, 11008)
HALF_BILLION = (16384, 1024, 18, 16, 8, 64, 4096)
BILLION = (32000, 2048, 20, 16, 4, 128, 6144)


def shapes_of(model: transformer.TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a model folder."""
    slices = hf_weights.slices_of(apply.param_shapes(model), model)
    return {name: part.stored_shape for name, part in slices.items()}


def make_checkpoints(folder: Path, model: transformer.TransformerConfig) -> list[Path]:
    """Create the folders init, a and b if missing: random weights, and random task vectors of 1 % of their length."""
    tensors = [
        weight_files.Tensor(name, np.dtype(np.float32), shape, "model.safetensors")
        for name, shape in shapes_of(model).items()
    ]
    paths = [folder / name for name in ("init", "a", "b")]
    for number, path in enumerate(paths):
        if path.exists():
            continue
        with files.staged(path) as partial:
            files.write_json(partial / "config.json", hf_config.to_json(model, "float32"))
            writer = weight_files.SafetensorsWriter(partial, tensors)
            for index, tensor in enumerate(tensors):
                values = np.random.default_rng([0, index]).standard_normal(tensor.size, np.float32) * np.float32(0.02)
                if number:
                    noise = np.random.default_rng([number, index]).standard_normal(tensor.size, np.float32)
                    values += np.float32(0.0002) * noise
                writer.write(tensor.name, 0, values)
            writer.close()
    return paths


def run(*command: str | Path) -> tuple[float, float]:
    """Run a program; return its seconds and its peak resident memory in GB."""
    seconds, peak = sides.run_command(*command, folder=ROOT)
    return seconds, peak / 1e9


def run_ours(paths: list[Path], out: Path, option: str) -> tuple[float, float]:
    """Run scripts/merge.py; return its seconds and its peak resident memory in GB."""
    init, a, b = paths
    command = "scripts/merge.py", f"--init={init}", f"--policies={a},{b}", f"--out={out}", option
    return run(sys.executable, *command)


def against_mergekit(workdir: Path) -> None:
    """Compare with mergekit's nuslerp, an independent program for the same merge: difference, time and memory."""
    paths = make_checkpoints(workdir / "smollm2_135m", transformer.TransformerConfig(*SMOLLM2_135M))
    programs = peers.python_of("mergekit", peers.MERGEKIT, peers.CACHE).parent
    recipe = {
        "merge_method": "nuslerp",
        "base_model": str(paths[0]),
        "models": [{"model": str(path), "parameters": {"weight": 0.5}} for path in paths[1:]],
        "dtype": "float32",
    }
    files.write_json(workdir / "nuslerp.yml", recipe)  # JSON is valid YAML
    rows = []  # seconds and GB of mergekit, then ours
    for repeat in range(REPEATS.value):
        theirs, ours = (workdir / f"{name}_{repeat}_{os.getpid()}" for name in ("theirs", "ours"))
        of_mergekit = run(programs / "mergekit-yaml", workdir / "nuslerp.yml", theirs)
        rows.append([*of_mergekit, *run_ours(paths, ours, "--unit=tensor")])
        if repeat == 0:
            distance = difference(paths[0], theirs, ours / "eta_1")
            print(f"difference from mergekit, relative to the task vector: {distance:.2e}")
            subprocess.run([programs / "python", "-c", LOAD, ours / "eta_1"], check=True, capture_output=True)
            print("transformers loads our folder without a missing or unexpected key")
        for out in (theirs, ours):
            shutil.rmtree(out)
    runs = np.array(rows)
    seconds, gigabytes, our_seconds, our_gigabytes = np.median(runs, axis=0)
    ratio = np.median(runs[:, 0] / runs[:, 2])
    table = tables.Table("program", "seconds", "peak GB", title="two policies of 538 MB, float32, one angle per tensor")
    table.add_row("mergekit nuslerp", f"{seconds:.2f}", f"{gigabytes:.2f}")
    table.add_row("warp_jax", f"{our_seconds:.2f}", f"{our_gigabytes:.2f}")
    table.add_row("ratio", f"{ratio:.1f} times faster", f"{our_gigabytes / gigabytes:.2f} of the memory")
    console.Console().print(table)


def difference(init: Path, theirs: Path, ours: Path) -> float:
    """Return |ours - theirs| / |theirs - init| over all weights."""
    folders = [weight_files.open_weights(path) for path in (init, theirs, ours)]
    squares = np.zeros(2)
    for name, tensor in folders[0].tensors.items():
        start, a, b = (folder.view(name, 0, tensor.size).astype(np.float64) for folder in folders)
        squares += [np.sum((b - a) ** 2), np.sum((a - start) ** 2)]
    return float(np.sqrt(squares[0] / squares[1]))


def large(workdir: Path) -> None:
    """Measure the peak memory of a merge of large folders with --memory_gb=1."""
    paths = make_checkpoints(workdir / "large", transformer.TransformerConfig(*BILLION))
    size = (paths[0] / "model.safetensors").stat().st_size / 1e9
    out = workdir / f"large_{os.getpid()}"
    seconds, memory = run_ours(paths, out, "--memory_gb=1")
    shutil.rmtree(out)
    print(f"two policies of {size:.2f} GB each, --memory_gb=1: {seconds:.1f} s, peak {memory:.2f} GB resident")


def in_memory(model: transformer.TransformerConfig) -> None:
    """Measure the bandwidth (bytes per second) of a merge of two trees of about 1 GB against that of a copy."""
    shapes = {name.replace(".", "/"): shape for name, shape in shapes_of(model).items()}

    def tree(seed: int, scale: float) -> dict[str, jax.Array]:
        draw = np.random.default_rng(seed).standard_normal
        return {name: jnp.asarray(draw(shape, np.float32) * np.float32(scale)) for name, shape in shapes.items()}

    init = tree(0, 0.02)
    first, second = (jax.tree.map(jnp.add, init, tree(seed, 0.0002)) for seed in (1, 2))
    gigabytes = sum(x.nbytes for x in init.values()) / 1e9
    source, target = (np.ones(round(gigabytes * 1e9) // 4, np.float32) for _ in range(2))
    merge = functools.partial(merging.slerp_liti, init, liti_rate=0.3, unit="layer", stacked=None)
    operations = {  # name: trees that it reads and writes; what it does with a copy of the first policy
        "copy": (2, lambda spare: _copy(source, target)),
        "gram": (3, lambda spare: merging.gram(init, [first, second], stacked=None)),
        "slerp_liti, new arrays": (7, lambda spare: merge([first, second])),
        "slerp_liti, in place": (7, lambda spare: merge([spare, second], donate=True)),
    }
    times: dict[str, list[float]] = {name: [] for name in operations}
    for _ in range(REPEATS.value + 1):  # the first one compiles
        for name, (_, function) in operations.items():
            spare = jax.block_until_ready(jax.tree.map(jnp.copy, first))
            started = time.perf_counter()
            result = jax.block_until_ready(function(spare))
            times[name].append(time.perf_counter() - started)
            del result, spare
    title = f"trees of {gigabytes:.2f} GB, {len(shapes)} leaves, float32, M = 2"
    table = tables.Table("operation", "ms", "GB/s", "share of copy", title=title)
    rates = {name: count * gigabytes / np.array(times[name][1:]) for name, (count, _) in operations.items()}
    for name, rate in rates.items():
        milliseconds, share = 1e3 * np.median(times[name][1:]), np.median(rate / rates["copy"])
        table.add_row(name, f"{milliseconds:.0f}", f"{np.median(rate):.1f}", f"{share:.0%}")
    console.Console().print(table)


def _copy(source: np.ndarray, target: np.ndarray) -> None:
    """Copy with two threads, one half each."""
    half = len(source) // 2
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(np.copyto, (target[:half], target[half:]), (source[:half], source[half:])))


def main(argv: list[str]) -> None:
    """Run one benchmark."""
    del argv
    jax.config.update("jax_platforms", "cpu")
    if WHAT.value == "mergekit":
        against_mergekit(Path(WORKDIR.value))
    elif WHAT.value == "large":
        large(Path(WORKDIR.value))
    else:
        for sizes in (SLICE_OF_7B, HALF_BILLION):
            in_memory(transformer.TransformerConfig(*sizes))


if __name__ == "__main__":
    cli.run(main, required=(), example="--what=in_memory")
