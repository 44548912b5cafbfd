"""Metrics of each training step, written to metrics.jsonl and to TensorBoard files."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from warp_jax import files


@contextlib.contextmanager
def open_metrics(directory: Path, start_step: int = 0) -> Iterator[Callable[[int, Mapping[str, Any]], None]]:
    """Yield a function that appends one row {step, name: number, ...}; its values are numbers or arrays of one element.

    Rows of start_step and later steps are deleted first, so that a resumed training has each step once.
    """
    import tensorboardX  # noqa: PLC0415  imports torch where that is installed

    path = directory / "metrics.jsonl"
    kept = [row for row in read_rows(path) if row["step"] < start_step]
    files.write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
    tensorboard = tensorboardX.SummaryWriter(str(directory), purge_step=start_step, write_to_disk=True)
    with path.open("a") as file, contextlib.closing(tensorboard):

        def write(step: int, values: Mapping[str, Any]) -> None:
            row = {"step": step} | {name: float(value) for name, value in values.items()}
            file.write(json.dumps(row) + "\n")
            file.flush()
            for name in values:
                tensorboard.add_scalar(name, row[name], step)

        yield write


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
