"""Measure what bfloat16 does to log-probabilities, to the KL to SFT, and to a run at a small learning rate.

  python scripts/study_precision.py --config=configs/smollm2_135m.py --workdir=runs/precision --out=precision.json

Part 1: the policy is init + noise. Part 2: the same RL run in float32 and in bfloat16; then policy and anchor of the
float32 run are scored in both. Results and their reading are in docs/results/precision.md.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging
from ml_collections import config_flags

from warp_jax import cli, files, trees
from warp_jax.data import batches
from warp_jax.evaluation import measure
from warp_jax.experiment import architecture, preparation
from warp_jax.models.apply import make_apply_fn
from warp_jax.parallel import meshes
from warp_jax.progress import JobProgress
from warp_jax.settings import Settings, from_config
from warp_jax.training import loop, reinforce, scoring
from warp_jax.types import Params, Rollout

CONFIG = config_flags.DEFINE_config_file("config", None, "Config with a pretrained model.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder for the runs; what is finished there is not repeated.")
OUT = flags.DEFINE_string("out", "precision.json", "JSON file for the results.")
NOISE = flags.DEFINE_float("noise", 1e-4, "Standard deviation of the noise on each trained weight, part 1.")
LEARNING_RATE = flags.DEFINE_float("learning_rate", 1e-6, "Learning rate of part 2 (the paper's: 1e-6).")
STEPS = flags.DEFINE_integer("steps", 40, "Steps of each run of part 2; 0 = part 1 only.", lower_bound=0)
COMPLETIONS = flags.DEFINE_integer("completions", 32, "Completions that policies are scored on.", lower_bound=2)
DTYPES = ("float32", "bfloat16")


def log_ratios(
    settings: Settings, dtype: str, policy: Params, reference: Params, rollout: Rollout
) -> tuple[np.ndarray, np.ndarray]:
    """Log-ratio of each token [B, C] and exact KL of each completion [B] between two policies, computed in a dtype."""
    config = dataclasses.replace(architecture.policy_config(settings.model, settings.vocab_size), dtype=dtype)
    options: Any = {"temperature": settings.sampling.temperature, "chunk": settings.model.logits_chunk}
    score = jax.jit(functools.partial(scoring.per_token_logps, make_apply_fn(config), **options))
    kl = jax.jit(functools.partial(scoring.sequence_kl, make_apply_fn(config), **options))
    ratio = score(policy, rollout) - score(reference, rollout)
    return np.asarray(ratio, np.float64), np.asarray(kl(policy, reference, rollout), np.float64)


def compare(settings: Settings, policy: Params, reference: Params, rollout: Rollout) -> dict[str, dict[str, float]]:
    """Log-ratios and KLs in both dtypes, and the errors of bfloat16 (standard deviations, nats)."""
    mask = np.asarray(rollout.completion_mask)
    found = {dtype: log_ratios(settings, dtype, policy, reference, rollout) for dtype in DTYPES}
    exact = found["float32"][0]
    rows = {}
    for dtype, (ratio, kl) in found.items():
        error = ratio - exact
        rows[dtype] = {
            "log_ratio": float(ratio.sum(1).mean()),
            "log_ratio_rms": float(np.sqrt(np.mean(ratio.sum(1) ** 2))),
            "exact_kl": float(kl.mean()),
            "error_per_token": float(error[mask].std()),
            "error_per_completion": float(error.sum(1).std()),
        }
    return rows


def noisy(params: Params, deviation: float) -> Params:
    """The parameters plus normal noise."""
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noise = [deviation * jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(treedef, [x + n for x, n in zip(leaves, noise, strict=True)])


def run(settings: Settings, directory: Path, trainer: reinforce.Trainer, init: Params) -> tuple[Any, list[Any]]:
    """Train one run; return its last state and the metrics of each step."""
    states: list[Any] = []
    metrics: list[Any] = []

    def keep(done: int, state: Any) -> None:
        states[:] = [jax.tree.map(jnp.copy, state)] if done == STEPS.value else []

    schedule = loop.Schedule(STEPS.value, directory, STEPS.value + 1, lambda _, values: metrics.append(values), keep)
    reinforce.run_policy(trainer, init, iteration=1, run=1, schedule=schedule)
    return states[0], [m for m in metrics if m]


def main(argv: list[str]) -> None:
    """Run both parts, and write the results as they come."""
    del argv
    logging.set_verbosity(logging.ERROR)
    changes = {"rl.learning_rate": LEARNING_RATE.value, "evaluation.dtype": "float32"}
    results: dict[str, Any] = {"noise": NOISE.value, "learning_rate": LEARNING_RATE.value, "steps": STEPS.value}
    for dtype in DTYPES:
        settings = from_config(CONFIG.value.to_dict()).replace({**changes, "model.dtype": dtype})
        corpora = preparation.load_corpora(settings)
        workdir = Path(WORKDIR.value) / dtype
        with JobProgress(STEPS.value) as progress:
            _, trainer, examiner = preparation.prepare(settings, corpora, workdir, progress)
        sft, frozen = examiner.sft_params, examiner.frozen_params
        batch = batches.take(examiner.eval_prompts, np.arange(COMPLETIONS.value))
        if dtype == "float32":
            policy = trees.join(noisy(sft, NOISE.value), frozen)
            prompts = meshes.put_batch(trainer.mesh, batch)
            rollout = trainer.sampler(policy, prompts, jax.random.key(0))
            results["init_plus_noise"] = compare(settings, policy, trees.join(sft, frozen), rollout)
            files.write_json(Path(OUT.value), results)
        if not STEPS.value:
            break
        state, metrics = run(settings, workdir / "run", trainer, sft)
        evaluation = measure.evaluate(examiner, state.params)
        means = {name: float(np.mean([step[name] for step in metrics])) for name in metrics[0]}
        results[f"run_{dtype}"] = {**means, **{f"held_out_{k}": v for k, v in measure.summary(evaluation).items()}}
        if dtype == "float32":
            policies = [trees.join(tree, frozen) for tree in (state.params, state.anchor_params)]
            rollout = trainer.sampler(policies[0], meshes.put_batch(trainer.mesh, batch), jax.random.key(0))
            results["policy_and_anchor"] = compare(settings, *policies, rollout)
        files.write_json(Path(OUT.value), results)
    print(Path(OUT.value).read_text())


if __name__ == "__main__":
    cli.run(main, required=("config", "workdir"), example="--config=configs/smollm2_135m.py --workdir=runs/precision")
