"""Read and write the header of a safetensors file (https://github.com/huggingface/safetensors#format).

A file is the length of the header (8 bytes), the header (JSON: dtype, shape and data_offsets of each tensor), the data.
"""

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from warp_jax import files

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    **{f"{kind}{8 * size}": np.dtype(f"{kind.lower()}{size}") for kind in "IU" for size in (1, 2, 4, 8)},
    "BOOL": np.dtype(bool),
}
FLOATING = frozenset(dtype for name, dtype in DTYPES.items() if name.startswith(("F", "BF")))
NAME_OF_DTYPE = {dtype: name for name, dtype in DTYPES.items()}


class Tensor(NamedTuple):
    """Description of one tensor in a folder."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    file: str  # path of its file, relative to the folder
    num_layers: int = 1  # above 1: the first axis runs over the layers

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


def read_header(folder: Path, file: str) -> list[tuple[Tensor, int]]:
    """Return each tensor of a file in a folder, with the offset of its first byte. Raises ValueError for a bad file."""
    path = folder / file
    try:
        size = path.stat().st_size
        with path.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            text = opened.read(length) if length <= min(size - 8, MAX_HEADER_BYTES) else None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    if text is None:
        raise ValueError(
            f"{path}: truncated or corrupted: the header does not fit into {size} bytes; download it again"
        )
    try:
        header = files.parse_object(text)
        header.pop("__metadata__", None)
        tensors = [(_describe(name, entry, file), entry["data_offsets"]) for name, entry in header.items()]
        tensors.sort(key=lambda item: item[1])
        starts = [0, *itertools.accumulate(tensor.nbytes for tensor, _ in tensors)]
        for (tensor, offsets), want in zip(tensors, itertools.pairwise(starts), strict=True):
            if offsets != list(want):
                raise ValueError(f"tensor {tensor.name!r} has data_offsets {offsets}, want {list(want)}")
    except NotImplementedError as error:
        raise ValueError(f"{path}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: corrupted safetensors header: {error}; download it again") from error
    first = 8 + length
    if size != first + starts[-1]:
        raise ValueError(
            f"{path}: truncated or corrupted: got {size} bytes, want {first + starts[-1]}; download it again"
        )
    return [(tensor, first + start) for (tensor, _), start in zip(tensors, starts[:-1], strict=True)]


def make_header(tensors: Sequence[Tensor], starts: Sequence[int]) -> bytes:
    """Header of a safetensors file. starts: byte offset of each tensor in the data, then the size of the data."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers requires a format
    for tensor, *data_offsets in zip(tensors, starts[:-1], starts[1:], strict=True):
        dtype, shape = NAME_OF_DTYPE[tensor.dtype], list(tensor.shape)
        entries[tensor.name] = {"dtype": dtype, "shape": shape, "data_offsets": data_offsets}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _describe(name: str, entry: Any, file: str) -> Tensor:
    """Check one entry of a header. Raises NotImplementedError if only its dtype is not supported."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name!r} has {entry!r:.80}, want dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not (isinstance(dtype, str) and _is_counts(shape) and _is_counts(offsets) and len(offsets) == 2):
        raise ValueError(f"tensor {name!r} has {entry!r:.80}, want a name, whole numbers and two whole numbers")
    if dtype not in DTYPES:
        raise NotImplementedError(
            f"tensor {name!r} has dtype {dtype!r}, which is not supported, want one of {', '.join(DTYPES)}"
        )
    return Tensor(name, DTYPES[dtype], tuple(shape), file)


def _is_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)
