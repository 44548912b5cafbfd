"""Which policies of a job are evaluated, and under which names."""

from typing import NamedTuple

from ml_collections import ConfigDict

from warp_jax import merging
from warp_jax.evaluation.measure import Evaluation, EvaluationStore
from warp_jax.types import Params


class Point(NamedTuple):
    """One evaluated policy: a row of front.csv. iteration and run count from 1; 0, or nan for eta, does not apply."""

    stage: str  # sft, policy, merged or liti
    iteration: int
    run: int
    eta: float
    step: int
    evaluation: Evaluation


def evaluation_name(stage: str, iteration: int, run: int, eta: float, step: int) -> str:
    """Under which the evaluation of a point is stored; the same policy has one name, as SFT and eta = 0 of a front."""
    if stage == "policy":
        return f"policy_i{iteration}_r{run}_s{step}"
    if stage == "merged" or eta == 1.0:
        return f"merged_i{iteration}"
    return f"liti_i{iteration}_e{eta:g}" if eta else "sft"


def evaluation_names(config: ConfigDict) -> set[str]:
    """Of all evaluations that a job makes."""
    names = {"sft"}
    for iteration in range(1, len(config.warp.steps_per_iteration) + 1):
        for run in range(1, config.warp.num_runs + 1):
            names.update(trajectory(config, iteration, run).values())
        names |= front_names(config, iteration)
    return names


def trajectory(config: ConfigDict, iteration: int, run: int) -> dict[int, str]:
    """After which steps of a run its policy is evaluated, every so many and at the end, and under which name."""
    num_steps, every = config.warp.steps_per_iteration[iteration - 1], config.evaluation.every
    steps = sorted({*range(every, num_steps + 1, every), num_steps})
    return {step: evaluation_name("policy", iteration, run, float("nan"), step) for step in steps}


def front_names(config: ConfigDict, iteration: int) -> set[str]:
    """Of the evaluations of an iteration's merge and of its front."""
    return {evaluation_name("liti", iteration, 0, eta, 0) for eta in (1.0, *config.front.etas)}


def front_points(
    etas: tuple[float, ...], sft_params: Params, merged: Params, iteration: int, evaluations: EvaluationStore
) -> list[Point]:
    """The merge, and the output family (1 - eta) sft + eta merged for every eta; the ends are not measured twice."""

    def measure(eta: float) -> Evaluation:
        return evaluations.get(
            evaluation_name("liti", iteration, 0, eta, 0), lambda: merging.liti(sft_params, merged, eta)
        )

    nan = float("nan")
    liti = [Point("liti", iteration, 0, eta, 0, measure(eta)) for eta in etas]
    return [Point("merged", iteration, 0, nan, 0, measure(1.0)), *liti]
