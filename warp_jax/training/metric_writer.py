"""Numbers over time: metrics.jsonl and TensorBoard files of one stage."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import tensorboardX

from warp_jax import files


class MetricWriter:
    """Append rows {step, name: number} to `directory`. Opened again at a step, it drops the rows from there on,
    so that a stage that was killed and resumed leaves each step once.
    """

    def __init__(self, directory: Path, start_step: int = 0):
        path = directory / "metrics.jsonl"
        kept = [row for row in read_rows(path) if row["step"] < start_step]
        files.write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = path.open("a")
        self._tensorboard = tensorboardX.SummaryWriter(str(directory), purge_step=start_step, write_to_disk=True)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Record one step. Values are numbers, or arrays of one number."""
        row = {"step": step} | {name: float(value) for name, value in values.items()}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name in values:
            self._tensorboard.add_scalar(name, row[name], step)

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._tensorboard.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All complete rows of a JSONL file; a last line cut short by a kill is left out, a missing file is empty."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
