"""Metrics of each training step, written to metrics.jsonl and to TensorBoard files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from warp_jax import files


class MetricWriter:
    """Writer of one row {step, name: number, ...} for each step, used as a context manager.

    Rows of start_step and later steps are deleted first, so that a resumed training has each step once.
    """

    def __init__(self, directory: Path, start_step: int = 0):
        import tensorboardX  # noqa: PLC0415  imports torch where that is installed

        path = directory / "metrics.jsonl"
        kept = [row for row in read_rows(path) if row["step"] < start_step]
        files.write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = path.open("a")
        self._tensorboard = tensorboardX.SummaryWriter(str(directory), purge_step=start_step, write_to_disk=True)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append the row of one step; values are numbers or arrays with one element."""
        row = {"step": step} | {name: float(value) for name, value in values.items()}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name in values:
            self._tensorboard.add_scalar(name, row[name], step)

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        self._tensorboard.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a JSONL file up to its first incomplete line (left by a kill); a missing file has no rows."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
