"""The evaluated policies of a job, and the names of their evaluations."""

from typing import NamedTuple

from warp_jax import merging
from warp_jax.evaluation.measure import Evaluation, EvaluationStore
from warp_jax.settings import Settings
from warp_jax.types import Params


class Point(NamedTuple):
    """One evaluated policy: a row of front.csv. iteration and run start at 1; 0 (eta: nan) means not applicable."""

    stage: str  # sft, policy, merged or liti; best_of_n (its step is N), which is not part of a job
    iteration: int
    run: int
    eta: float
    step: int
    evaluation: Evaluation


def evaluation_name(stage: str, iteration: int, run: int, eta: float, step: int) -> str:
    """Name of a saved evaluation, one per policy: on a front, eta 0 has the name of SFT, eta 1 that of the merge."""
    if stage == "best_of_n":
        return f"best_of_{step}"
    if stage == "policy":
        return f"policy_i{iteration}_r{run}_s{step}"
    if stage == "merged" or eta == 1.0:
        return f"merged_i{iteration}"
    return f"liti_i{iteration}_e{eta:g}" if eta else "sft"


def evaluation_names(settings: Settings) -> set[str]:
    """Names of all evaluations of a job."""
    names = {"sft"}
    for iteration in range(1, settings.warp.num_iterations + 1):
        names |= front_names(settings, iteration)
        for run in range(1, settings.warp.num_runs + 1):
            names.update(trajectory(settings, iteration, run).values())
    return names


def trajectory(settings: Settings, iteration: int, run: int) -> dict[int, str]:
    """Names of a run's evaluations, by step: every `evaluation.every` steps, and after the last step."""
    num_steps, every = settings.warp.steps_per_iteration[iteration - 1], settings.evaluation.every
    steps = sorted({*range(every, num_steps + 1, every), num_steps})
    return {step: evaluation_name("policy", iteration, run, float("nan"), step) for step in steps}


def front_names(settings: Settings, iteration: int) -> set[str]:
    """Names of the evaluations of an iteration's merged policy and of its front."""
    return {evaluation_name("liti", iteration, 0, eta, 0) for eta in (1.0, *settings.front.etas)}


def front_points(
    etas: tuple[float, ...], sft_params: Params, merged: Params, iteration: int, evaluations: EvaluationStore
) -> list[Point]:
    """Evaluate the merged policy and its front: (1 - eta) sft_params + eta merged for every eta (LITI).

    Raises FloatingPointError, which names eta, if a KL is not finite.
    """

    def measure(eta: float) -> Evaluation:
        name = evaluation_name("liti", iteration, 0, eta, 0)
        try:
            return evaluations.get(name, lambda: merging.liti(sft_params, merged, eta))
        except FloatingPointError as error:
            raise FloatingPointError(f"eta {eta:g}: {error}") from error

    nan = float("nan")
    liti = [Point("liti", iteration, 0, eta, 0, measure(eta)) for eta in etas]
    return [Point("merged", iteration, 0, nan, 0, measure(1.0)), *liti]
