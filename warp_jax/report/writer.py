"""Files of the report: front.csv, front.png and summary.json of a finished job, and report.html at any time."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from warp_jax import files
from warp_jax.evaluation import columns, plots, summary
from warp_jax.evaluation.points import Point
from warp_jax.report import data, page
from warp_jax.report.data import HeldOut
from warp_jax.settings import Settings
from warp_jax.training import metric_writer

PAGE = "report.html"


def write_report(
    settings: Settings, held_out: HeldOut, points: Sequence[Point], workdir: Path, progress: Mapping[str, Any]
) -> str:
    """Write all files into workdir and return the summary line. points: those of the whole job, SFT first."""
    matplotlib.use("Agg")
    numbers = summary.summarise(settings, points)
    results = data.make_results(settings, workdir, points, numbers)
    files.write_text(workdir / "front.csv", columns.to_csv(results.rows))
    front = plots.draw_fronts(results.rows)
    files.write_bytes(workdir / "front.png", front)
    metric_writer.write_image(workdir, "front", front)
    files.write_text(workdir / PAGE, page.render([data.gather(results, held_out, progress)]))
    files.write_json(workdir / "summary.json", numbers)  # the last file: an unfinished job has a page, but no summary
    return f"{summary.one_line(numbers)}; report: {workdir / PAGE}"


def write_page(
    settings: Settings, held_out: HeldOut, points: Sequence[Point], workdir: Path, progress: Mapping[str, Any]
) -> None:
    """Write the page of a job that is not finished. points: those that are evaluated, SFT first."""
    results = data.make_results(settings, workdir, points)
    files.write_text(workdir / PAGE, page.render([data.gather(results, held_out, progress)]))
