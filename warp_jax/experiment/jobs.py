"""Run a whole job, or one part of it: one run or one merge. Parts exchange their results through the workdir."""

import functools
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from warp_jax.data.corpus import Corpus
from warp_jax.evaluation.points import saved_points
from warp_jax.experiment import preparation, status, warp
from warp_jax.experiment.workdir import LOCK
from warp_jax.parallel import hosts
from warp_jax.progress import JobProgress
from warp_jax.report import writer
from warp_jax.report.data import HeldOut
from warp_jax.settings import Settings
from warp_jax.storage import checkpoint
from warp_jax.types import StorageError

PAGE_SECONDS = 60.0  # least time between two pages: each reads all evaluations again


class Part(NamedTuple):
    """A part of a job: everything (iteration 0), one run of an iteration, or its merge (run 0)."""

    iteration: int = 0
    run: int = 0


WHOLE = Part()


def choose_part(settings: Settings, workdir: Path, *, run: int, merge: bool, iteration: int) -> Part:
    """Part that the flags select. Without --iteration, it belongs to the first iteration that is not merged.

    Raises ValueError if the job has no such part, or if the part starts from something that is not saved yet.
    """
    num_iterations, num_runs = settings.warp.num_iterations, settings.warp.num_runs
    if not run and not merge:
        if iteration:
            raise ValueError("iteration: got --iteration alone, want --run=M or --merge too")
        return WHOLE
    if run and merge:
        raise ValueError("run: got --run and --merge, want one of them")
    if not 0 <= run <= num_runs:
        raise ValueError(f"run: got {run}, want 1 to warp.num_runs = {num_runs}")
    if not 0 <= iteration <= num_iterations:
        raise ValueError(f"iteration: got {iteration}, want 1 to warp.num_iterations = {num_iterations}")
    folders = {i: workdir / f"iteration_{i}" for i in range(1, num_iterations + 1)}
    unmerged = [i for i, folder in folders.items() if not checkpoint.has_params(folder / "merged")]
    iteration = iteration or (unmerged[0] if unmerged else num_iterations)
    if [i for i in unmerged if i < iteration]:
        raise ValueError(
            f"iteration: {iteration} starts from the merge of {unmerged[0]}, which is missing; make its runs, "
            "then --merge"
        )
    for m in range(1, num_runs + 1) if merge and iteration in unmerged else ():
        if not checkpoint.has_params(folders[iteration] / f"run_{m}" / "params"):
            raise ValueError(f"merge: run {m} of iteration {iteration} is not finished; start it again: --run={m}")
    return Part(iteration, run)


def run_part(
    settings: Settings,
    corpora: Mapping[str, Corpus],
    workdir: Path,
    part: Part = WHOLE,
    watch_run: warp.WatchRun = warp.unwatched,
) -> str:
    """Run the unfinished part of a job; return a one-line summary. watch_run: see `warp.WatchRun`."""
    with JobProgress(total_steps(settings, part), quiet=not hosts.is_first()) as progress:

        def on_wait(owner: str) -> None:
            progress.note(f"{owner} is preparing this workdir: waiting for it")

        with hosts.locked(workdir / LOCK, on_wait):
            tokenizer, trainers, examiner = preparation.prepare(settings, corpora, workdir, progress)
        held_out = HeldOut(tokenizer, examiner.eval_prompts)
        write_page = _page_writer(settings, held_out, workdir, progress)
        job = warp.make_job(
            settings,
            trainers,
            examiner,
            workdir,
            progress,
            watch_run=watch_run,
            after_evaluation=lambda: hosts.on_first_process(write_page),
        )
        if not part.run and part.iteration in (0, settings.warp.num_iterations):
            points = warp.run_warp(job)
            if not hosts.is_first():
                return ""
            return writer.write_report(settings, held_out, points, workdir, status.progress(workdir))
        if part.run:
            warp.run_one(job, part.iteration, part.run)
        else:
            warp.merge_one(job, part.iteration)
        hosts.on_first_process(functools.partial(write_page, at_end=True))
        return f"iteration {part.iteration}{f' run {part.run}: finished' if part.run else ': merged'}"


def _page_writer(settings: Settings, held_out: HeldOut, workdir: Path, progress: JobProgress) -> Callable[..., None]:
    """A function that writes the page of a job that is not finished, at most once in PAGE_SECONDS before the end.

    A page that cannot be written is a note: it must not stop a training.
    """
    last = -math.inf

    def write(*, at_end: bool = False) -> None:
        nonlocal last
        if not at_end and time.monotonic() - last < PAGE_SECONDS:
            return
        try:
            state = status.progress(workdir, "" if at_end else progress.left())
            writer.write_page(settings, held_out, saved_points(settings, workdir), workdir, state)
        except (OSError, ValueError, StorageError) as error:
            progress.note(f"{workdir / writer.PAGE} is not written: {error}")
        last = time.monotonic()

    return write


def total_steps(settings: Settings, part: Part = WHOLE) -> int:
    """Optimizer steps of a part, SFT and reward model included."""
    steps = settings.warp.steps_per_iteration
    if part.run:
        rl = steps[part.iteration - 1]
    else:
        rl = sum(steps) * settings.warp.num_runs if part.iteration in (0, settings.warp.num_iterations) else 0
    return rl + settings.sft.num_steps + settings.needs_reward_model * settings.reward_model.num_steps
