"""The evaluated policies of a job, and the names of their evaluations."""

import csv
import functools
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from warp_jax import files, merging
from warp_jax.evaluation.measure import Evaluation, EvaluationStore, load_evaluation
from warp_jax.settings import Settings
from warp_jax.types import Params, StorageError

END = "end.json"  # last step of a run, in its folder, if warp.stop_at_kl may end it early
LastStep = Callable[[int, int], int]  # iteration, run -> last step
Place = tuple[str, int, int, float, int]  # the fields of a point without its evaluation


class Point(NamedTuple):
    """One evaluated policy: a row of front.csv. iteration and run start at 1; 0 (eta: nan) means not applicable."""

    # sft, policy, merged, liti (to the merge), anchor or average (LITI to that of a run); best_of_n (step: N): no job's
    stage: str
    iteration: int
    run: int
    eta: float
    step: int
    evaluation: Evaluation


def evaluation_name(stage: str, iteration: int, run: int, eta: float, step: int) -> str:
    """Name of a saved evaluation, one per policy: eta 0 has the name of SFT, eta 1 of the front of a merge its name."""
    if stage == "best_of_n":
        return f"best_of_{step}"
    if stage == "policy":
        return f"policy_i{iteration}_r{run}_s{step}"
    if eta == 0:
        return "sft"
    if run:
        return f"{stage}_i{iteration}_r{run}_e{eta:g}"
    return f"liti_i{iteration}_e{eta:g}" if stage == "liti" and eta != 1 else f"merged_i{iteration}"


def evaluation_names(settings: Settings, last_step: LastStep) -> set[str]:
    """Names of all evaluations of a job."""
    return {evaluation_name(*place) for place in places(settings, last_step)}


def places(settings: Settings, last_step: LastStep) -> list[Place]:
    """The places of all points of a job, in its order."""
    found: list[Place] = [("sft", 0, 0, 0.0, 0)]
    for iteration in range(1, settings.warp.num_iterations + 1):
        for run in range(1, settings.warp.num_runs + 1):
            found += _run_places(settings, iteration, run, last_step(iteration, run))
        found += _front_places(settings, iteration)
    return found


def _run_places(settings: Settings, iteration: int, run: int, last: int) -> list[Place]:
    """The places of a run's trajectory, then of the fronts of its kept stages."""
    policies = [("policy", iteration, run, math.nan, step) for step in trajectory(settings, iteration, run, last)]
    stages, etas = kept_stages(settings, last), kept_etas(settings)
    return [*policies, *((stage, iteration, run, eta, 0) for stage in stages for eta in etas)]


def _front_places(settings: Settings, iteration: int) -> list[Place]:
    """The places of an iteration's merged policy and of its front."""
    return [("merged", iteration, 0, math.nan, 0), *(("liti", iteration, 0, eta, 0) for eta in settings.front.etas)]


def saved_points(settings: Settings, workdir: Path) -> list[Point]:
    """The points of a job that are evaluated up to now, in its order."""
    folder = workdir / "evaluations"
    saved = {path.stem for path in folder.iterdir()} if folder.is_dir() else set()
    all_places = places(settings, functools.partial(last_step, settings, workdir))
    return [_load(workdir, place) for place in all_places if evaluation_name(*place) in saved]


def read_points(workdir: Path) -> list[Point]:
    """Read the points of a finished workdir from its front.csv and evaluations/."""
    rows = csv.DictReader((workdir / "front.csv").read_text().splitlines())
    return [
        _load(workdir, (row["stage"], int(row["iteration"]), int(row["run"]), float(row["eta"]), int(row["step"])))
        for row in rows
    ]


def _load(workdir: Path, place: Place) -> Point:
    return Point(*place, load_evaluation(workdir / "evaluations" / f"{evaluation_name(*place)}.npz"))


def last_step(settings: Settings, workdir: Path, iteration: int, run: int) -> int:
    """The last step of a run: that of its iteration, unless the run has ended at warp.stop_at_kl."""
    path = workdir / f"iteration_{iteration}" / f"run_{run}" / END
    if not path.exists():
        return settings.warp.steps_per_iteration[iteration - 1]
    try:
        return int(files.read_json(path)["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{path} is not what was written; delete {path.parent} to make it again") from error


def name_of_stage(settings: Settings, stage: str, last: LastStep) -> str:
    """Name of the evaluation of a stage, see `cli.STAGES`; "" for the reward model, which has none."""
    kind, _, eta = stage.partition(":")
    if kind == "liti":
        return evaluation_name("liti", settings.warp.num_iterations, 0, float(eta), 0)
    first, *rest = stage.split("/")
    if not rest:
        return "sft" if stage == "sft" else ""
    iteration = int(first.removeprefix("iteration_"))
    if rest == ["merged"]:
        return evaluation_name("merged", iteration, 0, 1.0, 0)
    run, kept = int(rest[0].removeprefix("run_")), (*rest[1:], "")[0]
    if kept in ("anchor", "average"):
        return evaluation_name(kept, iteration, run, 1.0, 0)
    step = int(kept.removeprefix("step_")) if kept else last(iteration, run)
    return evaluation_name("policy", iteration, run, math.nan, step)


def trajectory(settings: Settings, iteration: int, run: int, last: int) -> dict[int, str]:
    """Names of a run's evaluations, by step: every `evaluation.every` steps, at kept steps, and after the last step."""
    every = settings.evaluation.every
    steps = sorted({*range(every, last + 1, every), *kept_steps(settings, last), last})
    return {step: evaluation_name("policy", iteration, run, float("nan"), step) for step in steps}


def kept_steps(settings: Settings, last: int) -> list[int]:
    """The steps of keep.steps that a run has made."""
    return [step for step in settings.keep.steps if step <= last]


def kept_stages(settings: Settings, last: int) -> list[str]:
    """Stages of a run, other than its policy, that have a front: its anchor, and the average of several kept steps."""
    return ["anchor"] * settings.keep.anchor + ["average"] * (len(kept_steps(settings, last)) > 1)


def saved_weights(settings: Settings, last: int) -> list[str]:
    """Folders of weights that a run saves, the last of them when all others are saved."""
    return [*(f"step_{step}" for step in kept_steps(settings, last)), *kept_stages(settings, last), "params"]


def kept_etas(settings: Settings) -> list[float]:
    """The etas of the fronts of `kept_stages`: those of the config, and 1, the stage itself."""
    return sorted({*settings.front.etas, 1.0})


def run_names(settings: Settings, iteration: int, run: int, last: int) -> set[str]:
    """Names of the evaluations of a run and of the fronts of its kept stages."""
    return {evaluation_name(*place) for place in _run_places(settings, iteration, run, last)}


def front_names(settings: Settings, iteration: int) -> set[str]:
    """Names of the evaluations of an iteration's merged policy and of its front."""
    return {evaluation_name(*place) for place in _front_places(settings, iteration)}


def front_points(
    stage: str,
    place: tuple[int, int],
    etas: Iterable[float],
    *,
    ends: tuple[Params, Callable[[], Params]],
    evaluations: EvaluationStore,
) -> list[Point]:
    """Evaluate a front: (1 - eta) start + eta end for every eta (LITI).

    place: iteration and run, 0 for the merge. ends: start, and a function that makes the end, called if a point is not
    saved. Raises FloatingPointError, which names eta, if a KL is not finite.
    """
    (iteration, run), (start, make_end) = place, ends
    end = functools.cache(make_end)

    def measure(eta: float) -> Evaluation:
        try:
            return evaluations.get(
                evaluation_name(stage, iteration, run, eta, 0), lambda: merging.liti(start, end(), eta)
            )
        except FloatingPointError as error:
            raise FloatingPointError(f"eta {eta:g}: {error}") from error

    return [Point(stage, iteration, run, eta, 0, measure(eta)) for eta in etas]
