"""Benchmark merging: time and memory against mergekit, peak memory of a large merge, bandwidth in memory.

  python scripts/merge_benchmark.py --what=in_memory                       # against the bandwidth of a copy
  python scripts/merge_benchmark.py --what=mergekit --workdir=/tmp/merge   # installs mergekit in a virtual environment
  python scripts/merge_benchmark.py --what=large --workdir=/tmp/merge      # writes three folders of 4 GB

Prints a table. Times are medians of paired runs: the two programs take turns.
"""

import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from warp_jax import cli, files, merging
from warp_jax.storage.weight_files import SafetensorsWriter, Tensor, open_weights

WHAT = flags.DEFINE_enum("what", "in_memory", ["in_memory", "mergekit", "large"], "Benchmark to run.")
WORKDIR = flags.DEFINE_string(
    "workdir", "/tmp/merge_benchmark", "Folder for checkpoints and mergekit; not deleted at the end."
)
REPEATS = flags.DEFINE_integer("repeats", 5, "Number of paired runs.")
ROOT = Path(__file__).parents[1]
MERGEKIT = ("torch", "mergekit", "pydantic<2.11")
LOAD = """import sys, transformers
_, info = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"], info"""
# a small parent process, because a child's peak memory includes that of the process it was forked from
LAUNCH = """import resource, subprocess, sys, time
started = time.perf_counter()
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
print(time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)"""
SMOLLM2_135M = {"vocab": 49152, "width": 576, "layers": 30, "heads": 9, "kv_heads": 3, "head_dim": 64, "mlp": 1536}
SLICE_OF_7B = {"vocab": 8192, "width": 4096, "layers": 1, "heads": 32, "kv_heads": 32, "head_dim": 128, "mlp": 11008}
HALF_BILLION = {"vocab": 16384, "width": 1024, "layers": 18, "heads": 16, "kv_heads": 8, "head_dim": 64, "mlp": 4096}
BILLION = {"vocab": 32000, "width": 2048, "layers": 20, "heads": 16, "kv_heads": 4, "head_dim": 128, "mlp": 6144}


def shapes_of(size: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a Llama checkpoint with a tied head."""
    width, kv = size["width"], size["kv_heads"] * size["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (size["vocab"], width)}
    for i in range(size["layers"]):
        layer = {
            "input_layernorm": (width,),
            "mlp.down_proj": (width, size["mlp"]),
            "mlp.gate_proj": (size["mlp"], width),
            "mlp.up_proj": (size["mlp"], width),
            "post_attention_layernorm": (width,),
            "self_attn.k_proj": (kv, width),
            "self_attn.o_proj": (width, size["heads"] * size["head_dim"]),
            "self_attn.q_proj": (size["heads"] * size["head_dim"], width),
            "self_attn.v_proj": (kv, width),
        }
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return {**shapes, "model.norm.weight": (width,)}


def make_checkpoints(folder: Path, size: dict[str, int]) -> list[Path]:
    """Create the folders init, a and b if missing: random weights, and random task vectors of 1 % of their length."""
    shapes = shapes_of(size)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": size["width"],
        "intermediate_size": size["mlp"],
        "num_hidden_layers": size["layers"],
        "num_attention_heads": size["heads"],
        "num_key_value_heads": size["kv_heads"],
        "head_dim": size["head_dim"],
        "vocab_size": size["vocab"],
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }
    tensors = [Tensor(name, np.dtype(np.float32), shape, "model.safetensors") for name, shape in shapes.items()]
    paths = [folder / name for name in ("init", "a", "b")]
    for number, path in enumerate(paths):
        if path.exists():
            continue
        with files.staged(path) as partial:
            files.write_json(partial / "config.json", config)
            writer = SafetensorsWriter(partial, tensors)
            for index, tensor in enumerate(tensors):
                values = np.random.default_rng([0, index]).standard_normal(tensor.size, np.float32) * np.float32(0.02)
                if number:
                    noise = np.random.default_rng([number, index]).standard_normal(tensor.size, np.float32)
                    values += np.float32(0.0002) * noise
                writer.write(tensor.name, 0, values)
            writer.close()
    return paths


def run(command: Sequence[str], env: dict[str, str] | None = None) -> tuple[float, float]:
    """Run a program; return its seconds and its peak resident memory in GB."""
    os.sync()  # finish the writes of the run before
    launcher = [sys.executable, "-S", "-c", LAUNCH, *command]
    env = os.environ | (env or {})
    result = subprocess.run(launcher, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"failed: {' '.join(command)}\n{result.stderr}")
    seconds, kibibytes = result.stdout.split()[-2:]
    return float(seconds), float(kibibytes) * 1024 / 1e9


def ours(paths: Sequence[Path], out: Path, *options: str) -> list[str]:
    """Command line of our merge."""
    init, *policies = map(str, paths)
    script = str(ROOT / "scripts" / "merge.py")
    return [sys.executable, script, f"--init={init}", f"--policies={','.join(policies)}", f"--out={out}", *options]


def against_mergekit(workdir: Path) -> None:
    """Compare with mergekit's nuslerp, an independent program for the same merge: difference, time and memory."""
    paths = make_checkpoints(workdir / "smollm2_135m", SMOLLM2_135M)
    python = workdir / "mergekit" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(workdir / "mergekit")], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *MERGEKIT], check=True)
    recipe = {
        "merge_method": "nuslerp",
        "base_model": str(paths[0]),
        "models": [{"model": str(path), "parameters": {"weight": 0.5}} for path in paths[1:]],
        "dtype": "float32",
    }
    (workdir / "nuslerp.yml").write_text(json.dumps(recipe))  # JSON is valid YAML
    theirs = [str(python.with_name("mergekit-yaml")), str(workdir / "nuslerp.yml")]
    rows: dict[str, list[tuple[float, float]]] = {"mergekit nuslerp": [], "warp_jax": []}
    for repeat in range(REPEATS.value):
        outs = [workdir / f"{name}_{repeat}_{os.getpid()}" for name in ("theirs", "ours")]
        rows["mergekit nuslerp"].append(run([*theirs, str(outs[0])], env={"HF_HUB_OFFLINE": "1"}))
        rows["warp_jax"].append(run(ours(paths, outs[1], "--unit=tensor")))
        if repeat == 0:
            print(f"difference from mergekit, relative to the task vector: {difference(paths[0], *outs):.2e}")
            subprocess.run([str(python), "-c", LOAD, str(outs[1] / "eta_1")], check=True, capture_output=True)
            print("transformers loads our folder without a missing or unexpected key")
        for out in outs:
            shutil.rmtree(out)
    table = Table("program", "seconds", "peak GB", title="two policies of 538 MB, float32, one angle per tensor")
    medians = {name: [statistics.median(column) for column in zip(*runs, strict=True)] for name, runs in rows.items()}
    for name, (seconds, memory) in medians.items():
        table.add_row(name, f"{seconds:.2f}", f"{memory:.2f}")
    ratios = [a[0] / b[0] for a, b in zip(*rows.values(), strict=True)]
    memory_ratio = medians["warp_jax"][1] / medians["mergekit nuslerp"][1]
    table.add_row("ratio", f"{statistics.median(ratios):.1f} times faster", f"{memory_ratio:.2f} of the memory")
    Console().print(table)


def difference(init: Path, theirs: Path, mine: Path) -> float:
    """Return |ours - theirs| / |theirs - init| over all weights."""
    folders = [open_weights(path) for path in (init, theirs, mine / "eta_1")]
    squares = np.zeros(2)
    for name, tensor in folders[0].tensors.items():
        start, a, b = (folder.view(name, 0, tensor.size).astype(np.float64) for folder in folders)
        squares += [np.sum((b - a) ** 2), np.sum((a - start) ** 2)]
    return float(np.sqrt(squares[0] / squares[1]))


def large(workdir: Path) -> None:
    """Measure the peak memory of a merge of large folders with --memory_gb=1."""
    paths = make_checkpoints(workdir / "large", BILLION)
    size = (paths[0] / "model.safetensors").stat().st_size / 1e9
    out = workdir / f"large_{os.getpid()}"
    seconds, memory = run(ours(paths, out, "--memory_gb=1"))
    shutil.rmtree(out)
    print(f"two policies of {size:.2f} GB each, --memory_gb=1: {seconds:.1f} s, peak {memory:.2f} GB resident")


def in_memory() -> None:
    """Measure the bandwidth (bytes per second) of merges of two trees of about 1 GB against that of a copy."""
    for size in (SLICE_OF_7B, HALF_BILLION):
        _in_memory(shapes_of(size))


def _in_memory(shapes: dict[str, tuple[int, ...]]) -> None:
    block = np.random.default_rng(0).standard_normal(1 << 22, np.float32)

    def tree(seed: int, scale: float) -> dict[str, jax.Array]:
        return {
            name.replace(".", "/"): jnp.asarray(np.resize(np.roll(block, seed * 7919 + i), shape) * np.float32(scale))
            for i, (name, shape) in enumerate(shapes.items())
        }

    init = tree(0, 0.02)
    policies = [jax.tree.map(jnp.add, init, tree(seed, 0.0002)) for seed in (1, 2)]
    num_bytes = sum(x.nbytes for x in init.values())
    merge = functools.partial(merging.slerp_liti, liti_rate=0.3, unit="layer", stacked=None)
    source, target = (np.ones(num_bytes // 4, np.float32) for _ in range(2))
    kinds: dict[str, tuple[int, Callable[[], object]]] = {
        "copy": (2 * num_bytes, lambda: _copy(source, target)),
        "gram": (3 * num_bytes, lambda: merging.gram(init, policies, stacked=None)),
        "slerp_liti, new arrays": (7 * num_bytes, lambda: merge(init, policies)),
    }
    times: dict[str, list[float]] = {name: [] for name in (*kinds, "slerp_liti, in place")}
    for _ in range(REPEATS.value + 1):  # the first one compiles
        for name, (_, function) in kinds.items():
            times[name].append(_seconds(function))
        mine = jax.block_until_ready([jax.tree.map(jnp.copy, policies[0]), policies[1]])
        times["slerp_liti, in place"].append(_seconds(lambda mine=mine: merge(init, mine, donate=True)))
        del mine
    moved = {name: count for name, (count, _) in kinds.items()} | {"slerp_liti, in place": 7 * num_bytes}
    title = f"trees of {num_bytes / 1e9:.2f} GB, {len(shapes)} leaves, float32, M = 2"
    table = Table("operation", "ms", "GB/s", "share of copy", title=title)
    rates = {name: [moved[name] / seconds / 1e9 for seconds in runs[1:]] for name, runs in times.items()}
    for name, rate in rates.items():
        share = statistics.median(a / b for a, b in zip(rate, rates["copy"], strict=True))
        milliseconds = 1e3 * statistics.median(times[name][1:])
        table.add_row(name, f"{milliseconds:.0f}", f"{statistics.median(rate):.1f}", f"{share:.0%}")
    Console().print(table)


def _copy(source: np.ndarray, target: np.ndarray) -> None:
    """Copy with two threads, one half each."""
    half = len(source) // 2
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda part: np.copyto(target[part], source[part]), (slice(0, half), slice(half, None))))


def _seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    result = jax.block_until_ready(function())
    seconds = time.perf_counter() - started
    del result
    return seconds


def main(argv: list[str]) -> None:
    """Run one benchmark."""
    del argv
    jax.config.update("jax_platforms", "cpu")
    workdir = Path(WORKDIR.value)
    kinds = {"in_memory": in_memory, "mergekit": lambda: against_mergekit(workdir), "large": lambda: large(workdir)}
    kinds[WHAT.value]()


if __name__ == "__main__":
    cli.run(main, required=(), example="--what=in_memory")
