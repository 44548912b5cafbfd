"""Measuring a policy on held-out prompts: reward, gold reward, KL to SFT, length, diversity."""

import io
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from warp_jax import files, trees
from warp_jax.data import batches
from warp_jax.evaluation import statistics
from warp_jax.parallel import hosts, meshes
from warp_jax.training import sampling, scoring
from warp_jax.types import ApplyFn, Array, Params, PromptBatch, RewardFn, Rollout


class Evaluation(NamedTuple):
    """One sample for each of N held-out prompts, the same prompts in the same order for every policy (numpy).

    reward, gold_reward: float32 [N], reward units. sft_kl: float32 [N], nats per sequence. length: [N], tokens.
    distinct_2: float [], share of distinct token pairs. completion_ids [N, C], completion_mask [N, C].
    """

    reward: np.ndarray
    gold_reward: np.ndarray
    sft_kl: np.ndarray
    length: np.ndarray
    distinct_2: np.ndarray
    completion_ids: np.ndarray
    completion_mask: np.ndarray


EVALUATION_STREAM = 2**31 - 1  # apart from those of the iterations of training
EvaluateFn = Callable[[Params], Evaluation]
KlFn = Callable[[Params, Params, Params, Rollout], Array]  # trained of the policy, of SFT, frozen -> [B], nats
OnEvaluation = Callable[[str, Evaluation, float], None]


def make_kl_to_sft(apply_fn: ApplyFn, temperature: float, logits_chunk: int) -> KlFn:
    """Jit `scoring.sequence_kl` of a policy and SFT. They are joined with the frozen weights inside, so that XLA sees
    that frozen layers below the first trained one are the same in both.
    """

    @jax.jit
    def kl_to_sft(params: Params, sft_params: Params, frozen_params: Params, rollout: Rollout) -> Array:
        policy, reference = (trees.join(trained, frozen_params) for trained in (params, sft_params))
        return scoring.sequence_kl(apply_fn, policy, reference, rollout, temperature, chunk=logits_chunk)

    return kl_to_sft


def make_evaluate(
    mesh: Mesh,
    *,
    sampler: sampling.Sampler,
    kl_to_sft: KlFn,
    sft_params: Params,
    frozen_params: Params,
    reward_fn: RewardFn,
    gold_fn: Callable[[Rollout], np.ndarray],
    eval_prompts: PromptBatch,
    batch_size: int,
    seed: int,
) -> EvaluateFn:
    """A function params -> Evaluation over all eval_prompts, whose number must be a multiple of batch_size.

    params and sft_params are what is trained of the model, frozen_params the rest.
    Every policy gets the same prompts and random keys, so that differences between two policies are paired.
    """
    key = jax.random.fold_in(jax.random.key(seed), EVALUATION_STREAM)

    def evaluate_batch(params: Params, laid_out: Params, number: int) -> dict[str, np.ndarray]:
        rows = np.arange(number * batch_size, (number + 1) * batch_size)
        batch = meshes.put_batch(mesh, batches.take(eval_prompts, rows))
        rollout = sampler.generate(laid_out, batch, jax.random.fold_in(key, number))
        measured = {
            "reward": reward_fn(rollout).total,
            "sft_kl": kl_to_sft(params, sft_params, frozen_params, rollout),
            "completion_ids": rollout.completion_ids,
            "completion_mask": rollout.completion_mask,
        }
        return {**hosts.fetch(measured), "gold_reward": gold_fn(rollout)}

    def evaluate(params: Params) -> Evaluation:
        count = len(eval_prompts.example_ids) // batch_size
        laid_out = sampler.lay_out(trees.join(params, frozen_params))
        batches = [evaluate_batch(params, laid_out, number) for number in range(count)]
        columns = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
        mask = columns["completion_mask"]
        rows = [ids[keep].tolist() for ids, keep in zip(columns["completion_ids"], mask, strict=True)]
        return Evaluation(length=mask.sum(1), distinct_2=np.array(statistics.distinct_n(rows, 2)), **columns)

    return evaluate


def summary(evaluation: Evaluation) -> dict[str, float]:
    """Means over the prompts with their standard errors, as the columns of front.csv."""
    row = {}
    for name in ("reward", "gold_reward", "sft_kl"):
        row[name], row[f"{name}_se"] = statistics.mean_and_se(getattr(evaluation, name))
    return {**row, "length": float(evaluation.length.mean()), "distinct_2": float(evaluation.distinct_2)}


class EvaluationStore:
    """Evaluations on disk by name, so that none is made twice. on_new hears name, result and seconds of a new one."""

    def __init__(self, directory: Path, evaluate: EvaluateFn, on_new: OnEvaluation):
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._evaluate = evaluate
        self._on_new = on_new

    def missing(self, names: Iterable[str]) -> list[str]:
        """The names that have no evaluation yet."""
        return [name for name in sorted(names) if not hosts.exists(self._path(name))]

    def get(self, name: str, make_params: Callable[[], Params]) -> Evaluation:
        """The stored evaluation called `name`; if there is none, that of make_params()."""
        path = self._path(name)
        if not hosts.exists(path):
            started = time.monotonic()
            evaluation = self._evaluate(make_params())
            hosts.on_first_process(lambda: _save(path, evaluation))
            self._on_new(name, evaluation, time.monotonic() - started)
            return evaluation
        return load_evaluation(path)

    def _path(self, name: str) -> Path:
        return self._directory / f"{name}.npz"


def _save(path: Path, evaluation: Evaluation) -> None:
    content = io.BytesIO()
    np.savez_compressed(content, **evaluation._asdict())
    files.write_bytes(path, content.getvalue())


def load_evaluation(path: Path) -> Evaluation:
    """A stored evaluation."""
    with np.load(path) as arrays:
        return Evaluation(**arrays)
