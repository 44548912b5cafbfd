"""Progress of a job with the time left: a bar in a terminal, else plain lines."""

import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

PLAIN_LINE_SECONDS = 15.0


class JobProgress:
    """A progress bar over all phases of a job. Skipped phases count as done."""

    def __init__(self, total_steps: int, *, quiet: bool = False):
        self._console = Console(stderr=True, quiet=quiet)
        self._total = total_steps
        self._before, self._phase_steps = 0, 0  # steps of the phases before this one, and of this one
        self._done = 0  # steps of this phase that are done
        self._phase = ""
        self._last_line = time.monotonic()
        self._since: float | None = None  # end of the last step or evaluation of this phase
        self._stepping, self._timed_steps = 0.0, 0
        self._evaluations_left = 0
        self._evaluation_seconds: list[float] = []
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            TextColumn("{task.fields[latest]}"),
        )
        self._progress = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._progress.add_task("starting", total=total_steps, left="", latest="")

    def start_phase(self, name: str, num_steps: int, *, finished: bool) -> None:
        """Start a phase of num_steps steps, or skip it if `finished`: its result is already saved."""
        self._before, self._phase_steps = self._before + self._phase_steps, num_steps
        self._phase, self._since, self._done = name, None, 0
        self.note(f"{name}: {'done before, skipped' if finished else 'started'}")
        if finished:
            self.on_step(num_steps, {})

    def end_phase(self, num_steps: int, *, evaluations_left_out: int = 0) -> None:
        """End this phase after num_steps steps: what it has left out is not expected any more."""
        self._total -= self._phase_steps - num_steps
        self._phase_steps = num_steps
        self._evaluations_left -= evaluations_left_out
        self._progress.update(self._task, total=self._total, completed=self._before + num_steps)

    def on_step(self, done: int, values: Mapping[str, float]) -> None:
        """Move the bar to `done` steps of this phase. values: latest metrics, empty for steps of an earlier process."""
        now = time.monotonic()
        if values and self._since is not None:  # the first step of a phase compiles and is not timed
            self._stepping, self._timed_steps = self._stepping + now - self._since, self._timed_steps + 1
        self._since, self._done = now if values else None, done
        latest = " ".join(f"{name} {values[name]:.3f}" for name in ("loss", "reward", "anchor_kl") if name in values)
        left = self.left()
        self._progress.update(
            self._task, completed=self._before + done, description=self._phase, left=left, latest=latest
        )
        if values and not self._console.is_terminal and now - self._last_line > PLAIN_LINE_SECONDS:
            self._last_line = now
            count = f"{self._before + done}/{self._total} of all steps"
            self.note(", ".join(filter(None, (f"{self._phase}: step {done}", latest, count, left))))

    def expect_evaluations(self, count: int) -> None:
        """Set how many evaluations remain. The time left includes them as soon as one evaluation has been timed."""
        self._evaluations_left = count

    def on_evaluation(self, text: str, seconds: float) -> None:
        """Print the result of an evaluation and count it as done."""
        self._evaluations_left -= 1
        self._evaluation_seconds.append(seconds)
        self._since = time.monotonic()
        self.note(f"{text} ({seconds:.0f} s)")

    def left(self) -> str:
        """Estimate the time left from the mean times of a step and an evaluation so far; "" before a step is timed."""
        steps = self._total - self._before - self._done
        if steps and not self._timed_steps:
            return ""
        per_step = self._stepping / max(self._timed_steps, 1)
        per_evaluation = sum(self._evaluation_seconds) / max(len(self._evaluation_seconds), 1)
        seconds = per_step * steps + per_evaluation * self._evaluations_left
        return f"about {seconds / 60:.1f} min left"

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text, highlight=False, soft_wrap=True)

    def __enter__(self) -> "JobProgress":
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()
