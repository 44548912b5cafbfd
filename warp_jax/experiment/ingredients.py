"""SFT, reward model and gold reward: trained before RL, each once, in a folder of the workdir."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from warp_jax import files, trees
from warp_jax.data import batches, responses
from warp_jax.data.corpus import Corpus
from warp_jax.data.fields import asked
from warp_jax.data.tokenizer import Tokenizer
from warp_jax.experiment import architecture
from warp_jax.models import apply, freezing
from warp_jax.models.transformer import TransformerConfig
from warp_jax.parallel import hosts
from warp_jax.pretrained import sources
from warp_jax.progress import JobProgress
from warp_jax.rewards import from_folder, reward_functions, text_reward
from warp_jax.settings import Settings
from warp_jax.settings.groups import Data, Gold, RewardModel, RewardPart, Sft
from warp_jax.storage import checkpoint, manifest
from warp_jax.training import loop, metric_writer, optimizers, supervised, wandb_run
from warp_jax.types import ApplyFn, Params, Rollout

LEARNED = {"sft": ("reward", "gold"), "reward_model": ("reward",)}  # splits, joined
Place = tuple[str, tuple[str, ...]]  # "sft" or "reward_model", and the splits whose responses are joined
HELD_OUT_BATCHES = 16  # at most, for the held-out quality of SFT and of the reward model


def sft_loss(settings: Settings, apply_fn: ApplyFn) -> supervised.LossFn:
    """The loss of SFT."""
    return functools.partial(supervised.language_loss, apply_fn, logits_chunk=settings.model.logits_chunk)


def reward_loss(settings: Settings, apply_fn: ApplyFn) -> supervised.LossFn:
    """The loss of the reward model."""
    return functools.partial(supervised.REWARD_LOSSES[settings.reward_model.loss], apply_fn)


def named(splits: Sequence[str]) -> str:
    """Splits that are joined, for messages: the rows of a batch are numbered in them."""
    return f"split {splits[0]!r}" if len(splits) == 1 else f"splits {' and '.join(map(repr, splits))}, joined"


class Corpora(dict[str, Corpus]):
    """The splits of a job by name, and the responses that the checks of its start have encoded."""

    def __init__(self, splits: Mapping[str, Corpus], encoded: Mapping[Place, responses.Sequences]):
        super().__init__(splits)
        self._encoded = dict(encoded)

    def take(self, part: str, splits: tuple[str, ...]) -> responses.Sequences | None:
        """The encoded responses of a part, once: then their memory is free."""
        return self._encoded.pop((part, splits), None)


def check_responses(
    settings: Settings, corpora: Mapping[str, Corpus], tokenizer: Tokenizer | None
) -> dict[Place, responses.Sequences]:
    """Encode all responses; without a tokenizer, lengths are not known, and nothing is encoded.

    Raises ValueError if a row has no usable response, or no row fits.
    """
    encoded = {}
    for part, names in settings.response_fields.items():
        for splits in (LEARNED[part], ("eval",)):
            if tokenizer is not None:
                encoded[part, splits] = load_responses(settings, corpora, tokenizer, part, splits)
            else:
                responses.check([corpora[name] for name in splits], names, _ask(settings.data), use_chat=False)
    return encoded


def load_responses(
    settings: Settings, corpora: Mapping[str, Corpus], tokenizer: Tokenizer, part: str, splits: Sequence[str]
) -> responses.Sequences:
    """The prompts and responses that SFT or the reward model (`part`) reads from these splits."""
    data, length = settings.data, getattr(settings, part).sequence_tokens
    found = responses.encode(
        tokenizer,
        [corpora[name] for name in splits],
        settings.response_fields[part],
        _ask(data),
        use_chat=data.chat,
        length=length,
    )
    if not len(found.rows):
        raise ValueError(
            f"config.{part}.sequence_tokens: none of the {found.left_out} rows of {named(splits)} has at most {length} "
            "tokens, prompt and response together; allow longer ones"
        )
    return found


class Feed(NamedTuple):
    """Batches of one training, as in `supervised.Task`."""

    batch_fn: Callable[[int], supervised.Batch]
    held_out_batch: Callable[[int], supervised.Batch]
    held_out_batches: Callable[[], int]


@dataclasses.dataclass(frozen=True)
class Maker:
    """Makes each ingredient from the token ids and labels of each split, or restores it from the workdir."""

    settings: Settings
    workdir: Path
    progress: JobProgress
    mesh: Mesh
    tokenizer: Tokenizer
    corpora: Mapping[str, Corpus]

    @functools.cached_property
    def tokens(self) -> dict[str, list[np.ndarray]]:
        """Ids of the texts of each split that is learned from, each text with its end-of-sequence token."""
        end = np.int32(self.tokenizer.eos_id)
        texts = {name: self.corpora[name].texts for name in self.settings.learned_splits}
        return {name: [np.append(ids, end) for ids in self.tokenizer.encode(texts[name])] for name in texts}

    def sft(self, model: TransformerConfig) -> Params:
        """theta_sft: start weights after sft.num_steps steps of next-token training on the reward and gold splits."""
        if not self.settings.sft.num_steps:
            return architecture.start_params(self.settings, model, self.mesh)
        return self._train("sft", self.settings.sft, self.sft_task(model))

    def sft_task(self, model: TransformerConfig) -> supervised.Task:
        """Loss, start weights and batches of the training of theta_sft."""
        sft, start = self.settings.sft, architecture.start_params(self.settings, model, self.mesh)
        has_responses = "sft" in self.settings.response_fields
        feed = self._responses("sft", sft.batch_size) if has_responses else self._windows(sft)
        loss_fn = sft_loss(self.settings, apply.make_apply_fn(model, self.mesh))
        trained, frozen = freezing.split(start, self.settings.model.trainable)
        return supervised.Task(loss_fn, trained, frozen, *feed, sft.num_microbatches, supervised.num_counted)

    def reward_model(self, policy: TransformerConfig, sft_params: Params) -> Callable[[Rollout], Any]:
        """r(x, y): the SFT trunk with a scalar head, trained on labelled fragments or on pairs of responses."""
        task = self.reward_model_task(policy, sft_params)
        model = architecture.reward_model_config(self.settings.reward_model, policy)
        params = self._train("reward_model", self.settings.reward_model, task)
        return reward_functions.make_learned(apply.make_apply_fn(model, self.mesh), params)

    def reward_model_task(self, policy: TransformerConfig, sft_params: Params) -> supervised.Task:
        """Loss, start weights and batches of the training of the reward model."""
        settings = self.settings.reward_model
        model = architecture.reward_model_config(settings, policy)
        has_pairs = "reward_model" in self.settings.response_fields
        feed = self._responses("reward_model", settings.batch_size // 2) if has_pairs else self._labelled(settings)
        loss_fn = reward_loss(self.settings, apply.make_apply_fn(model, self.mesh))
        start = freezing.restacked(sft_params, apply.random_params(model, self.mesh, self.settings.seed))
        trained, frozen = freezing.split(start, settings.trainable)
        return supervised.Task(loss_fn, trained, frozen, *feed)

    def _windows(self, sft: Sft) -> Feed:
        """Random windows of the texts of SFT."""
        rows, held_out = self.tokens["reward"] + self.tokens["gold"], self.tokens["eval"]

        def batch_fn(step: int) -> supervised.Batch:
            chosen = batches.epoch_rows(len(rows), sft.batch_size, step, seed=self.settings.seed, stream="sft")
            return self._text_batch(rows, chosen, sft.sequence_tokens, step, "sft window")

        def held_out_batch(step: int) -> supervised.Batch:
            chosen = _in_order(step, sft.batch_size, len(held_out))
            return self._text_batch(held_out, chosen, sft.sequence_tokens, step, "sft held out")

        return Feed(batch_fn, held_out_batch, lambda: len(held_out) // sft.batch_size)

    def _labelled(self, settings: RewardModel) -> Feed:
        """Random fragments of the reward split, half of them with label 1, and their labels."""
        labels = {name: np.array(self.corpora[name].labels) for name in ("reward", "eval")}

        def batch_fn(step: int, split: str = "reward") -> supervised.Batch:
            chosen = supervised.paired_rows(
                labels[split], settings.batch_size, step, seed=self.settings.seed, stream=f"labels {split}"
            )
            batch = self._text_batch(self.tokens[split], chosen, settings.sequence_tokens, step, f"fragments {split}")
            return {**batch, "labels": labels[split][chosen]}

        held_out_batch = functools.partial(batch_fn, split="eval")
        return Feed(batch_fn, held_out_batch, lambda: len(self.tokens["eval"]) // settings.batch_size)

    def _responses(self, part: str, num_prompts: int) -> Feed:
        """Batches of so many prompts with their responses, which are loaded for the first batch."""
        length, pad_id, seed = getattr(self.settings, part).sequence_tokens, self.tokenizer.pad_id, self.settings.seed

        take = self.corpora.take if isinstance(self.corpora, Corpora) else lambda *place: None
        checked = {splits: take(part, splits) for splits in (LEARNED[part], ("eval",))}

        @functools.cache
        def load(splits: tuple[str, ...]) -> responses.Sequences:
            found = checked[splits] or load_responses(self.settings, self.corpora, self.tokenizer, part, splits)
            if found.left_out:
                self.progress.note(
                    f"{part}: {found.left_out} of {found.left_out + len(found.rows)} rows of {named(splits)} left out: "
                    f"more than {part}.sequence_tokens = {length} tokens"
                )
            return found

        def make_batch(splits: tuple[str, ...], choose: Callable[[int], np.ndarray]) -> supervised.Batch:
            sequences = load(splits)
            chosen = choose(len(sequences.rows))
            ids, mask, is_response = sequences.batch(chosen, length, pad_id)
            rows = np.resize(sequences.rows[chosen], len(ids)).astype(np.int32)
            return {"token_ids": ids, "mask": mask, supervised.COUNTED: is_response, supervised.ROW: rows}

        def batch_fn(step: int) -> supervised.Batch:
            return make_batch(
                LEARNED[part],
                lambda count: batches.epoch_rows(count, num_prompts, step, seed=seed, stream=part),
            )

        def held_out_batch(step: int) -> supervised.Batch:
            return make_batch(("eval",), lambda count: _in_order(step, num_prompts, count))

        return Feed(batch_fn, held_out_batch, lambda: len(load(("eval",)).rows) // num_prompts)

    def gold(self) -> text_reward.TextFn:
        """The gold reward, fitted on fragments of the gold split; nan for every text if the config has none."""
        settings = self.settings.gold
        if not settings.source:
            return lambda prompts, completions, rows: np.full(len(completions), np.nan)
        if settings.source != "tfidf":
            return self.text_fn("gold", settings)
        from warp_jax.rewards import tfidf  # noqa: PLC0415  scikit-learn is slow to import

        path = self.workdir / "gold" / "gold.json"

        def make() -> None:
            texts, labels = self._fragments("gold", settings.fragments_per_text)
            fitted = tfidf.fit(texts, labels, settings.max_terms)
            held_out = tfidf.auc(fitted, *self._fragments("eval", 1))
            self.progress.note(f"gold reward: held-out AUC {held_out:.3f}")
            files.write_json(path.with_name("summary.json"), {"auc": held_out})
            tfidf.save(fitted, path)
            for made in (path.with_name("summary.json"), path):
                manifest.note(self.workdir, str(made.relative_to(self.workdir)))

        hosts.make_if_missing(path, make)
        return text_reward.TextReward(tfidf.load(path).score, "config.gold.source 'tfidf'", settings.timeout)

    def text_fn(self, group: str, part: RewardPart | Gold) -> text_reward.TextFn:
        """The reward on text of a group of the config: a Python function, or the reward model in a folder."""
        if sources.is_folder(part.source):
            return self._folder_fn(part.source)
        return text_reward.load_function(part.source, f"config.{group}.source", part.timeout)

    @functools.cached_property
    def _folder_fn(self) -> Callable[[str], text_reward.TextFn]:
        """The reward model in a folder, which is loaded once."""
        return functools.cache(functools.partial(_load_folder, self.settings, self.mesh))

    def _train(self, name: str, settings: Sft | RewardModel, task: supervised.Task) -> Params:
        """Run a task, or restore its result; only the trained weights are saved, all weights are returned."""
        directory = self.workdir / name
        finished = checkpoint.has_params(directory / "params")
        self.progress.start_phase(name, settings.num_steps, finished=finished)
        if finished:
            checkpoint.forget_state(directory)  # a killed job may have left it
            return trees.join(checkpoint.restore_params(directory / "params", task.params), task.frozen_params)
        schedule = loop.Schedule(
            num_steps=settings.num_steps,
            directory=directory,
            checkpoint_every=self.settings.checkpoint_every,
            on_step=self.progress.on_step,
            checkpoint_minutes=self.settings.checkpoint_minutes,
            name=name,
            split=named(LEARNED[name]),
            open_observer=functools.partial(wandb_run.open_run, self.settings, self.workdir, directory),
        )
        optimizer = optimizers.make_optimizer(settings, self.settings.adam)
        trained = supervised.fit(task, optimizer, self.mesh, schedule)
        params = trees.join(trained, task.frozen_params)
        num_batches = int(np.clip(task.held_out_batches(), 1, HELD_OUT_BATCHES))
        summary = supervised.held_out(task, params, num_batches, self.mesh)
        self.progress.note(f"{name}: held-out " + ", ".join(f"{key} {value:.3f}" for key, value in summary.items()))
        if hosts.is_first():
            files.write_json(directory / "summary.json", summary)
        logs = (directory / metric_writer.FILE, directory / "summary.json")
        checkpoint.save_params(directory / "params", trained, *logs)
        checkpoint.forget_state(directory)
        return params

    def _text_batch(
        self, rows: list[np.ndarray], chosen: np.ndarray, length: int, step: int, stream: str
    ) -> supervised.Batch:
        """One random window of each chosen row."""
        texts, bos_id, pad_id = [rows[i] for i in chosen], self.tokenizer.bos_id, self.tokenizer.pad_id
        ids, mask, _ = batches.random_windows(
            texts, length, step, seed=self.settings.seed, stream=stream, bos_id=bos_id, pad_id=pad_id
        )
        return {"token_ids": ids, "mask": mask, supervised.ROW: chosen.astype(np.int32)}

    def _fragments(self, split: str, per_text: int) -> tuple[list[str], list[int]]:
        """Random fragments of every text of a split, and the labels of these texts."""
        rows, labels = self.tokens[split], self.corpora[split].labels
        length = self.settings.sampling.prompt_tokens + self.settings.sampling.max_new_tokens
        texts: list[str] = []
        for number in range(per_text):
            batch = self._text_batch(rows, np.arange(len(rows)), length, number, "gold fragments")
            texts += self.tokenizer.decode(batch["token_ids"], batch["mask"])
        return texts, list(labels) * per_text


def _load_folder(settings: Settings, mesh: Mesh, source: str) -> text_reward.TextFn:
    ask = _ask(settings.data) if settings.data.chat else None
    return from_folder.load(sources.find(source), mesh, settings.model.dtype, ask)


def _ask(data: Data) -> responses.Ask:
    """The function that returns the prompt of a row."""
    return functools.partial(asked, text_field=data.text_field, prompt_template=data.prompt_template)


def _in_order(step: int, size: int, count: int) -> np.ndarray:
    """Numbers of `count` rows in batch number `step`, in their order."""
    return (np.arange(size) + step * size) % count
