"""Evaluating a policy on held-out prompts: reward, gold reward, KL to SFT, length, diversity."""

import dataclasses
import io
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from warp_jax import files, trees
from warp_jax.data import batches
from warp_jax.evaluation import statistics
from warp_jax.generation import sampling
from warp_jax.parallel import hosts, meshes, stopping
from warp_jax.training import supervised
from warp_jax.types import (
    Array,
    HostOrDevice,
    Params,
    PromptBatch,
    RewardError,
    RewardFn,
    Rollout,
    States,
    StorageError,
)


class Evaluation(NamedTuple):
    """Results of one policy on N completions of held-out prompts; all policies get the same prompts."""

    reward: np.ndarray  # float32 [N], reward units
    gold_reward: np.ndarray  # float32 [N], reward units
    sft_kl: np.ndarray  # float32 [N], nats per completion
    length: np.ndarray  # int [N], tokens of the completion
    distinct_2: np.ndarray  # float [], share of distinct pairs of neighbouring tokens
    completion_ids: np.ndarray  # int32 [N, C]
    completion_mask: np.ndarray  # bool [N, C]
    clusters: np.ndarray  # int [N], equal for completions of equal prompts
    text_nats: np.ndarray = np.zeros(0, np.float32)  # [R], -log-probability of each of R texts; R = 0: not measured
    text_tokens: np.ndarray = np.zeros(0, int)  # [R], tokens that text_nats sums over


EVALUATION_STREAM = 2**31 - 1  # takes the place of the iteration in random keys, so they differ from those of training
CALL_BATCHES = 8  # batches that one call samples: a row whose completion has ended takes the prompt of a later batch
# trained leaves of policy and SFT, frozen leaves, completions, the policy's States (or None) -> [B], nats
KlFn = Callable[[Params, Params, Params, Rollout, States | None], Array]
# trained leaves, frozen leaves, token_ids and mask [B, S] -> [B], nats
TextFn = Callable[[Params, Params, HostOrDevice, HostOrDevice], Array]


class Texts(NamedTuple):
    """Texts whose perplexity is measured."""

    losses: TextFn
    rows: PromptBatch  # R texts, a multiple of the batch size; may be 0


class Examiner(NamedTuple):
    """Functions and data shared by all evaluations. All use the same prompts and random keys, so they are paired."""

    mesh: Mesh
    sampler: sampling.Sampler
    kl_to_sft: KlFn
    reward_fn: RewardFn
    gold_fn: Callable[[Rollout], np.ndarray]  # gold rewards, float32 [B]
    sft_params: Params  # trained leaves of SFT
    frozen_params: Params  # the other leaves of the model
    eval_prompts: PromptBatch
    batch_size: int  # must divide the number of prompts
    seed: int
    texts: Texts | None = None


def make_kl_to_sft(score_kl: Callable[..., Array]) -> KlFn:
    """Compile the KL of a policy to SFT from score_kl(policy, SFT, rollout, states=states), which takes whole models.

    The frozen leaves are joined inside the compiled function, so XLA computes frozen layers below the first trained one
    only once, and with the policy's states not at all.
    """

    @jax.jit
    def kl_to_sft(
        params: Params, sft_params: Params, frozen_params: Params, rollout: Rollout, states: States | None = None
    ) -> Array:
        models = (trees.join(leaves, frozen_params) for leaves in (params, sft_params))
        return score_kl(*models, rollout, states=states)

    return kl_to_sft


def make_text_losses(next_token_losses: Callable[..., Array]) -> TextFn:
    """Compile the losses of texts from next_token_losses(whole model, token_ids, mask) -> [B, S - 1], nats."""

    @jax.jit
    def text_losses(params: Params, frozen_params: Params, token_ids: Array, mask: Array) -> Array:
        losses = next_token_losses(trees.join(params, frozen_params), token_ids, mask)
        return jnp.where(supervised.counted_tokens({"mask": mask}), losses, 0).sum(axis=1)

    return text_losses


def evaluate(examiner: Examiner, params: Params) -> Evaluation:
    """Sample and measure one completion for each row of the prompts; params are the trained leaves of the policy.

    Raises:
        FloatingPointError: a KL is not finite, in every process.
        RewardError: from the reward functions.
        Stopped: a signal asked for it.
    """
    laid_out = examiner.sampler.lay_out(trees.join(params, examiner.frozen_params))
    measured = [_measure(examiner, params, *batch) for batch in _completions(examiner, laid_out)]
    columns = {name: np.concatenate([batch[name] for batch in measured]) for name in measured[0]}
    if bad := np.count_nonzero(~np.isfinite(columns["sft_kl"])):
        raise FloatingPointError(
            f"sft_kl is nan or inf for {bad} of {len(columns['sft_kl'])} completions, want finite; leave out extreme "
            "front.etas, or lower learning_rate"
        )
    mask = columns["completion_mask"]
    rows = [ids[keep].tolist() for ids, keep in zip(columns["completion_ids"], mask, strict=True)]
    prompt_ids = np.asarray(examiner.eval_prompts.prompt_ids)
    return Evaluation(
        length=mask.sum(1),
        distinct_2=np.array(statistics.distinct_n(rows, 2)),
        clusters=np.unique(prompt_ids, axis=0, return_inverse=True)[1].reshape(-1),
        **columns,
        **_measure_texts(examiner, params),
    )


def _completions(examiner: Examiner, laid_out: Params) -> Iterator[tuple[Rollout, States]]:
    """A completion for each prompt, and the policy's states, in batches of examiner.batch_size."""
    key = jax.random.fold_in(jax.random.key(examiner.seed), EVALUATION_STREAM)
    rows = np.arange(len(examiner.eval_prompts.example_ids)).reshape(-1, examiner.batch_size)
    for first in range(0, len(rows), CALL_BATCHES):
        call = rows[first : first + CALL_BATCHES]
        prompts = meshes.put_batch(examiner.mesh, batches.take(examiner.eval_prompts, call), axis=1)
        sampled = examiner.sampler.generate_with_states(laid_out, prompts, key, first=call[0, 0])
        for batch in range(len(call)):
            stopping.stop_if_requested("an evaluation, which will be made again")
            yield jax.tree.map(lambda x, batch=batch: x[batch], sampled)
        del sampled  # else it is in memory while the next call samples


def _measure(examiner: Examiner, params: Params, rollout: Rollout, states: States) -> dict[str, np.ndarray]:
    """Measure one batch. The KL is dispatched first: the device computes it while the host computes rewards of text."""
    measured = {
        "sft_kl": examiner.kl_to_sft(params, examiner.sft_params, examiner.frozen_params, rollout, states),
        "reward": examiner.reward_fn(rollout).total,
        "gold_reward": examiner.gold_fn(rollout),
        "completion_ids": rollout.completion_ids,
        "completion_mask": rollout.completion_mask,
    }
    return hosts.fetch(measured)


def _measure_texts(examiner: Examiner, params: Params) -> dict[str, np.ndarray]:
    if examiner.texts is None:
        return {}
    losses, rows = examiner.texts
    size, nats = examiner.batch_size, [np.zeros(0, np.float32)]
    for first in range(0, len(rows.prompt_ids), size):
        batch = meshes.put_batch(examiner.mesh, batches.take(rows, np.arange(first, first + size)))
        nats.append(hosts.fetch(losses(params, examiner.frozen_params, batch.prompt_ids, batch.prompt_mask)))
    counted = np.asarray(supervised.counted_tokens({"mask": rows.prompt_mask}))
    return {"text_nats": np.concatenate(nats), "text_tokens": counted.sum(1)}


def summary(evaluation: Evaluation) -> dict[str, float]:
    """Means over the completions and their standard errors (`_se`), named like the columns of front.csv."""
    row = {}
    for name in ("reward", "gold_reward", "sft_kl"):
        row[name], row[f"{name}_se"] = statistics.mean_and_se(getattr(evaluation, name), evaluation.clusters)
    return {**row, "length": float(evaluation.length.mean()), "distinct_2": float(evaluation.distinct_2)}


@dataclasses.dataclass(frozen=True)
class EvaluationStore:
    """Evaluations saved by name: no policy is evaluated twice."""

    directory: Path
    evaluate: Callable[[Params], Evaluation]  # trained leaves of the policy
    on_new: Callable[[str, Evaluation, float], None]  # called after each new evaluation: name, result, seconds

    def missing(self, names: Iterable[str]) -> list[str]:
        """The names that have no saved evaluation, sorted."""
        return [name for name in sorted(names) if not hosts.exists(self._path(name))]

    def saved(self, names: Mapping[int, str]) -> dict[int, Evaluation]:
        """Load the saved ones of some evaluations, by their keys in `names`."""
        found = {key: self._path(name) for key, name in names.items() if hosts.exists(self._path(name))}
        return {key: load_evaluation(path) for key, path in found.items()}

    def get(self, name: str, make_params: Callable[[], Params]) -> Evaluation:
        """Load the evaluation saved as `name`; if it is missing, evaluate make_params() and save the result."""
        path = self._path(name)
        if not hosts.exists(path):
            started = time.monotonic()
            try:
                evaluation = self.evaluate(make_params())
            except (RewardError, FloatingPointError) as error:
                raise type(error)(f"evaluation {name}: {error}") from error
            hosts.on_first_process(lambda: save_evaluation(path, evaluation))
            self.on_new(name, evaluation, time.monotonic() - started)
            return evaluation
        return load_evaluation(path)

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}.npz"


def save_evaluation(path: Path, evaluation: Evaluation) -> None:
    """Write an evaluation to an .npz file."""
    content = io.BytesIO()
    np.savez_compressed(content, **evaluation._asdict())
    files.write_bytes(path, content.getvalue())


def load_evaluation(path: Path) -> Evaluation:
    """Read a saved evaluation. Those of earlier versions have no clusters (each completion is one), and no texts.

    Raises StorageError if the file is not what was written; an .npz file holds a checksum of each array.
    """
    content = io.BytesIO(path.read_bytes())
    try:
        with zipfile.ZipFile(content) as archive:
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(damaged)
        content.seek(0)
        with np.load(content, allow_pickle=False) as arrays:
            return Evaluation(**{"clusters": np.arange(len(arrays["reward"])), **arrays})
    except Exception as error:  # a flipped bit may also ask for a password, or for another compression
        raise StorageError(f"{path} is not what was written; delete it to make it again") from error
