"""SFT, reward model and gold reward: trained before RL, each once, in a folder of the workdir."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from warp_jax import files, trees
from warp_jax.data import batches
from warp_jax.data.corpus import Corpus, asked
from warp_jax.data.tokenizer import Tokenizer
from warp_jax.experiment import architecture
from warp_jax.models import apply, freezing
from warp_jax.models.transformer import TransformerConfig
from warp_jax.parallel import hosts
from warp_jax.progress import JobProgress
from warp_jax.rewards import from_folder, reward_functions
from warp_jax.settings import Settings
from warp_jax.settings.groups import RewardModel, Sft
from warp_jax.storage import checkpoint
from warp_jax.training import loop, optimizers, supervised
from warp_jax.types import ApplyFn, Params, Rollout

HELD_OUT_BATCHES = 16  # at most, for the held-out quality of SFT and of the reward model

Tokens = list[np.ndarray]  # ids of each text


def sft_loss(settings: Settings, apply_fn: ApplyFn) -> supervised.LossFn:
    """The loss of SFT."""
    return functools.partial(supervised.language_loss, apply_fn, logits_chunk=settings.model.logits_chunk)


def reward_loss(settings: Settings, apply_fn: ApplyFn) -> supervised.LossFn:
    """The loss of the reward model."""
    return functools.partial(supervised.REWARD_LOSSES[settings.reward_model.loss], apply_fn)


class Task(NamedTuple):
    """One supervised training. start: all weights at its start; trainable: pattern on the names of its trained weights.

    batch_fn, held_out_batch: step -> batch. held_out_rows: number of held-out texts.
    """

    loss_fn: supervised.LossFn
    start: Params
    trainable: str
    batch_fn: Callable[[int], supervised.Batch]
    held_out_batch: Callable[[int], supervised.Batch]
    held_out_rows: int


@dataclasses.dataclass(frozen=True)
class Maker:
    """Makes each ingredient from the token ids and labels of each split, or restores it from the workdir."""

    settings: Settings
    workdir: Path
    progress: JobProgress
    mesh: Mesh
    tokenizer: Tokenizer
    _text_fns: dict[str, reward_functions.TextFn] = dataclasses.field(default_factory=dict)

    def sft(self, model: TransformerConfig, tokens: Mapping[str, Tokens]) -> Params:
        """theta_sft: the pretrained model or random weights, after next-token training on the reward and gold splits
        for sft.num_steps steps.
        """
        sft, start = self.settings.sft, architecture.start_params(self.settings, model, self.mesh)
        if not sft.num_steps:
            return start
        rows = tokens["reward"] + tokens["gold"]

        def batch_fn(step: int) -> supervised.Batch:
            chosen = batches.epoch_rows(len(rows), sft.batch_size, step, seed=self.settings.seed, stream="sft")
            return self._text_batch(rows, chosen, sft.sequence_tokens, step, "sft window")

        def held_out_batch(step: int) -> supervised.Batch:
            chosen = (np.arange(sft.batch_size) + step * sft.batch_size) % len(tokens["eval"])
            return self._text_batch(tokens["eval"], chosen, sft.sequence_tokens, step, "sft held out")

        loss_fn = sft_loss(self.settings, apply.make_apply_fn(model, self.mesh))
        trainable = self.settings.model.trainable
        task = Task(loss_fn, start, trainable, batch_fn, held_out_batch, len(tokens["eval"]))
        return self._train("sft", sft, task)

    def reward_model(
        self,
        policy: TransformerConfig,
        tokens: Mapping[str, Tokens],
        corpora: Mapping[str, Corpus],
        sft_params: Params,
    ) -> Callable[[Rollout], Any]:
        """r(x, y): the SFT trunk with a scalar head, trained on fragments of the reward split and their labels."""
        settings = self.settings.reward_model
        model = architecture.reward_model_config(settings, policy)
        labels = {name: np.array(corpora[name].labels) for name in ("reward", "eval")}

        def batch_fn(step: int, split: str = "reward") -> supervised.Batch:
            chosen = supervised.paired_rows(
                labels[split], settings.batch_size, step, seed=self.settings.seed, stream=f"labels {split}"
            )
            batch = self._text_batch(tokens[split], chosen, settings.sequence_tokens, step, f"fragments {split}")
            return {**batch, "labels": labels[split][chosen]}

        apply_fn = apply.make_apply_fn(model, self.mesh)
        start = freezing.restacked(sft_params, apply.random_params(model, self.mesh, self.settings.seed))
        held_out_batch = functools.partial(batch_fn, split="eval")
        loss_fn, held_out_rows = reward_loss(self.settings, apply_fn), len(tokens["eval"])
        task = Task(loss_fn, start, settings.trainable, batch_fn, held_out_batch, held_out_rows)
        return reward_functions.make_learned(apply_fn, self._train("reward_model", settings, task))

    def gold(self, tokens: Mapping[str, Tokens], corpora: Mapping[str, Corpus]) -> reward_functions.TextFn:
        """The gold reward, fitted on fragments of the gold split; nan for every text if the config has none."""
        settings = self.settings.gold
        if not settings.source:
            return lambda prompts, completions, rows: np.full(len(completions), np.nan)
        if settings.source != "tfidf":
            return self.text_fn(settings.source)
        from warp_jax.rewards import tfidf  # noqa: PLC0415  scikit-learn is slow to import

        path = self.workdir / "gold" / "gold.json"

        def make() -> None:
            texts, labels = self._fragments(tokens["gold"], corpora["gold"].labels, settings.fragments_per_text)
            fitted = tfidf.fit(texts, labels, settings.max_terms)
            held_out = tfidf.auc(fitted, *self._fragments(tokens["eval"], corpora["eval"].labels, 1))
            self.progress.note(f"gold reward: held-out AUC {held_out:.3f}")
            files.write_json(path.with_name("summary.json"), {"auc": held_out})
            tfidf.save(fitted, path)

        hosts.make_if_missing(path, make)
        return tfidf.load(path).score

    def text_fn(self, source: str) -> reward_functions.TextFn:
        """A reward on text: a Python function, or the reward model in a folder, which is loaded once."""
        if source not in self._text_fns:
            self._text_fns[source] = self._load_text_fn(source)
        return self._text_fns[source]

    def _load_text_fn(self, source: str) -> reward_functions.TextFn:
        if not Path(source).is_dir():
            return reward_functions.load_function(source)
        data = self.settings.data
        asks = functools.partial(asked, text_field=data.text_field, prompt_template=data.prompt_template)
        return from_folder.load(Path(source), self.mesh, self.settings.model.dtype, asks if data.chat else None)

    def _train(self, name: str, settings: Sft | RewardModel, task: Task) -> Params:
        """Run a task, or restore its result; only the trained weights are saved, all weights are returned."""
        directory = self.workdir / name
        trained, frozen = freezing.split(task.start, task.trainable)
        finished = checkpoint.has_params(directory / "params")
        self.progress.start_phase(name, settings.num_steps, finished=finished)
        if finished:
            checkpoint.forget_state(directory)  # a killed job may have left it
            return trees.join(checkpoint.restore_params(directory / "params", trained), frozen)
        schedule = loop.Schedule(settings.num_steps, directory, self.settings.checkpoint_every, self.progress.on_step)
        optimizer = optimizers.make_optimizer(settings, self.settings.adam)
        trained = supervised.fit(
            task.loss_fn, trained, frozen, task.batch_fn, optimizer=optimizer, mesh=self.mesh, schedule=schedule
        )
        params = trees.join(trained, frozen)
        self._measure(name, settings.batch_size, task, params)
        checkpoint.save_params(directory / "params", trained)
        checkpoint.forget_state(directory)
        return params

    def _measure(self, name: str, batch_size: int, task: Task, params: Params) -> None:
        """Save and print the held-out metrics."""
        count = int(np.clip(task.held_out_rows // batch_size, 1, HELD_OUT_BATCHES))
        held_out = [task.held_out_batch(number) for number in range(count)]
        summary = supervised.held_out(task.loss_fn, params, held_out, self.mesh)
        self.progress.note(f"{name}: held-out " + ", ".join(f"{key} {value:.3f}" for key, value in summary.items()))
        if hosts.is_first():
            files.write_json(self.workdir / name / "summary.json", summary)

    def _text_batch(self, rows: Tokens, chosen: np.ndarray, length: int, step: int, stream: str) -> supervised.Batch:
        names = {"bos_id": self.tokenizer.bos_id, "pad_id": self.tokenizer.pad_id}
        return supervised.text_batch(rows, chosen, length, step, seed=self.settings.seed, stream=stream, **names)

    def _fragments(self, rows: Tokens, labels: Sequence[int], per_text: int) -> tuple[list[str], list[int]]:
        length = self.settings.sampling.prompt_tokens + self.settings.sampling.max_new_tokens
        texts: list[str] = []
        for number in range(per_text):
            batch = self._text_batch(rows, np.arange(len(rows)), length, number, "gold fragments")
            texts += self.tokenizer.decode(batch["token_ids"], batch["mask"])
        return texts, list(labels) * per_text
