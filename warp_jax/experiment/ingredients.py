"""What is trained before RL, each made once in a folder of the workdir: SFT, reward model, gold reward."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from warp_jax import files, trees
from warp_jax.data import batches
from warp_jax.data.corpus import Corpus, asked
from warp_jax.data.tokenizer import Tokenizer
from warp_jax.experiment import architecture
from warp_jax.models import apply, freezing, partitioning
from warp_jax.models.transformer import TransformerConfig
from warp_jax.parallel import hosts
from warp_jax.pretrained import hf_weights, sources
from warp_jax.progress import JobProgress
from warp_jax.rewards import from_folder, reward_functions, tfidf
from warp_jax.storage import checkpoint
from warp_jax.training import optimizers, supervised
from warp_jax.types import ApplyFn, Params, Rollout

HELD_OUT_BATCHES = 16  # at most, for the held-out quality of SFT and of the reward model

Tokens = list[np.ndarray]


def make_optimizer(stage: ConfigDict, adam: ConfigDict) -> optax.GradientTransformation:
    """The optimizer of one stage: its learning_rate, warmup_steps and clip_norm, and what all stages share."""
    names = {name: stage[name] for name in ("learning_rate", "warmup_steps", "clip_norm")}
    return optimizers.make_optimizer(**names, b1=adam.b1, b2=adam.b2, eps=adam.eps)


def sft_loss(config: ConfigDict, apply_fn: ApplyFn) -> supervised.LossFn:
    """What SFT minimises."""
    return functools.partial(supervised.language_loss, apply_fn, logits_chunk=config.model.logits_chunk)


def reward_loss(config: ConfigDict, apply_fn: ApplyFn) -> supervised.LossFn:
    """What the training of the reward model minimises."""
    return functools.partial(supervised.REWARD_LOSSES[config.reward_model.loss], apply_fn)


@dataclasses.dataclass(frozen=True)
class Maker:
    """Makes the ingredients from tokens [rows of each split] and labels."""

    config: ConfigDict
    workdir: Path
    progress: JobProgress
    mesh: Mesh
    tokenizer: Tokenizer
    _text_fns: dict[str, reward_functions.TextFn] = dataclasses.field(default_factory=dict)

    def sft(self, model: TransformerConfig, tokens: Mapping[str, Tokens]) -> Params:
        """theta_sft: the model at `model.source`, or random weights, after next-token training on the reward and gold
        splits for sft.num_steps steps.
        """
        config, start = self.config.sft, self._start_params(model)
        if not config.num_steps:
            return start
        rows = tokens["reward"] + tokens["gold"]

        def batch_fn(step: int) -> supervised.Batch:
            chosen = batches.epoch_rows(len(rows), config.batch_size, step, seed=self.config.seed, stream="sft")
            return self._text_batch(rows, chosen, config.sequence_tokens, step, "sft window")

        def held_out_batch(step: int) -> supervised.Batch:
            chosen = (np.arange(config.batch_size) + step * config.batch_size) % len(tokens["eval"])
            return self._text_batch(tokens["eval"], chosen, config.sequence_tokens, step, "sft held out")

        return self._stage(
            "sft",
            loss_fn=sft_loss(self.config, apply.make_apply_fn(model, self.mesh)),
            start=start,
            trainable=self.config.model.trainable,
            batch_fn=batch_fn,
            held_out_batch=held_out_batch,
            held_out_rows=len(tokens["eval"]),
        )

    def reward_model(
        self,
        policy: TransformerConfig,
        tokens: Mapping[str, Tokens],
        corpora: Mapping[str, Corpus],
        sft_params: Params,
    ) -> Callable[[Rollout], Any]:
        """r(x, y): the SFT trunk with a scalar head, trained on fragments of the reward split and their labels."""
        config = self.config.reward_model
        model = architecture.reward_model_config(config, policy)
        labels = {name: np.array(corpora[name].labels) for name in ("reward", "eval")}

        def batch_fn(step: int, split: str = "reward") -> supervised.Batch:
            chosen = supervised.paired_rows(
                labels[split], config.batch_size, step, seed=self.config.seed, stream=f"labels {split}"
            )
            batch = self._text_batch(tokens[split], chosen, config.sequence_tokens, step, f"fragments {split}")
            return {**batch, "labels": labels[split][chosen]}

        apply_fn = apply.make_apply_fn(model, self.mesh)
        params = self._stage(
            "reward_model",
            loss_fn=reward_loss(self.config, apply_fn),
            start=freezing.restacked(sft_params, self._random_params(model)),
            trainable=config.trainable,
            batch_fn=batch_fn,
            held_out_batch=functools.partial(batch_fn, split="eval"),
            held_out_rows=len(tokens["eval"]),
        )
        return reward_functions.make_learned(apply_fn, params)

    def gold(self, tokens: Mapping[str, Tokens], corpora: Mapping[str, Corpus]) -> reward_functions.TextFn:
        """The gold reward, fitted on fragments of the gold split; nan for each text if there is none."""
        config = self.config.gold
        if not config.source:
            return lambda prompts, completions, rows: np.full(len(completions), np.nan)
        if config.source != "tfidf":
            return self.text_fn(config.source)
        path = self.workdir / "gold" / "gold.json"

        def make() -> None:
            texts, labels = self._fragments(tokens["gold"], corpora["gold"].labels, config.fragments_per_text)
            fitted = tfidf.fit(texts, labels, config.max_terms)
            held_out = tfidf.auc(fitted, *self._fragments(tokens["eval"], corpora["eval"].labels, 1))
            self.progress.note(f"gold reward: held-out AUC {held_out:.3f}")
            files.write_json(path.with_name("summary.json"), {"auc": held_out})
            tfidf.save(fitted, path)

        hosts.make_if_missing(path, make)
        return tfidf.load(path).score

    def text_fn(self, source: str) -> reward_functions.TextFn:
        """A reward on text: the reward model in a folder, loaded once however often it is asked, or a function."""
        if source not in self._text_fns:
            self._text_fns[source] = self._load_text_fn(source)
        return self._text_fns[source]

    def _load_text_fn(self, source: str) -> reward_functions.TextFn:
        if not Path(source).is_dir():
            return reward_functions.load_function(source)
        data = self.config.data
        asks = functools.partial(asked, text_field=data.text_field, prompt_template=data.prompt_template)
        return from_folder.load(Path(source), self.mesh, self.config.model.dtype, asks if data.chat else None)

    def _stage(
        self,
        name: str,
        *,
        loss_fn: supervised.LossFn,
        start: Params,
        trainable: str,
        batch_fn: Callable[[int], supervised.Batch],
        held_out_batch: Callable[[int], supervised.Batch],
        held_out_rows: int,
    ) -> Params:
        """Train the leaves of `start` that match `trainable`; only these are stored, all are returned."""
        config, directory = self.config[name], self.workdir / name
        trained, frozen = freezing.split(start, trainable)
        finished = checkpoint.has_params(directory / "params")
        self.progress.start_stage(name, config.num_steps, finished=finished)
        if finished:
            checkpoint.forget_state(directory)  # a kill may have left it
            return trees.join(checkpoint.restore_params(directory / "params", trained), frozen)
        trained = supervised.fit(
            loss_fn,
            trained,
            frozen,
            batch_fn,
            optimizer=make_optimizer(config, self.config.adam),
            mesh=self.mesh,
            num_steps=config.num_steps,
            checkpoint_every=self.config.checkpoint_every,
            directory=directory,
            on_step=self.progress.on_step,
        )
        params = trees.join(trained, frozen)
        batches = [held_out_batch(i) for i in range(np.clip(held_out_rows // config.batch_size, 1, HELD_OUT_BATCHES))]
        summary = supervised.held_out(loss_fn, params, batches, self.mesh)
        self.progress.note(f"{name}: held-out " + ", ".join(f"{key} {value:.3f}" for key, value in summary.items()))
        if hosts.is_first():
            files.write_json(directory / "summary.json", summary)
        checkpoint.save_params(directory / "params", trained)
        checkpoint.forget_state(directory)
        self.progress.end_stage(config.num_steps)
        return params

    def _start_params(self, model: TransformerConfig) -> Params:
        if not self.config.model.source:
            return self._random_params(model)
        like = partitioning.with_shardings(self.mesh, apply.param_shapes(model))
        return hf_weights.load_params(sources.find(self.config.model.source), model, like)

    def _random_params(self, model: TransformerConfig) -> Params:
        layout = partitioning.param_shardings(self.mesh, apply.param_shapes(model))
        init = jax.jit(functools.partial(apply.init_params, model), out_shardings=layout)
        return init(jax.random.key(self.config.seed))

    def _text_batch(self, rows: Tokens, chosen: np.ndarray, length: int, step: int, stream: str) -> supervised.Batch:
        names = {"bos_id": self.tokenizer.bos_id, "pad_id": self.tokenizer.pad_id}
        return supervised.text_batch(rows, chosen, length, step, seed=self.config.seed, stream=stream, **names)

    def _fragments(self, rows: Tokens, labels: Sequence[int], per_text: int) -> tuple[list[str], list[int]]:
        length = self.config.sampling.prompt_tokens + self.config.sampling.max_new_tokens
        texts: list[str] = []
        for number in range(per_text):
            batch = self._text_batch(rows, np.arange(len(rows)), length, number, "gold fragments")
            texts += self.tokenizer.decode(batch["token_ids"], batch["mask"])
        return texts, list(labels) * per_text
