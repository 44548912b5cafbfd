"""Inputs of a merge on disk: check that the folders hold the same tensors, and cut the weights into chunks."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np

from warp_jax import naming
from warp_jax.merging import units
from warp_jax.storage.lora_folder import LoraFolder, is_adapter
from warp_jax.storage.safetensors_header import FLOATING
from warp_jax.storage.weight_files import WeightFolder, open_weights

MAX_CHUNK = 1 << 20  # elements; larger chunks are not faster
MIN_CHUNK = 1 << 12  # elements; smaller chunks take longer to start than to compute


class Piece(NamedTuple):
    """Elements start .. stop - 1 of a tensor."""

    name: str
    start: int
    stop: int


class Chunk(NamedTuple):
    """Pieces of one unit, processed together by one thread."""

    unit: int
    pieces: tuple[Piece, ...]


class Inputs(NamedTuple):
    """Open folders that hold the same tensors, except for the skipped ones."""

    init: WeightFolder
    policies: tuple[WeightFolder, ...]
    merged: tuple[str, ...]  # names of the floating-point tensors
    copied: tuple[str, ...]  # names of the tensors that are not floats, which are equal in all folders
    skipped: tuple[str, ...]  # names of the tensors of init that policies may lack or hold in another shape

    @property
    def folders(self) -> tuple[WeightFolder, ...]:
        """Init, then the policies."""
        return (self.init, *self.policies)

    @property
    def outside_layers(self) -> list[str]:
        """Names of merged tensors that belong to no transformer layer: embedding, final norm, head."""
        tensors = self.init.tensors
        return [name for name in self.merged if tensors[name].num_layers == 1 and not naming.in_layer(name)]

    def weight_paths(self) -> list[Path]:
        """Weight files of all folders."""
        return [path for folder in self.folders for path in folder.weight_paths()]


def open_inputs(init: Path, policies: Sequence[Path], dtype: str | None, skip: str | None = None) -> Inputs:
    """Open all folders. Raises ValueError if they do not hold the same tensors.

    policies: whole models, or LoRA adapters of init. dtype: name of the dtype of the result. If None, the
    dtypes of the tensors must be the same in all folders too. skip: regular expression; tensors in whose names it is
    found are not merged and not compared.
    """
    first = open_weights(init)
    others = [LoraFolder(path, first) if is_adapter(path) else open_weights(path) for path in policies]
    skipped = set[str]().union(*(_matching(skip, folder) for folder in (first, *others)))
    if skip is not None and not skipped:
        raise ValueError(f"skip: got {skip!r}, which matches no tensor of {init} or a policy; want a part of a name")
    for other in others:
        _check_same_tensors(first, other, dtype, skipped)
    kept = {name: tensor for name, tensor in first.tensors.items() if name not in skipped}
    merged = tuple(name for name, tensor in kept.items() if tensor.dtype in FLOATING)
    copied = tuple(name for name, tensor in kept.items() if tensor.dtype not in FLOATING)
    if not merged:
        raise ValueError(f"{init}: contains no floating-point tensors to merge; want the weights of a model")
    if any(kept[name].num_layers > 1 for name in merged):
        _check_stacks(init, {name: kept[name].shape for name in merged})
    return Inputs(first, tuple(others), merged, copied, tuple(name for name in first.tensors if name in skipped))


def _check_stacks(init: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    try:
        units.check_stacks(shapes)
    except ValueError as error:
        raise ValueError(f"{init}: {error}; merge such weights in memory, where layer_axis can be set") from error


def _matching(skip: str | None, folder: WeightFolder) -> set[str]:
    """Names of the tensors to skip."""
    try:
        return {name for name in folder.tensors if skip is not None and re.search(skip, name)}
    except re.error as error:
        raise ValueError(f"skip: got {skip!r}, want a regular expression: {error}") from error


def _check_same_tensors(init: WeightFolder, other: WeightFolder, dtype: str | None, skipped: set[str]) -> None:
    for name in sorted((init.tensors.keys() ^ other.tensors.keys()) - skipped):
        has, lacks = (init, other) if name in init.tensors else (other, init)
        raise ValueError(f"{lacks.path}: tensor {name!r} is missing; it is in {has.path}")
    for name, want in init.tensors.items():
        if name in skipped:
            continue
        got = other.tensors[name]
        if got.shape != want.shape:
            raise ValueError(
                f"{other.path}: tensor {name!r} has shape {got.shape}, want {want.shape} as in {init.path}; or skip it"
            )
        if got.dtype != want.dtype and (dtype is None or not {got.dtype, want.dtype} <= FLOATING):
            raise ValueError(
                f"{other.path}: tensor {name!r} is {got.dtype}, want {want.dtype} as in {init.path}; or set --dtype"
            )
        whole = (name, 0, want.size)
        if want.dtype not in FLOATING and not np.array_equal(init.view(*whole), other.view(*whole)):
            raise ValueError(
                f"{other.path}: tensor {name!r}: {want.dtype} values differ from {init.path}; only floats can be merged"
            )


def chunk_room(inputs: Inputs, memory_gb: float, workers: int) -> int:
    """Largest size of a chunk, in elements. Raises ValueError if memory_gb is too small."""
    bytes_each = sum(folder.bytes_per_element() for folder in inputs.folders)
    room = memory_gb * 1e9 / workers / bytes_each
    if not room >= MIN_CHUNK:  # also refuses NaN
        need = MIN_CHUNK * workers * bytes_each / 1e9
        raise ValueError(f"memory_gb: got {memory_gb:g}, want {need:.2g} or more for {len(inputs.policies)} policies")
    return int(min(room, MAX_CHUNK))


def plan_chunks(inputs: Inputs, unit: units.Unit, room: int) -> tuple[tuple[str, ...], list[Chunk]]:
    """Return the names of the units, and all weights cut into chunks of at most `room` elements."""
    unit_of = units.unit_function(unit)
    pieces: dict[str, list[Piece]] = {}
    for name in inputs.merged:
        rows, tensor = row_names(inputs, name), inputs.init.tensors[name]
        size = tensor.size // len(rows)
        for row, row_name in enumerate(rows):
            pieces.setdefault(unit_of(row_name), []).append(Piece(name, row * size, (row + 1) * size))
    chunks = [Chunk(number, part) for number, members in enumerate(pieces.values()) for part in _cut(members, room)]
    return tuple(pieces), chunks


def row_names(inputs: Inputs, name: str) -> list[str]:
    """Names of the layers of a tensor that holds several; else its own name."""
    count = inputs.init.tensors[name].num_layers
    return naming.layer_names(name, count) if count > 1 else [name]


def whole_pieces(inputs: Inputs) -> Iterator[Piece]:
    """Yield pieces of at most MAX_CHUNK elements of the tensors that are copied from init."""
    for name in (*inputs.copied, *inputs.skipped):
        size = inputs.init.tensors[name].size
        for (piece,) in _cut([Piece(name, 0, size)], MAX_CHUNK):
            yield piece


def _cut(pieces: Sequence[Piece], room: int) -> Iterator[tuple[Piece, ...]]:
    """Group pieces, cut where needed, into groups of `room` elements; the last group may be smaller."""
    group: list[Piece] = []
    left = room
    for piece in pieces:
        start = piece.start
        while start < piece.stop:
            stop = min(piece.stop, start + left)
            group.append(Piece(piece.name, start, stop))
            left -= stop - start
            start = stop
            if not left:
                yield tuple(group)
                group, left = [], room
    if group:
        yield tuple(group)


def raise_not_finite(inputs: Inputs, chunk: Chunk) -> NoReturn:
    """Raise ValueError naming the first tensor of the chunk that holds NaN or Inf."""
    for folder in inputs.folders:
        for piece in chunk.pieces:
            if not np.isfinite(folder.view(*piece).astype(np.float64)).all():
                raise ValueError(f"{folder.path}: tensor {piece.name!r} holds NaN or Inf")
    raise ValueError(f"tensor {chunk.pieces[0].name!r}: weights are too large, their products overflow float64")
