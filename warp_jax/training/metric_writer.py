"""Metrics of each training step, written to metrics.jsonl and to TensorBoard files."""

import io
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from warp_jax import files

FILE = "metrics.jsonl"


class Observer(Protocol):
    """Gets the rows of a metrics.jsonl: at the start those that are kept, then each new one."""

    def write(self, row: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class MetricWriter:
    """Appends one row {step, name: number, ...} per step; rows of start_step and later steps are deleted first.

    Files in a bucket can be replaced, but not appended to: `publish` copies all rows up to now there.
    """

    def __init__(self, directory: Path, start_step: int = 0, observer: Observer | None = None):
        kept = read_rows(directory / FILE)[:start_step]
        self._directory, self._temporary = directory, None
        if files.is_remote(directory):
            self._temporary = tempfile.TemporaryDirectory()
            directory = Path(self._temporary.name)
        path = directory / FILE
        files.write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._tensorboard = _tensorboard().SummaryWriter(str(directory), purge_step=start_step, write_to_disk=True)
        self._file = path.open("a")
        self._observer = observer
        if observer:
            for row in kept:
                observer.write(row)
        self.publish()

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Write the row of a step; values: numbers or arrays of one element."""
        row = {"step": step} | {name: float(value) for name, value in values.items()}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name in values:
            self._tensorboard.add_scalar(name, row[name], step)
        if self._observer:
            self._observer.write(row)

    def publish(self) -> None:
        """Make all rows up to now visible in a bucket; in a local folder they already are."""
        if self._temporary:
            self._tensorboard.flush()
            for path in Path(self._temporary.name).iterdir():
                files.write_bytes(self._directory / path.name, path.read_bytes())

    def close(self) -> None:
        """Close the files and, whatever fails, the observer."""
        try:
            self._file.close()
            self._tensorboard.close()
            self.publish()
            if self._temporary:
                self._temporary.cleanup()
        finally:
            if self._observer:
                self._observer.close()


def write_image(directory: Path, name: str, png: bytes) -> None:
    """Write a picture as a TensorBoard file, in place of the one that an earlier call wrote there."""
    with tempfile.TemporaryDirectory() as temporary:
        with _tensorboard().SummaryWriter(temporary, write_to_disk=True) as writer:
            writer.add_image(name, np.asarray(Image.open(io.BytesIO(png)).convert("RGB")), dataformats="HWC")
        (written,) = Path(temporary).iterdir()
        files.write_bytes(directory / f"events.out.tfevents.0.{name}", written.read_bytes())


def _tensorboard() -> Any:
    """The package tensorboardX, without torch, which it would import for a second where that is installed."""
    hides = "torch" not in sys.modules
    if hides:
        sys.modules["torch"] = None  # type: ignore[assignment]  # `import torch` raises ImportError
    try:
        import tensorboardX  # noqa: PLC0415
    finally:
        if hides:
            del sys.modules["torch"]
    return tensorboardX


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a JSONL file up to its first incomplete line (left by a kill); a missing file has no rows."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_bytes().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
