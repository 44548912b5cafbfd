"""What one start of the program does: the whole job, one run, or one merge. They meet in the workdir."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from warp_jax.data.corpus import Corpus
from warp_jax.evaluation import report
from warp_jax.experiment import preparation, validation, warp
from warp_jax.parallel import hosts
from warp_jax.progress import JobProgress


class Part(NamedTuple):
    """Which part of a job: everything (iteration 0), or of one iteration a run, or its merge (run 0)."""

    iteration: int = 0
    run: int = 0


WHOLE = Part()


def choose_part(config: ConfigDict, workdir: Path, *, run: int, merge: bool, iteration: int) -> Part:
    """The part that the flags name; without an iteration, the first that is not merged.

    ValueError if there is no such part, or what it starts from is not there yet.
    """
    num_iterations, num_runs = config.warp.num_iterations, config.warp.num_runs
    if not run and not merge:
        if iteration:
            raise ValueError("iteration: got one without a part of it, want --run=M or --merge too")
        return WHOLE
    if run and merge:
        raise ValueError("run: got --run and --merge, want one of them")
    if not 0 <= run <= num_runs:
        raise ValueError(f"run: got {run}, want 1 to warp.num_runs = {num_runs}")
    if not 0 <= iteration <= num_iterations:
        raise ValueError(f"iteration: got {iteration}, want 1 to warp.num_iterations = {num_iterations}")
    unmerged = [i for i in range(1, num_iterations + 1) if not warp.is_merged(workdir, i)]
    iteration = iteration or (unmerged[0] if unmerged else num_iterations)
    if [i for i in unmerged if i < iteration]:
        raise ValueError(f"iteration: {iteration} starts from the merge of {unmerged[0]}; start its runs and --merge")
    if merge and iteration in unmerged and (missing := warp.missing_runs(workdir, iteration, num_runs)):
        raise ValueError(
            f"merge: run {missing[0]} of iteration {iteration} is not finished; start it again: --run={missing[0]}"
        )
    return Part(iteration, run)


def run_part(config: ConfigDict, corpora: Mapping[str, Corpus], workdir: Path, part: Part = WHOLE) -> str:
    """Do what is missing of a part of the job; returns the line that tells of it."""
    with JobProgress(total_steps(config, part), quiet=not hosts.is_first()) as progress:

        def tell() -> None:
            progress.note("another process prepares this workdir: waiting for it")

        with hosts.locked(workdir / validation.LOCK, tell):
            setup = preparation.prepare(config, corpora, workdir, progress)
        job = warp.make_job(config, setup, workdir, progress)
        if part.run:
            warp.run_one(job, part.iteration, part.run)
            return f"iteration {part.iteration} run {part.run}: finished"
        if 0 < part.iteration < config.warp.num_iterations:
            warp.merge_one(job, part.iteration)
            return f"iteration {part.iteration}: merged"
        points = warp.run_warp(job)
        if not hosts.is_first():
            return ""
        return report.write_report(config, setup.tokenizer, setup.eval_prompts, points, workdir)


def total_steps(config: ConfigDict, part: Part = WHOLE) -> int:
    """Optimiser steps of all stages of a part."""
    steps = config.warp.steps_per_iteration[: config.warp.num_iterations]
    if part.run:
        rl = steps[part.iteration - 1]
    else:
        rl = sum(steps) * config.warp.num_runs if part.iteration in (0, config.warp.num_iterations) else 0
    return rl + config.sft.num_steps + preparation.needs_reward_model(config) * config.reward_model.num_steps
