"""Algorithm 1 of WARP: I iterations of M runs, a spherical merge, and a step towards it; then the front."""

import dataclasses
import functools
from pathlib import Path
from typing import NoReturn

import numpy as np
from ml_collections import ConfigDict

from warp_jax import files, merging
from warp_jax.evaluation import measure
from warp_jax.evaluation.measure import Evaluation, EvaluationStore
from warp_jax.evaluation.points import Point, evaluation_names, front_names, front_points, trajectory
from warp_jax.experiment.preparation import Setup
from warp_jax.experiment.programs import Programs, make_programs
from warp_jax.parallel import hosts
from warp_jax.progress import JobProgress
from warp_jax.storage import checkpoint
from warp_jax.training import reinforce
from warp_jax.types import Params, TrainState


class BusyError(Exception):
    """Another process is making what this one was asked for."""


class JobError(Exception):
    """The job cannot go on as it is configured, or as its workdir is."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One workdir of Algorithm 1. Runs and merges meet through its checkpoints, so each may be made by another process.

    init_params of an iteration follows from SFT and the merges before; every result is made once, then restored.
    """

    config: ConfigDict
    setup: Setup
    workdir: Path
    progress: JobProgress
    programs: Programs
    evaluations: EvaluationStore

    def directory(self, iteration: int) -> Path:
        """The folder of an iteration."""
        return self.workdir / f"iteration_{iteration}"

    def init_params(self, iteration: int) -> Params:
        """theta_init of an iteration, from the merges before it, which must be there (line 13)."""
        init_params = self.setup.sft_params
        for before in range(1, iteration):
            merged = checkpoint.restore_params(self.directory(before) / "merged", init_params)
            init_params = merging.liti(init_params, merged, self.config.warp.liti_rate)
        return init_params

    def run_policy(self, init_params: Params, iteration: int, run: int) -> list[Point]:
        """Train one run of one iteration (lines 4 to 9), and return the points of its trajectory."""
        directory = self.directory(iteration) / f"run_{run}"
        num_steps = self.config.warp.steps_per_iteration[iteration - 1]
        finished = checkpoint.has_params(directory / "params")
        self.progress.start_stage(f"iteration {iteration} run {run}", num_steps, finished=finished)
        if not finished:
            with hosts.locked(directory / "lock", functools.partial(_refuse, f"run {run}", iteration)):
                if not checkpoint.has_params(directory / "params"):  # made by another job in between
                    self._train(init_params, iteration, run, directory)
            self.progress.end_stage(num_steps)
        checkpoint.forget_state(directory)  # also what a kill has left

        def params_at(step: int, name: str) -> Params:
            if step != num_steps:
                raise JobError(f"evaluation {name} is gone, and so is its policy; delete {directory}")
            return checkpoint.restore_params(directory / "params", init_params)

        points = []
        for step, name in trajectory(self.config, iteration, run).items():
            evaluation = self.evaluations.get(name, functools.partial(params_at, step, name))
            points.append(Point("policy", iteration, run, float("nan"), step, evaluation))
        return points

    def merge(self, init_params: Params, iteration: int) -> Params:
        """theta_slerp of one iteration (line 12), stored with the angles and norms of its task vectors per unit."""
        directory = self.directory(iteration)
        if not checkpoint.has_params(directory / "merged"):
            with hosts.locked(directory / "lock", functools.partial(_refuse, "the merge", iteration)):
                if not checkpoint.has_params(directory / "merged"):
                    return self._merge(init_params, directory)
        return checkpoint.restore_params(directory / "merged", init_params)

    def _merge(self, init_params: Params, directory: Path) -> Params:
        config = self.config.warp
        paths = [directory / f"run_{run}" / "params" for run in range(1, config.num_runs + 1)]
        policies = [checkpoint.restore_params(path, init_params) for path in paths]
        gram = merging.gram(init_params, policies, config.unit)
        try:
            merged = merging.merge(init_params, policies, config.merge, unit=config.unit)
        except ValueError as error:  # as of opposite task vectors, in every process
            raise JobError(f"merge: {error}") from error
        if hosts.is_first():
            geometry = {
                "units": gram.names,
                "angles_degrees": np.degrees(merging.angles(gram.matrix)).tolist(),
                "norms": np.asarray(merging.norms(gram.matrix)).tolist(),
            }
            files.write_json(directory / "geometry.json", geometry)
        checkpoint.save_params(directory / "merged", merged)
        return merged

    def front(self, merged: Params, iteration: int) -> list[Point]:
        """The points of an iteration's merge and of its output family, all etas between SFT and the merge."""
        return front_points(self.config.front.etas, self.setup.sft_params, merged, iteration, self.evaluations)

    def _train(self, init_params: Params, iteration: int, run: int, directory: Path) -> None:
        config, setup = self.config, self.setup
        evaluated = trajectory(config, iteration, run)

        def after_step(step: int, state: TrainState) -> None:
            if step in evaluated:
                self.evaluations.get(evaluated[step], lambda: state.params)

        params = reinforce.run_policy(
            init_params,
            setup.frozen_params,
            programs=self.programs.train,
            sampler=self.programs.sampler,
            reward_fn=setup.train_reward_fn,
            train_prompts=setup.train_prompts,
            mesh=setup.mesh,
            seed=config.seed,
            iteration=iteration,
            run=run,
            num_steps=config.warp.steps_per_iteration[iteration - 1],
            batch_size=config.rl.batch_size,
            group_size=config.rl.samples_per_prompt,
            checkpoint_every=config.checkpoint_every,
            directory=directory,
            on_step=self.progress.on_step,
            after_step=after_step,
        )
        checkpoint.save_params(directory / "params", params)


def make_job(config: ConfigDict, setup: Setup, workdir: Path, progress: JobProgress) -> Job:
    """The job of a workdir, with its programs."""

    def on_new(name: str, evaluation: Evaluation, seconds: float) -> None:
        progress.on_evaluation(f"{name}: {_in_words(evaluation)}", seconds)

    programs = make_programs(
        config,
        setup.mesh,
        setup.model,
        sampling_config=setup.sampling_config,
        trained=setup.sft_params,
        frozen=setup.frozen_params,
    )
    evaluations = EvaluationStore(workdir / "evaluations", _make_evaluate(config, setup, programs), on_new)
    return Job(config, setup, workdir, progress, programs, evaluations)


def run_warp(job: Job) -> list[Point]:
    """Train, merge and evaluate everything the workdir does not hold yet; return all points in order."""
    config, sft = job.config, job.setup.sft_params
    job.progress.expect_evaluations(len(job.evaluations.missing(evaluation_names(config))))
    points = [Point("sft", 0, 0, 0.0, 0, job.evaluations.get("sft", lambda: sft))]
    init_params = sft
    for iteration in range(1, config.warp.num_iterations + 1):
        for run in range(1, config.warp.num_runs + 1):
            points += job.run_policy(init_params, iteration, run)
        merged = job.merge(init_params, iteration)
        points += job.front(merged, iteration)
        init_params = merging.liti(init_params, merged, config.warp.liti_rate)
        del merged  # the runs have other use for its memory
    return points


def run_one(job: Job, iteration: int, run: int) -> None:
    """One run of one iteration, as a job of its own."""
    names = trajectory(job.config, iteration, run).values()
    job.progress.expect_evaluations(len(job.evaluations.missing(names)))
    job.run_policy(job.init_params(iteration), iteration, run)


def merge_one(job: Job, iteration: int) -> None:
    """The merge of one iteration, whose runs must be there, and its front, as a job of its own."""
    names = front_names(job.config, iteration)
    job.progress.expect_evaluations(len(job.evaluations.missing(names)))
    job.front(job.merge(job.init_params(iteration), iteration), iteration)


def is_merged(workdir: Path, iteration: int) -> bool:
    """True if the merge of an iteration is there."""
    return checkpoint.has_params(workdir / f"iteration_{iteration}" / "merged")


def missing_runs(workdir: Path, iteration: int, num_runs: int) -> list[int]:
    """The runs of an iteration that are not finished."""
    folder = workdir / f"iteration_{iteration}"
    return [run for run in range(1, num_runs + 1) if not checkpoint.has_params(folder / f"run_{run}" / "params")]


def _refuse(what: str, iteration: int) -> NoReturn:
    raise BusyError(f"{what} of iteration {iteration} is being made by another process; wait for it, or stop it")


def _make_evaluate(config: ConfigDict, setup: Setup, programs: Programs) -> measure.EvaluateFn:
    return measure.make_evaluate(
        setup.mesh,
        sampler=programs.sampler,
        kl_to_sft=programs.kl_to_sft,
        sft_params=setup.sft_params,
        frozen_params=setup.frozen_params,
        reward_fn=setup.eval_reward_fn,
        gold_fn=setup.gold_fn,
        eval_prompts=setup.eval_prompts,
        batch_size=config.evaluation.batch_size,
        seed=config.seed,
    )


def _in_words(evaluation: Evaluation) -> str:
    row = measure.summary(evaluation)
    return f"reward {row['reward']:.3f} (gold {row['gold_reward']:.3f}) at {row['sft_kl']:.2f} nats from SFT"
