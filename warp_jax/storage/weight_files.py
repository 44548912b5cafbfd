"""Read and write ranges of weights on disk: Hugging Face safetensors folders, and Orbax checkpoints of this project.

Weights are read only on request, so a program can hold a small part of a model in memory.
"""

import abc
import hashlib
import itertools
import mmap
import os
import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import xxhash

from warp_jax import files, naming
from warp_jax.storage import manifest, model_files
from warp_jax.storage.model_files import ADAPTER, CONFIG, INDEX, SINGLE
from warp_jax.storage.safetensors_header import DTYPES, FLOATING, Tensor, make_header, read_header

OUTPUT_DTYPES = {DTYPES[name].name: DTYPES[name] for name in ("F64", "F32", "F16", "BF16")}
# names of tensors that only quantised models store: FP8, GPTQ, AWQ, bitsandbytes, compressed tensors
QUANTISED = re.compile(
    r"(.*\.)?((weight|input)_scale[^.]*|qweight|qzeros|g_idx|SCB|absmax|weight_packed|weight_zero_point"
    r"|quant_map|quant_state\..*)"
)
SCALE = re.compile(r".*scale[^.]*")  # the scale of codes, if their module stores codes of a byte
_DEQUANTISE = "quantised weights are not supported; convert the model to bfloat16 or float32 first"


class WeightFolder(abc.ABC):
    """Folder of named tensors; several threads can read their elements."""

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

    def bytes_per_element(self) -> int:
        """Memory of a view, per element."""
        return max(tensor.dtype.itemsize for tensor in self.tensors.values())

    def sidecars(self) -> Sequence[Path]:
        """Paths of the other files of the model: config, tokenizer."""
        return []


def open_weights(path: Path) -> WeightFolder:
    """Open a safetensors folder or an Orbax checkpoint.

    Raises ValueError for any other folder, a damaged one, or quantised weights.
    """
    if (path / "_METADATA").is_file():
        if damage := manifest.damage(path, with_logs=False):
            raise ValueError(f"{damage}; make {path} again, or copy it again")
        folder: WeightFolder = OrbaxFolder(path)
    else:
        chosen = model_files.find(path)
        folder = SafetensorsFolder(path, chosen.weights, chosen.weight_map)
        _check_not_quantised(folder)
    if not folder.tensors:
        raise ValueError(f"{path}: contains no tensors; want the weights of a model")
    return folder


def hash_file(path: Path) -> str:
    """Hash a file with XXH3 (128 bits): ten times faster than SHA-256, but not safe against an attacker."""
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


class SafetensorsFolder(WeightFolder):
    """A folder of one or several safetensors files."""

    def __init__(self, path: Path, names: Sequence[str], weight_map: Mapping[str, str] | None = None):
        """weight_map: file of each tensor in the index. Raises ValueError for a damaged file or a wrong index."""
        super().__init__(path)
        self._offsets: dict[str, int] = {}
        self._maps: dict[str, mmap.mmap] = {}
        for name in names:
            for tensor, offset in read_header(path, name):
                if weight_map is not None and (want := weight_map.get(tensor.name)) != name:
                    there = f"says that it is in {want}" if want else "does not list it"
                    raise ValueError(f"{path / name}: tensor {tensor.name!r}: {INDEX} {there}; download both again")
                self.tensors[tensor.name] = tensor
                self._offsets[tensor.name] = offset
            with (path / name).open("rb") as file:
                self._maps[name] = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        for name in sorted((weight_map or {}).keys() - self.tensors.keys()):
            raise ValueError(f"{path / (weight_map or {})[name]}: tensor {name!r} is missing; {INDEX} lists it")

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
        return model_files.find(self.path).sidecars


class OrbaxFolder(WeightFolder):
    """A checkpoint of parameters saved with Orbax, e.g. by `checkpoint.save_params`: zarr or zarr3, OCDBT or not.

    Tensors are named by their paths, joined by '/'. A tensor is read whole, and stays in memory until another is read.
    """

    def __init__(self, path: Path):
        super().__init__(path)
        self._lock = threading.Lock()
        self._held: tuple[str, np.ndarray] = ("", np.zeros(0))
        self._stores: dict[str, Any] = {}
        try:
            metadata = files.parse_object((path / "_METADATA").read_bytes())
            for entry in metadata["tree_metadata"].values():
                keys = [str(part["key"]) for part in entry["key_metadata"]]
                name = "/".join(keys)
                if name in self._stores:
                    raise ValueError(f"two arrays have the name {name!r}")
                if keys[0] == "opt_state":
                    raise ValueError("it is a training state; give the folder of its parameters (params)")
                store = self._stores[name] = _open_array(path, ".".join(keys), metadata)
                layers = store.shape[0] if naming.is_stacked(name) and store.shape else 1
                self.tensors[name] = Tensor(name, store.dtype.numpy_dtype, store.shape, SINGLE, layers)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, OSError) as error:
            reason = str(error).split(" [tensorstore_spec=")[0].replace("\n", " ")
            raise ValueError(f"{path}: not an Orbax checkpoint of parameters: {reason}") from error

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
            (folder / file).parent.mkdir(exist_ok=True, parents=True)
            descriptor = os.open(folder / file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            starts = [0, *itertools.accumulate(tensor.nbytes for tensor in members)]
            header = make_header(members, starts)
            os.posix_fallocate(descriptor, 0, len(header) + starts[-1])
            os.pwrite(descriptor, header, 0)
            for tensor, start in zip(members, starts[:-1], strict=True):
                self._places[tensor.name] = (descriptor, len(header) + start, tensor.dtype)
        if by_file.keys() not in ({SINGLE}, {ADAPTER}):
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


def _open_array(path: Path, name: str, metadata: Mapping[str, Any]) -> Any:
    """Open an array of an Orbax checkpoint, in the format that its metadata states."""
    import tensorstore  # noqa: PLC0415  not needed for safetensors

    place: dict[str, Any] = {"driver": "file", "path": f"{path.absolute()}/{name}/"}
    if metadata.get("use_ocdbt", True):
        place = {"driver": "ocdbt", "base": f"file://{path.absolute()}/", "path": f"{name}/"}
    driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
    return tensorstore.open({"driver": driver, "kvstore": place}, open=True).result()


def _check_not_quantised(folder: WeightFolder) -> None:
    config = model_files.read_config(folder.path)
    for part in (config, config.get("text_config")):
        for field in ("quantization_config", "compression_config"):
            if isinstance(part, dict) and part.get(field):
                raise ValueError(f"{folder.path / CONFIG}: field {field!r} is set: {_DEQUANTISE}")
    bytewise = {_module(t.name) for t in folder.tensors.values() if t.dtype.itemsize == 1 and t.dtype != bool}
    for name, tensor in folder.tensors.items():
        is_scale = SCALE.fullmatch(name) and _module(name) in bytewise
        if is_scale or QUANTISED.fullmatch(name) or (name.endswith(".weight") and tensor.dtype not in FLOATING):
            raise ValueError(f"{folder.path / tensor.file}: tensor {name!r} ({tensor.dtype}): {_DEQUANTISE}")


def _module(name: str) -> str:
    return name.rpartition(".")[0]
