"""One bar over the whole job, with the time that is left; plain lines where there is no terminal."""

import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PLAIN_LINE_SECONDS = 15.0


class JobProgress:
    """Counts the steps of all stages of a job. Stages that were skipped count as done, not as work ahead."""

    def __init__(self, total_steps: int):
        self._console = Console(stderr=True)
        self._total = total_steps
        self._before = 0
        self._done_at_start = 0
        self._stage = ""
        self._started = time.monotonic()
        self._last_line = self._started
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[latest]}"),
        )
        self._progress = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._progress.add_task("starting", total=total_steps, latest="")

    def start_stage(self, name: str, num_steps: int, *, finished: bool) -> None:
        """Name the stage that comes; `finished` if the workdir already holds its result."""
        self._stage = name
        self._console.print(f"{name}: {'found, skipped' if finished else 'started'}", highlight=False, soft_wrap=True)
        if finished:
            self.on_step(num_steps, {})
            self.end_stage(num_steps)

    def on_step(self, done: int, values: Mapping[str, float]) -> None:
        """Move the bar to `done` steps of this stage; values are its latest metrics, none for steps found done."""
        if not values:
            self._done_at_start += done
        latest = " ".join(f"{name} {values[name]:.3f}" for name in ("loss", "reward", "anchor_kl") if name in values)
        self._progress.update(self._task, completed=self._before + done, description=self._stage, latest=latest)
        now = time.monotonic()
        if values and not self._console.is_terminal and now - self._last_line > PLAIN_LINE_SECONDS:
            self._last_line = now
            parts = filter(None, (f"{self._stage}: step {done}", latest, self._left(done)))
            self._console.print(", ".join(parts), highlight=False, soft_wrap=True)

    def end_stage(self, num_steps: int) -> None:
        """Count the stage's steps as done."""
        self._before += num_steps

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text, highlight=False, soft_wrap=True)

    def __enter__(self) -> "JobProgress":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def _left(self, done: int) -> str:
        finished = self._before + done
        worked = finished - self._done_at_start
        seconds = (time.monotonic() - self._started) / max(worked, 1) * (self._total - finished)
        return f"{finished}/{self._total} of all steps, about {seconds / 60:.1f} min left"
