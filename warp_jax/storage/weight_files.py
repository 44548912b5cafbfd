"""Read and write ranges of weights on disk: Hugging Face safetensors folders, and Orbax checkpoints of this project.

Weights are read only on request, so a program can hold a small part of a model in memory.
"""

import abc
import hashlib
import itertools
import json
import math
import mmap
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import ml_dtypes
import numpy as np
import xxhash

from warp_jax import files, naming

INDEX = "model.safetensors.index.json"
SIDECARS = (".json", ".txt", ".model", ".jinja", ".tiktoken")
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
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
OUTPUT_DTYPES = {DTYPES[name].name: DTYPES[name] for name in ("F64", "F32", "F16", "BF16")}
NAME_OF_DTYPE = {dtype: name for name, dtype in DTYPES.items()}


class Tensor(NamedTuple):
    """Description of one tensor in a folder."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    file: str  # name of the file that contains it
    num_layers: int = 1  # above 1: the first axis runs over the layers

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


class WeightFolder(abc.ABC):
    """Folder of named tensors, whose elements several threads can read."""

    def __init__(self, path: Path):
        self.path = path
        self.tensors: dict[str, Tensor] = {}

    @abc.abstractmethod
    def view(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return elements start .. stop - 1 of a tensor as a flat array; do not write to it."""

    def release(self, name: str, start: int, stop: int) -> None:  # noqa: B027  by default, nothing to release
        """Release the memory of a view. The view stays valid."""

    @abc.abstractmethod
    def weight_paths(self) -> Sequence[Path]:
        """Paths of the weight files."""

    def sidecars(self) -> Sequence[Path]:
        """Paths of the other files of the model: config, tokenizer."""
        return []


def open_weights(path: Path) -> WeightFolder:
    """Open a safetensors folder or an Orbax checkpoint. Raises ValueError for any other folder, or a damaged one."""
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder; want a safetensors folder or an Orbax checkpoint")
    if (path / "_METADATA").is_file():
        return OrbaxFolder(path)
    if names := _safetensors_names(path):
        return SafetensorsFolder(path, names)
    if pickled := sorted(p.name for p in path.iterdir() if p.suffix in PICKLED):
        raise ValueError(
            f"{path}: contains {pickled[0]}, a pickle that can run code; want .safetensors files; convert it first"
        )
    raise ValueError(f"{path}: contains no .safetensors file and is no Orbax checkpoint; want one of the two")


def hash_file(path: Path) -> str:
    """Hash a file with XXH3 (128 bits): ten times faster than SHA-256, but not safe against an attacker."""
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


class SafetensorsFolder(WeightFolder):
    """A folder of one or several safetensors files (https://github.com/huggingface/safetensors#format)."""

    def __init__(self, path: Path, names: Sequence[str]):
        super().__init__(path)
        self._offsets: dict[str, int] = {}
        self._maps: dict[str, mmap.mmap] = {}
        for name in names:
            for tensor, offset in _read_header(path / name):
                if tensor.name in self.tensors:
                    raise ValueError(
                        f"{path}: tensor {tensor.name!r} is in both {name} and {self.tensors[tensor.name].file}"
                    )
                self.tensors[tensor.name] = tensor
                self._offsets[tensor.name] = offset
            with (path / name).open("rb") as file:
                self._maps[name] = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)

    def view(self, name: str, start: int, stop: int) -> np.ndarray:
        first, last = self._byte_range(name, start, stop)
        tensor = self.tensors[name]
        return np.frombuffer(self._maps[tensor.file], np.uint8)[first:last].view(tensor.dtype)

    def release(self, name: str, start: int, stop: int) -> None:
        """See WeightFolder: pages of a mapped file count as memory of the process until they are released."""
        first, last = self._byte_range(name, start, stop)
        first -= first % mmap.PAGESIZE
        if last > first:
            self._maps[self.tensors[name].file].madvise(mmap.MADV_DONTNEED, first, last - first)

    def _byte_range(self, name: str, start: int, stop: int) -> tuple[int, int]:
        offset, size = self._offsets[name], self.tensors[name].dtype.itemsize
        return offset + start * size, offset + stop * size

    def weight_paths(self) -> Sequence[Path]:
        return [self.path / name for name in self._maps]

    def sidecars(self) -> Sequence[Path]:
        return [p for p in sorted(self.path.iterdir()) if p.is_file() and p.suffix in SIDECARS and p.name != INDEX]


class OrbaxFolder(WeightFolder):
    """A checkpoint of `checkpoint.save_params`. Tensors are named by their paths, joined by '/'.

    A tensor is read whole, and stays in memory until another one is read.
    """

    def __init__(self, path: Path):
        import tensorstore  # noqa: PLC0415  not needed for safetensors

        super().__init__(path)
        self._lock = threading.Lock()
        self._held: tuple[str, np.ndarray] = ("", np.zeros(0))
        self._stores: dict[str, Any] = {}
        try:
            for entry in files.read_json(path / "_METADATA")["tree_metadata"].values():
                name = "/".join(str(part["key"]) for part in entry["key_metadata"])
                place = {"driver": "ocdbt", "base": f"file://{path.absolute()}/", "path": f"{name.replace('/', '.')}/"}
                store = self._stores[name] = tensorstore.open({"driver": "zarr", "kvstore": place}, open=True).result()
                layers = store.shape[0] if naming.is_stacked(name) else 1
                self.tensors[name] = Tensor(name, store.dtype.numpy_dtype, store.shape, "model.safetensors", layers)
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise ValueError(f"{path}: not an Orbax checkpoint of parameters: {error}") from error

    def view(self, name: str, start: int, stop: int) -> np.ndarray:
        with self._lock:
            if self._held[0] != name:
                self._held = ("", np.zeros(0))
                self._held = (name, self._stores[name].read().result().reshape(-1))
            return self._held[1][start:stop]

    def weight_paths(self) -> Sequence[Path]:
        return sorted(p for p in self.path.rglob("*") if p.is_file())


class SafetensorsWriter:
    """Writer of safetensors files whose tensors are known in advance; several threads can write, in any order."""

    def __init__(self, folder: Path, tensors: Sequence[Tensor]):
        """Create the files at their full size. Raises OSError at once if the disk is full."""
        self._places: dict[str, tuple[int, int, np.dtype]] = {}
        by_file: dict[str, list[Tensor]] = {}
        for tensor in tensors:
            by_file.setdefault(tensor.file, []).append(tensor)
        for file, members in by_file.items():
            descriptor = os.open(folder / file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            starts = [0, *itertools.accumulate(tensor.nbytes for tensor in members)]
            header = _make_header(members, starts)
            os.posix_fallocate(descriptor, 0, len(header) + starts[-1])
            os.pwrite(descriptor, header, 0)
            for tensor, start in zip(members, starts[:-1], strict=True):
                self._places[tensor.name] = (descriptor, len(header) + start, tensor.dtype)
        if len(by_file) > 1:
            total_size = sum(tensor.nbytes for tensor in tensors)
            weight_map = {tensor.name: tensor.file for tensor in tensors}
            files.write_json(folder / INDEX, {"metadata": {"total_size": total_size}, "weight_map": weight_map})

    def write(self, name: str, start: int, values: np.ndarray) -> None:
        """Write flat values as the elements of a tensor from index `start` on."""
        descriptor, offset, dtype = self._places[name]
        view = memoryview(cast(Any, np.ascontiguousarray(values, dtype).view(np.uint8)))
        offset += start * dtype.itemsize
        while view:
            count = os.pwrite(descriptor, view, offset)
            view, offset = view[count:], offset + count

    def close(self) -> None:
        for descriptor in {descriptor for descriptor, _, _ in self._places.values()}:
            os.close(descriptor)


def _safetensors_names(path: Path) -> list[str]:
    """Names of the weight files of a folder: those in its index, or all if it has no index."""
    if not (path / INDEX).is_file():
        return sorted(p.name for p in path.glob("*.safetensors"))
    try:
        names = sorted(set(map(str, files.read_json(path / INDEX)["weight_map"].values())))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path / INDEX}: not an index of safetensors files ({error}); download it again") from error
    if missing := [name for name in names if not (path / name).is_file()]:
        raise ValueError(f"{path}: {missing[0]} is missing; {INDEX} lists it")
    return names


def _read_header(path: Path) -> Iterator[tuple[Tensor, int]]:
    """Yield each tensor of a safetensors file and the offset of its first byte."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, MAX_HEADER_BYTES):
            raise ValueError(
                f"{path}: truncated or corrupted: the header does not fit into {size} bytes; download it again"
            )
        text = file.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        end = 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            tensor = Tensor(name, DTYPES[entry["dtype"]], tuple(map(int, entry["shape"])), path.name)
            if entry["data_offsets"] != [end, end + tensor.nbytes]:
                raise ValueError(f"tensor {name!r} has data_offsets {entry['data_offsets']}")
            yield tensor, 8 + length + end
            end = entry["data_offsets"][1]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: corrupted safetensors header: {error}; download it again") from error
    if size != 8 + length + end:
        raise ValueError(
            f"{path}: truncated or corrupted: got {size} bytes, want {8 + length + end}; download it again"
        )


def _make_header(tensors: Sequence[Tensor], starts: Sequence[int]) -> bytes:
    """Header of a safetensors file. starts: byte offset of each tensor in the data, then the size of the data."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers requires a format
    for tensor, *data_offsets in zip(tensors, starts[:-1], starts[1:], strict=True):
        dtype, shape = NAME_OF_DTYPE[tensor.dtype], list(tensor.shape)
        entries[tensor.name] = {"dtype": dtype, "shape": shape, "data_offsets": data_offsets}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
