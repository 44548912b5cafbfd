"""Algorithm 1 of WARP: I iterations of M runs, a spherical merge, and a step towards it; then the front."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from warp_jax import cli, files, merging
from warp_jax.evaluation import guards, measure
from warp_jax.evaluation import points as named
from warp_jax.evaluation.measure import Evaluation, EvaluationStore
from warp_jax.evaluation.points import Point, front_points
from warp_jax.parallel import hosts
from warp_jax.progress import JobProgress
from warp_jax.settings import Settings
from warp_jax.storage import checkpoint
from warp_jax.training import anchors, loop, metric_writer, reinforce, wandb_run
from warp_jax.types import Params, TrainState


class BusyError(Exception):
    """Another process is making the requested run or merge."""

    exit_code = cli.TRY_AGAIN


class JobError(Exception):
    """The config or the workdir makes it impossible to continue."""

    exit_code = cli.BAD_INPUT


# enter it to train a run -> a function to call with the state after each step
WatchRun = Callable[[], contextlib.AbstractContextManager[Callable[[Any], None]]]


@contextlib.contextmanager
def unwatched() -> Iterator[Callable[[Any], None]]:
    """The WatchRun that does nothing."""
    yield lambda state: None


@dataclasses.dataclass(frozen=True)
class Job:
    """Algorithm 1 in one workdir. Several processes may share the work: each result is made once, then restored."""

    settings: Settings
    sft_params: Params  # trained leaves of SFT
    trainers: tuple[reinforce.Trainer, ...]  # one for each run
    workdir: Path
    progress: JobProgress
    evaluations: EvaluationStore
    watch_run: WatchRun

    def init_params(self, iteration: int) -> Params:
        """theta_init of an iteration, from the saved merges of all iterations before it (line 13)."""
        init_params = self.sft_params
        for before in range(1, iteration):
            merged = checkpoint.restore_params(self.workdir / f"iteration_{before}" / "merged", init_params)
            init_params = merging.liti(init_params, merged, self.settings.warp.liti_rate)
        return init_params

    def run_policy(self, init_params: Params, iteration: int, run: int) -> list[Point]:
        """Train one run of one iteration (lines 4 to 9), and return the points of its trajectory."""
        directory = self.workdir / f"iteration_{iteration}" / f"run_{run}"
        num_steps = self.settings.warp.steps_per_iteration[iteration - 1]
        finished, expected = self._is_finished(iteration, run), self._names(iteration, run)
        self.progress.start_phase(f"iteration {iteration} run {run}", num_steps, finished=finished)
        if not finished:
            with hosts.locked(directory / "lock", functools.partial(_refuse, f"run {run}", iteration)):
                if not self._is_finished(iteration, run):  # another job may have finished it meanwhile
                    self._train(init_params, iteration, run, directory)
        checkpoint.forget_state(directory)  # a killed job may have left it
        last = self.last_step(iteration, run)
        left_out = self.evaluations.missing(expected - self._names(iteration, run))
        self.progress.end_phase(last, evaluations_left_out=len(left_out))

        def params_at(step: int, name: str) -> Params:
            path = directory / ("params" if step == last else f"step_{step}")
            if not checkpoint.has_params(path):
                raise JobError(f"evaluation {name} is missing, and its policy is not saved; delete {directory}")
            return checkpoint.restore_params(path, init_params)

        points = []
        for step, name in named.trajectory(self.settings, iteration, run, last).items():
            evaluation = self.evaluations.get(name, functools.partial(params_at, step, name))
            points.append(Point("policy", iteration, run, float("nan"), step, evaluation))
        for stage in named.kept_stages(self.settings, last):
            restore = functools.partial(checkpoint.restore_params, directory / stage, init_params)
            ends, etas = (self.sft_params, restore), named.kept_etas(self.settings)
            points += front_points(stage, (iteration, run), etas, ends=ends, evaluations=self.evaluations)
        return points

    def last_step(self, iteration: int, run: int) -> int:
        """The last step of a run. All processes agree."""
        return hosts.number_of_first(lambda: named.last_step(self.settings, self.workdir, iteration, run))

    def _names(self, iteration: int, run: int) -> set[str]:
        """Names of the evaluations of a run, as far as it is known when it ends."""
        return named.run_names(self.settings, iteration, run, self.last_step(iteration, run))

    def _is_finished(self, iteration: int, run: int) -> bool:
        """True if all weights of a run are saved."""
        directory, last = self.workdir / f"iteration_{iteration}" / f"run_{run}", self.last_step(iteration, run)
        return all(checkpoint.has_params(directory / name) for name in named.saved_weights(self.settings, last))

    def merge(self, init_params: Params, iteration: int) -> Params:
        """theta_slerp of one iteration (line 12), saved with the angles and norms of its task vectors per unit."""
        directory = self.workdir / f"iteration_{iteration}"
        if not checkpoint.has_params(directory / "merged"):
            with hosts.locked(directory / "lock", functools.partial(_refuse, "the merge", iteration)):
                if not checkpoint.has_params(directory / "merged"):
                    return self._merge(init_params, directory)
        return checkpoint.restore_params(directory / "merged", init_params)

    def _merge(self, init_params: Params, directory: Path) -> Params:
        warp = self.settings.warp
        paths = [directory / f"run_{run}" / "params" for run in range(1, warp.num_runs + 1)]
        policies = [checkpoint.restore_params(path, init_params) for path in paths]
        gram = merging.gram(init_params, policies, warp.unit)
        try:
            merged = merging.merge(init_params, policies, warp.merge, unit=warp.unit)
        except ValueError as error:  # opposite task vectors, for example; raised in every process
            raise JobError(f"merge: {error}") from error
        if hosts.is_first():
            geometry = {
                "units": gram.names,
                "angles_degrees": np.degrees(merging.angles(gram.matrix)).tolist(),
                "norms": np.asarray(merging.norms(gram.matrix)).tolist(),
            }
            files.write_json(directory / "geometry.json", geometry)
        checkpoint.save_params(directory / "merged", merged, directory / "geometry.json")
        return merged

    def front(self, merged: Params, iteration: int) -> list[Point]:
        """The points of an iteration's merge and of its front: LITI from SFT to the merge, one point per eta."""
        front = functools.partial(
            front_points,
            "liti",
            (iteration, 0),
            ends=(self.sft_params, lambda: merged),
            evaluations=self.evaluations,
        )
        points = front(self.settings.front.etas)
        return [front([1.0])[0]._replace(stage="merged", eta=float("nan")), *points]

    def _train(self, init_params: Params, iteration: int, run: int, directory: Path) -> None:
        settings, of_run = self.settings, self.settings.of_runs[run - 1].warp
        num_steps, limit = settings.warp.steps_per_iteration[iteration - 1], of_run.stop_at_kl
        anchor = anchors.make_anchor(of_run) if settings.keep.anchor else None
        evaluated = named.trajectory(settings, iteration, run, num_steps)
        end: dict[str, float] = {}
        trainer, run_name = self.trainers[run - 1], f"iteration {iteration} run {run}"
        sft = self.evaluations.get("sft", lambda: self.sft_params)
        guard = guards.Guards(settings.health, run_name, sft, self.progress.note)
        for step, evaluation in self.evaluations.saved(evaluated).items():
            guard.know(step, evaluation)

        def on_step(done: int, values: Mapping[str, float]) -> None:
            self.progress.on_step(done, values)
            guard.on_step(done, values)

        def after_step(step: int, state: TrainState) -> bool:
            watch(state)
            policy = functools.partial(trainer.programs.weights, state.params, init_params)
            kept = anchor.weights(state.anchor_params) if anchor else None
            if step in evaluated:
                evaluation = self.evaluations.get(evaluated[step], policy)
                end.update(step=step, sft_kl=measure.summary(evaluation)["sft_kl"], stop_at_kl=limit)
                if 0 < limit < end["sft_kl"]:
                    self._keep(directory, step, policy, kept)
                    return True
                guard.on_evaluation(step, evaluation)
            guard.stop()
            self._keep(directory, step, policy, kept if step == num_steps else None)
            return False

        schedule = loop.Schedule(
            num_steps=num_steps,
            directory=directory,
            checkpoint_every=settings.checkpoint_every,
            on_step=on_step,
            after_step=after_step,
            checkpoint_minutes=settings.checkpoint_minutes,
            checked=evaluated,
            name=run_name,
            split="split 'prompts'",
            open_observer=functools.partial(wandb_run.open_run, settings, self.workdir, directory),
        )
        with self.watch_run() as watch:
            params = reinforce.run_policy(trainer, init_params, iteration=iteration, run=run, schedule=schedule)
        if limit and hosts.is_first():
            files.write_json(directory / named.END, end)
        self._average(directory, named.kept_steps(settings, int(end["step"])), params)
        logs = (directory / metric_writer.FILE, *[directory / named.END] * (limit > 0))
        _save_once(directory / "params", params, *logs)

    def _keep(self, directory: Path, step: int, policy: Callable[[], Params], anchor: Params | None) -> None:
        """Save what config.keep names of the weights after a step. anchor: None = not to be kept."""
        if step in self.settings.keep.steps:
            _save_once(directory / f"step_{step}", policy())
        if anchor is not None:
            _save_once(directory / "anchor", anchor)

    def _average(self, directory: Path, steps: Sequence[int], like: Params) -> None:
        """Save the mean of a run's kept policies, if there are several."""
        if len(steps) < 2 or checkpoint.has_params(directory / "average"):
            return
        average = like
        for number, step in enumerate(steps, 1):
            policy = checkpoint.restore_params(directory / f"step_{step}", like)
            average = merging.liti(average, policy, 1 / number)
        checkpoint.save_params(directory / "average", average)


def make_job(
    settings: Settings,
    trainers: tuple[reinforce.Trainer, ...],
    examiner: measure.Examiner,
    workdir: Path,
    progress: JobProgress,
    *,
    watch_run: WatchRun = unwatched,
    after_evaluation: Callable[[], None] = lambda: None,
) -> Job:
    """The job of a workdir. after_evaluation: called after each new evaluation, in every process."""

    def on_new(name: str, evaluation: Evaluation, seconds: float) -> None:
        row = measure.summary(evaluation)
        measured = f"reward {row['reward']:.3f} (gold {row['gold_reward']:.3f}) at {row['sft_kl']:.2f} nats from SFT"
        progress.on_evaluation(f"{name}: {measured}", seconds)
        after_evaluation()

    store = EvaluationStore(workdir / "evaluations", functools.partial(measure.evaluate, examiner), on_new)
    return Job(settings, examiner.sft_params, trainers, workdir, progress, store, watch_run)


def run_warp(job: Job) -> list[Point]:
    """Train, merge and evaluate everything that the workdir lacks; return all points in order."""
    warp, sft = job.settings.warp, job.sft_params
    _expect(job, named.evaluation_names(job.settings, job.last_step))
    points = [Point("sft", 0, 0, 0.0, 0, job.evaluations.get("sft", lambda: sft))]
    init_params = sft
    for iteration in range(1, warp.num_iterations + 1):
        for run in range(1, warp.num_runs + 1):
            points += job.run_policy(init_params, iteration, run)
        merged = job.merge(init_params, iteration)
        points += job.front(merged, iteration)
        init_params = merging.liti(init_params, merged, warp.liti_rate)
        del merged  # free its memory for the next runs
    return points


def run_one(job: Job, iteration: int, run: int) -> None:
    """Make one run of one iteration, as a job of its own."""
    _expect(job, {"sft"} | named.run_names(job.settings, iteration, run, job.last_step(iteration, run)))
    job.run_policy(job.init_params(iteration), iteration, run)


def merge_one(job: Job, iteration: int) -> None:
    """Make the merge of one iteration, whose runs must be finished, and its front, as a job of its own."""
    _expect(job, named.front_names(job.settings, iteration))
    job.front(job.merge(job.init_params(iteration), iteration), iteration)


def _save_once(path: Path, params: Params, *logs: Path) -> None:
    """Save weights, unless an earlier process has: they are the same."""
    if not checkpoint.has_params(path):
        checkpoint.save_params(path, params, *logs)


def _expect(job: Job, names: Iterable[str]) -> None:
    """Let the progress bar count the evaluations that are still to be made."""
    job.progress.expect_evaluations(len(job.evaluations.missing(names)))


def _refuse(what: str, iteration: int, owner: str) -> NoReturn:
    raise BusyError(f"{what} of iteration {iteration} is being made by {owner}; wait for it, or stop it")
