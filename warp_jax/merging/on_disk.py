"""Merge checkpoints on disk, with only chunks of them in memory.

Pass 1 sums the Gram matrix of each unit's task vectors. Pass 2 writes one weighted sum per eta. Several threads work at
the same time; each maps a chunk, computes and writes.
"""

import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from warp_jax import files
from warp_jax.merging import chunking, rounding, units
from warp_jax.merging.chunking import Chunk, Inputs, Piece
from warp_jax.merging.coefficients import FULL_WEIGHTS, angles, check_method, norms, order_spread, solve, with_liti
from warp_jax.progress import JobProgress
from warp_jax.storage.model_files import EXPORT_REPORT
from warp_jax.storage.weight_files import OUTPUT_DTYPES, SafetensorsWriter, Tensor, hash_file

REPORT = "merge_report.json"
MAX_FACTOR = 1000  # larger etas and weights can overflow the dtype of the result
BLOCK = 1 << 17  # elements; a block fits the cache, and Python's overhead per block does not matter


class Settings(NamedTuple):
    """Options of a merge; see the flags of `scripts/merge.py`."""

    method: str = "slerp"
    unit: str = "layer"
    weights: tuple[float, ...] | None = None
    etas: tuple[float, ...] = (1.0,)
    lines_alpha: float | None = None  # share of each eta in the first layer (LiNeS); None: the same eta in all units
    skip: str | None = None  # regular expression: tensors in whose names it is found are copied from init
    dtype: str | None = None  # one of weight_files.OUTPUT_DTYPES; None: dtype of the policies
    memory_gb: float = 1.0
    rounding: str = "nearest"  # one of rounding.METHODS
    seed: int = 0  # of stochastic rounding


def merge_folders(init: Path, policies: Sequence[Path], out: Path, settings: Settings) -> dict[str, Any]:
    """Write out/eta_X for every eta, and out/merge_report.json; return the report.

    `out` appears only when it is complete. Raises ValueError for inputs that cannot be merged.
    """
    names = {_eta_folder(eta) for eta in settings.etas if 0 <= eta <= MAX_FACTOR}
    if not names or len(names) < len(settings.etas):
        raise ValueError(f"etas: got {settings.etas}, want distinct numbers from 0 to {MAX_FACTOR}")
    if not policies:
        raise ValueError("policies: got none, want at least one")
    if not all(abs(weight) <= MAX_FACTOR for weight in settings.weights or ()):
        raise ValueError(f"weights: got {settings.weights}, want numbers from -{MAX_FACTOR} to {MAX_FACTOR}")
    check_method(settings.method, settings.weights, len(policies))
    if out.exists():
        raise ValueError(f"out: {out} exists and is not overwritten; choose another --out")
    inputs = chunking.open_inputs(init, policies, settings.dtype, settings.skip)
    workers = min(os.cpu_count() or 2, 8)
    room = chunking.chunk_room(inputs, settings.memory_gb, workers)
    unit_names, chunks = chunking.plan_chunks(inputs, settings.unit, room)
    shares = np.ones(len(unit_names))
    if settings.lines_alpha is not None:
        kept = [row for name in (*inputs.copied, *inputs.skipped) for row in chunking.row_names(inputs, name)]
        shares = units.depth_shares(unit_names, settings.lines_alpha, kept)
    with JobProgress(2 * len(chunks)) as progress, ThreadPoolExecutor(workers) as pool:
        job = _Job(inputs, settings, unit_names, shares, chunks, _Maths(len(policies)), pool, progress)
        try:
            hashes = pool.map(hash_file, inputs.weight_paths())
            inner, rounding_noise = job.sum_grams()
            coefficients = solve(settings.method, inner, settings.weights, unit_names)
            with files.staged(out) as staging:
                delivered = job.write_merges(coefficients, staging)
                report = job.make_report(inner, coefficients, delivered, list(hashes))
                report["warnings"] = job.find_warnings(inner, rounding_noise, delivered)
                files.write_json(staging / REPORT, report)
        finally:
            pool.shutdown(cancel_futures=True)
    return report


def summary_line(report: dict[str, Any]) -> str:
    """Summarize a report in one line: policies, units, the median angle between policies, and the delivered shares."""
    units, count = report["units"], len(report["policies"])
    pairs = [(unit, a, b) for unit in units for a in range(count) for b in range(a)]
    angles = [unit["angles_degrees"][a][b] for unit, a, b in pairs if unit["norms"][a] and unit["norms"][b]]
    apart = f", median angle {np.median(angles):.1f} degrees" if angles else ""
    alone, skipped = len(report["not_in_a_layer"]), len(report["skipped"])
    shares = [f"{row['share']:.1%} at eta {row['eta']:g}" for row in report["delivered"] if row["share"] is not None]
    kept = f"; delivered {', '.join(shares)}" if shares else ""
    left = f"; {skipped} tensors kept from init" if skipped else ""
    return f"merged {count} policies over {len(units)} units ({alone} tensors outside layers){apart}{kept}{left}"


def order_line(report: dict[str, Any]) -> str:
    """State in one line how much the order of the policies matters; '' if it does not."""
    spreads = {unit["name"]: unit["order_spread"] for unit in report["units"] if "order_spread" in unit}
    if not spreads:
        return ""
    worst = max(spreads, key=lambda name: spreads[name])
    return (
        f"slerp depends on the order of the policies: another order moves the merge by up to {spreads[worst]:.1%} of "
        f"its distance from init ({worst}); --method=karcher has no order"
    )


class _Maths(threading.local):
    """The sums of `merging.kernels` in numpy, because starting JAX and compiling would take longer than a merge.

    Each thread reuses its arrays, because allocating memory takes as long as the maths.
    """

    def __init__(self, count: int):
        self._rows = np.empty((1 + count, BLOCK))
        self.mixed = np.empty(BLOCK)  # room for a weighted sum of rows

    def gram(self, init: np.ndarray, policies: Sequence[np.ndarray]) -> np.ndarray:
        """Inner products <delta_a, delta_b>: float64 [M, M]."""
        total = np.zeros((len(policies), len(policies)))
        for _, (_, *deltas) in self.blocks(init, policies):
            for a, first in enumerate(deltas):
                for b, second in enumerate(deltas[: a + 1]):
                    total[a, b] += np.dot(first, second)
        return np.tril(total) + np.tril(total, -1).T

    def blocks(self, init: np.ndarray, policies: Sequence[np.ndarray]) -> Iterator[tuple[int, np.ndarray]]:
        """Yield a block's start and float64 rows: init, then the task vectors. The next block overwrites this one."""
        for first in range(0, len(init), BLOCK):
            part = slice(first, min(first + BLOCK, len(init)))
            rows = self._rows[:, : part.stop - first]
            for row, values in zip(rows, (init, *policies), strict=True):
                row[:] = values[part]
            rows[1:] -= rows[0]
            yield first, rows


class _Job(NamedTuple):
    inputs: Inputs
    settings: Settings
    units: tuple[str, ...]
    shares: np.ndarray  # of each eta in each unit, [U]
    chunks: Sequence[Chunk]
    maths: _Maths
    pool: ThreadPoolExecutor
    progress: JobProgress

    def sum_grams(self) -> tuple[np.ndarray, np.ndarray]:
        """Run pass 1: Gram matrices float64 [U, M, M], and squared rounding error of the weights that moved [U, M].

        Raises ValueError if a policy is identical to init.
        """
        count = len(self.inputs.policies)

        def chunk_gram(chunk: Chunk) -> tuple[np.ndarray, np.ndarray]:
            matrix, noise = np.zeros((count, count)), np.zeros(count)
            for _, init, policies in self.views(chunk):
                deltas = self.maths.gram(init, policies)
                is_full = self.settings.method == FULL_WEIGHTS
                matrix += self.maths.gram(np.zeros_like(init), policies) if is_full else deltas
                moved = deltas.diagonal() > 0
                if moved.any():  # frozen weights are equal without being one policy twice
                    noise += moved * rounding.noise_square(policies[int(np.argmax(moved))])
            if not np.isfinite(matrix).all():
                chunking.raise_not_finite(self.inputs, chunk)
            return matrix, noise

        total, noises = np.zeros((len(self.units), count, count)), np.zeros((len(self.units), count))
        for chunk, (matrix, noise) in self.run(chunk_gram, "angles"):
            total[chunk.unit] += matrix
            noises[chunk.unit] += noise
        start = "zero" if self.settings.method == FULL_WEIGHTS else f"init {self.inputs.init.path}"
        for policy, square in zip(self.inputs.policies, np.einsum("umm->m", total), strict=True):
            if not square:
                raise ValueError(f"{policy.path}: identical to {start}; nothing to merge")
        return total, noises

    def write_merges(self, coefficients: np.ndarray, staging: Path) -> np.ndarray:
        """Run pass 2: write a folder per eta to `staging`; return the sums of a Delivery, float64 [U, E, 3]."""
        etas, dtype = self.settings.etas, OUTPUT_DTYPES.get(self.settings.dtype or "")
        tensors = [_output_tensor(self.inputs, name, dtype) for name in self.inputs.merged]
        tensors += [self.inputs.init.tensors[name] for name in (*self.inputs.copied, *self.inputs.skipped)]
        needed = len(etas) * sum(tensor.nbytes for tensor in tensors)
        free = shutil.disk_usage(staging.parent).free
        if needed > free:
            raise ValueError(
                f"out: got {free / 1e9:.2f} GB of free disk, want {needed / 1e9:.2f}; choose another --out"
            )
        dtypes = {tensor.name: tensor.dtype for tensor in tensors}
        weights = [with_liti(self.settings.method, coefficients, eta * self.shares) for eta in etas]
        writers = [self.make_folder(staging / _eta_folder(eta), tensors) for eta in etas]
        shared = _shared_names(self.inputs)

        def write_chunk(chunk: Chunk) -> np.ndarray:
            sums = np.zeros((len(etas), 3))
            for piece, init, policies in self.views(chunk):
                for first, rows in self.maths.blocks(init, policies):
                    start = piece.start + first
                    key = shared.get(piece.name, piece.name)
                    round_values = self.rounding_of(key, start, rows.shape[1], dtypes[piece.name])
                    for e, (writer, of_unit) in enumerate(zip(writers, weights, strict=True)):
                        mixed = np.dot(of_unit[chunk.unit], rows, out=self.maths.mixed[: rows.shape[1]])
                        rounded = round_values(mixed)
                        sums[e] += rounding.measure(mixed - rows[0], rounded.astype(np.float64) - rows[0])
                        writer.write(piece.name, start, rounded)
            return sums

        delivered = np.zeros((len(self.units), len(etas), 3))
        for chunk, sums in self.run(write_chunk, "merges"):
            if not np.isfinite(sums).all():
                raise ValueError(
                    f"tensor {chunk.pieces[0].name!r}: the merge overflows the output; set a wider --dtype"
                )
            delivered[chunk.unit] += sums
        for writer in writers:
            for piece in chunking.whole_pieces(self.inputs):
                writer.write(piece.name, piece.start, self.inputs.init.view(*piece))
                self.inputs.init.release(*piece)
            writer.close()
        return delivered

    def rounding_of(self, name: str, start: int, count: int, dtype: np.dtype) -> Callable[[np.ndarray], np.ndarray]:
        """Return the function that rounds elements start .. start + count - 1 of a tensor; the same for every eta.

        name: chooses the random numbers.
        """
        if self.settings.rounding == "stochastic":
            uniforms = rounding.uniforms(name, start, count, self.settings.seed)
            return lambda values: rounding.stochastic(values, dtype, uniforms)

        def to_nearest(values: np.ndarray) -> np.ndarray:
            with np.errstate(over="ignore"):  # the caller sees infinity
                return values.astype(dtype)

        return to_nearest

    def views(self, chunk: Chunk) -> Iterator[tuple[Piece, np.ndarray, list[np.ndarray]]]:
        """Yield each piece of a chunk with its values in init and in the policies, flat; then release their memory."""
        for piece in chunk.pieces:
            init, *policies = (folder.view(*piece) for folder in self.inputs.folders)
            yield piece, init, policies
            for folder in self.inputs.folders:
                folder.release(*piece)

    def run(self, function: Callable[[Chunk], Any], phase: str) -> Iterator[tuple[Chunk, Any]]:
        """Yield results in the order of the chunks, so that sums do not depend on the timing of threads."""
        self.progress.start_phase(phase, len(self.chunks), finished=False)
        results = self.pool.map(function, self.chunks)
        for number, (chunk, result) in enumerate(zip(self.chunks, results, strict=True), start=1):
            self.progress.on_step(number, {"chunk": number})
            yield chunk, result

    def make_folder(self, folder: Path, tensors: Sequence[Tensor]) -> SafetensorsWriter:
        """Create a model folder with init's config and tokenizer, and weight files to fill."""
        folder.mkdir(parents=True)
        for path in self.inputs.init.sidecars():
            if path.name != EXPORT_REPORT:  # it says what init was exported from, not the merge
                shutil.copy(path, folder / path.name)
        if self.settings.dtype and (folder / "config.json").is_file():
            config = files.read_json(folder / "config.json")
            changed = {key: self.settings.dtype for key in ("dtype", "torch_dtype") if key in config}
            files.write_json(folder / "config.json", config | changed)
        return SafetensorsWriter(folder, tensors)

    def make_report(
        self, inner: np.ndarray, coefficients: np.ndarray, delivered: np.ndarray, hashes: Sequence[str]
    ) -> dict[str, Any]:
        """Contents of merge_report.json, without its warnings."""
        inputs = self.inputs
        columns = {
            "name": list(self.units),
            "angles_degrees": np.degrees(angles(inner)).tolist(),
            "norms": norms(inner).tolist(),
            "coefficients": coefficients.tolist(),
            "delivered": [self.describe(sums) for sums in delivered],
        }
        if self.settings.lines_alpha is not None:
            columns["eta_share"] = self.shares.tolist()
        if self.settings.method == "slerp" and self.settings.weights is None and len(inputs.policies) > 2:
            columns["order_spread"] = order_spread(inner).tolist()
        return {
            **self.settings._asdict(),
            "init": str(inputs.init.path),
            "policies": [str(policy.path) for policy in inputs.policies],
            "xxh3_128": dict(zip(map(str, inputs.weight_paths()), hashes, strict=True)),
            "not_in_a_layer": inputs.outside_layers,
            "copied": list(inputs.copied),
            "skipped": list(inputs.skipped),
            "delivered": self.describe(delivered.sum(0)),
            "units": [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)],
        }

    def describe(self, sums: np.ndarray) -> list[dict[str, float | None]]:
        """Delivered share and relative error at each eta (None at eta 0), from sums [E, 3]."""
        return [
            {"eta": eta, "share": found.share, "relative_error": found.relative_error}
            for eta, found in zip(self.settings.etas, (rounding.Delivery(*row.tolist()) for row in sums), strict=True)
        ]

    def find_warnings(self, inner: np.ndarray, noises: np.ndarray, delivered: np.ndarray) -> list[str]:
        """One line for each eta with a unit whose share is not near 1, and for each pair of nearly equal policies.

        With stochastic rounding, the share of the whole model counts.
        """
        warnings = []
        at_random = self.settings.rounding == "stochastic"  # exact in the mean; small units differ by chance
        remedy = "--dtype=float32" if at_random else "--round=stochastic or --dtype=float32"
        for eta, sums in zip(self.settings.etas, delivered.swapaxes(0, 1), strict=True):
            whole, *found = (rounding.Delivery(*row.tolist()) for row in (sums.sum(0), *sums))
            parts = {"the model": whole} if at_random else dict(zip(self.units, found, strict=True))
            line = rounding.warning(whole, {name: part.share for name, part in parts.items()})
            warnings += [f"eta {eta:g}: {line}; use {remedy}"] if line else []
        degrees = np.degrees(angles(inner))
        for b, a in zip(*np.tril_indices(len(self.inputs.policies), -1), strict=True):
            apart = inner[:, a, a] + inner[:, b, b] - 2 * inner[:, a, b]  # squared distance
            noise = noises[:, a] + noises[:, b]
            near = np.flatnonzero((apart <= noise) & (noise > 0))
            if len(near):
                unit, paths = near[0], (self.inputs.policies[a].path, self.inputs.policies[b].path)
                reason = "their task vectors are mostly rounding" if apart[unit] > 0 else "is it the same policy twice?"
                warnings.append(
                    f"{paths[0]} and {paths[1]} are closer than their rounding in {len(near)} of {len(noises)} units "
                    f"({self.units[unit]}: {degrees[unit, a, b]:.2f} degrees); {reason}"
                )
        return warnings


def _eta_folder(eta: float) -> str:
    return f"eta_{eta:g}"


def _shared_names(inputs: Inputs) -> dict[str, str]:
    """For each tensor outside layers, the first name of its shape: it chooses the random numbers of all of them.

    A head that is stored beside the embedding, but tied to it, is rounded like the embedding.
    """
    shapes = {name: inputs.init.tensors[name].shape for name in sorted(inputs.outside_layers, reverse=True)}
    first = {shape: name for name, shape in shapes.items()}
    return {name: first[shape] for name, shape in shapes.items()}


def _output_tensor(inputs: Inputs, name: str, dtype: np.dtype | None) -> Tensor:
    tensor = inputs.policies[0].tensors[name]._replace(file=inputs.init.tensors[name].file)
    return tensor if dtype is None else tensor._replace(dtype=dtype)
