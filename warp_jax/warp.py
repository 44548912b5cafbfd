"""Algorithm 1 of WARP: I iterations of M runs, a spherical merge, and a step towards it; then the front."""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from warp_jax import checkpoint, evaluate, files, merging, stages, train
from warp_jax.evaluate import Evaluation, EvaluationStore
from warp_jax.prepare import Setup
from warp_jax.progress import JobProgress
from warp_jax.types import Params, TrainState


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
    nan, names = float("nan"), {"sft"}
    for iteration, num_steps in enumerate(config.warp.steps_per_iteration, start=1):
        for run in range(1, config.warp.num_runs + 1):
            steps = _trajectory_steps(num_steps, config.evaluation.every)
            names.update(evaluation_name("policy", iteration, run, nan, step) for step in steps)
        names.update(evaluation_name("liti", iteration, 0, eta, 0) for eta in (1.0, *config.front.etas))
    return names


def run_warp(config: ConfigDict, setup: Setup, workdir: Path, progress: JobProgress) -> list[Point]:
    """Train, merge and evaluate everything the workdir does not hold yet; return all points in order."""

    def on_new(name: str, evaluation: Evaluation, seconds: float) -> None:
        progress.on_evaluation(f"{name}: {_in_words(evaluation)}", seconds)

    evaluations = EvaluationStore(workdir / "evaluations", _make_evaluate(config, setup), on_new)
    progress.expect_evaluations(len(evaluations.missing(evaluation_names(config))))
    optimizer = stages.make_optimizer(config.rl, config.adam)
    programs = _make_programs(config, setup, optimizer)
    sft = setup.sft_params
    points = [Point("sft", 0, 0, 0.0, 0, evaluations.get("sft", lambda: sft))]
    init_params = sft
    for iteration in range(1, config.warp.num_iterations + 1):
        directory = workdir / f"iteration_{iteration}"
        policies = []
        for run in range(1, config.warp.num_runs + 1):
            params, trajectory = run_policy(
                config,
                setup,
                programs,
                evaluations,
                init_params,
                iteration=iteration,
                run=run,
                directory=directory / f"run_{run}",
                progress=progress,
            )
            policies.append(params)
            points += trajectory
        merged = merge(config.warp, init_params, policies, directory)
        points += front_points(config.front.etas, sft, merged, iteration, evaluations)
        init_params = merging.liti(init_params, merged, config.warp.liti_rate)
    return points


def run_policy(
    config: ConfigDict,
    setup: Setup,
    programs: train.Programs,
    evaluations: EvaluationStore,
    init_params: Params,
    *,
    iteration: int,
    run: int,
    directory: Path,
    progress: JobProgress,
) -> tuple[Params, list[Point]]:
    """One run of one iteration, and the points of its trajectory."""
    num_steps = config.warp.steps_per_iteration[iteration - 1]
    path = directory / "params"
    finished = checkpoint.has_params(path)
    progress.start_stage(f"iteration {iteration} run {run}", num_steps, finished=finished)

    nan = float("nan")

    def name(step: int) -> str:
        return evaluation_name("policy", iteration, run, nan, step)

    def after_step(step: int, state: TrainState) -> None:
        if step in _trajectory_steps(num_steps, config.evaluation.every):
            evaluations.get(name(step), lambda: state.params)

    if finished:
        params = checkpoint.restore_params(path, init_params)
    else:
        params = train.run_policy(
            init_params,
            setup.frozen_params,
            programs=programs,
            reward_fn=setup.train_reward_fn,
            train_prompts=setup.train_prompts,
            mesh=setup.mesh,
            seed=config.seed,
            iteration=iteration,
            run=run,
            num_steps=num_steps,
            batch_size=config.rl.batch_size,
            group_size=config.rl.samples_per_prompt,
            checkpoint_every=config.checkpoint_every,
            directory=directory,
            on_step=progress.on_step,
            after_step=after_step,
        )
        checkpoint.save_params(path, params)
        checkpoint.forget_state(directory)
        progress.end_stage(num_steps)
    steps = _trajectory_steps(num_steps, config.evaluation.every)

    def params_at(step: int) -> Params:
        if step != num_steps:
            raise FileNotFoundError(f"evaluation {name(step)} is gone, and so is its policy; delete {directory}")
        return params

    found = {s: evaluations.get(name(s), functools.partial(params_at, s)) for s in steps}
    return params, [Point("policy", iteration, run, nan, s, evaluation) for s, evaluation in found.items()]


def merge(config: ConfigDict, init_params: Params, policies: list[Params], directory: Path) -> Params:
    """theta_slerp of one iteration (line 12), stored with the angles and norms of its task vectors per unit."""
    path = directory / "merged"
    if checkpoint.has_params(path):
        return checkpoint.restore_params(path, init_params)
    merged = merging.merge(init_params, policies, config.merge, unit=config.unit)
    gram = merging.gram(init_params, policies, config.unit)
    geometry = {
        "units": gram.names,
        "angles_degrees": np.degrees(merging.angles(gram.matrix)).tolist(),
        "norms": np.asarray(merging.norms(gram.matrix)).tolist(),
    }
    files.write_json(directory / "geometry.json", geometry)
    checkpoint.save_params(path, merged)
    return merged


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


def _trajectory_steps(num_steps: int, every: int) -> list[int]:
    return sorted({*range(every, num_steps + 1, every), num_steps})


def _make_evaluate(config: ConfigDict, setup: Setup) -> evaluate.EvaluateFn:
    return evaluate.make_evaluate(
        setup.mesh,
        apply_fn=setup.apply_fn,
        make_cache=setup.make_cache,
        sampling_config=setup.sampling_config,
        sft_params=setup.sft_params,
        frozen_params=setup.frozen_params,
        reward_fn=setup.eval_reward_fn,
        gold_fn=setup.gold_fn,
        eval_prompts=setup.eval_prompts,
        batch_size=config.evaluation.batch_size,
        seed=config.seed,
    )


def _make_programs(config: ConfigDict, setup: Setup, optimizer: Any) -> train.Programs:
    return train.make_programs(
        setup.mesh,
        setup.sft_params,
        apply_fn=setup.apply_fn,
        make_cache=setup.make_cache,
        optimizer=optimizer,
        sampling_config=setup.sampling_config,
        kl_coef=config.rl.kl_coef,
        ema_rate=config.warp.ema_rate,
        advantage=config.rl.advantage,
        group_size=config.rl.samples_per_prompt,
        whiten=config.rl.whiten,
        num_microbatches=config.rl.num_microbatches,
    )


def _in_words(evaluation: Evaluation) -> str:
    row = evaluate.summary(evaluation)
    return f"reward {row['reward']:.3f} (gold {row['gold_reward']:.3f}) at {row['sft_kl']:.2f} nats from SFT"
