"""What Algorithm 1 starts from: data, tokenizer, SFT policy, reward model and gold reward; each made once."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from warp_jax import (
    checkpoint,
    corpus,
    files,
    gold,
    optimizers,
    prompts,
    rewards,
    sampling,
    sharding,
    supervised,
)
from warp_jax.corpus import Corpus
from warp_jax.models import rope
from warp_jax.models.transformer import Transformer, TransformerConfig, init_cache
from warp_jax.progress import JobProgress
from warp_jax.tokenizer import Tokenizer
from warp_jax.types import ApplyFn, Params, PromptBatch, RewardFn, Rollout

HELD_OUT_BATCHES = 16  # at most, for the held-out quality of SFT and of the reward model

Tokens = list[np.ndarray]


class Setup(NamedTuple):
    """All that the runs share. Two reward functions, because a text reward may look at the rows of its split."""

    mesh: Mesh
    apply_fn: ApplyFn
    make_cache: Callable[[int, int], Any]
    tokenizer: Tokenizer
    sampling_config: sampling.SamplingConfig
    sft_params: Params
    train_prompts: PromptBatch
    eval_prompts: PromptBatch
    train_reward_fn: RewardFn
    eval_reward_fn: RewardFn
    gold_fn: Callable[[Rollout], np.ndarray]


def prepare(config: ConfigDict, corpora: Mapping[str, Corpus], workdir: Path, progress: JobProgress) -> Setup:
    """Load or make every ingredient; stages that the workdir already holds are skipped."""
    mesh = sharding.make_mesh(config.mesh)
    tokenizer = load_tokenizer(config.tokenizer.vocab_size, corpora, workdir / "tokenizer.json")
    tokens = {name: _encode(tokenizer, split.texts) for name, split in corpora.items()}
    policy = Transformer(make_model_config(config.model, tokenizer.vocab_size, "language"))
    maker = Maker(config, workdir, progress, mesh, tokenizer)
    gold_fn = maker.gold(tokens, corpora)
    sft_params = maker.sft(policy, tokens)
    learned = maker.reward_model(tokens, corpora, sft_params) if needs_reward_model(config) else None
    names = {"prompt_tokens": config.sampling.prompt_tokens, "bos_id": tokenizer.bos_id, "pad_id": tokenizer.pad_id}
    reward_fns = {
        name: make_reward_fn(config.rewards, learned, tokenizer, corpora[name].rows) for name in ("prompts", "eval")
    }
    return Setup(
        mesh=mesh,
        apply_fn=make_apply_fn(policy),
        make_cache=functools.partial(init_cache, policy.config),
        tokenizer=tokenizer,
        sampling_config=sampling.SamplingConfig(
            max_new_tokens=config.sampling.max_new_tokens,
            temperature=config.sampling.temperature,
            stop_ids=(tokenizer.eos_id,),
            pad_id=tokenizer.pad_id,
        ),
        sft_params=sft_params,
        train_prompts=prompts.make_prompts(tokens["prompts"], **names),
        eval_prompts=prompts.make_prompts(tokens["eval"][: config.evaluation.num_prompts], **names),
        train_reward_fn=reward_fns["prompts"],
        eval_reward_fn=reward_fns["eval"],
        gold_fn=rewards.make_from_text(gold_fn, tokenizer, corpora["eval"].rows),
    )


def load_corpora(config: ConfigDict) -> dict[str, Corpus]:
    """The four splits of the source. Raises ValueError if they cannot serve this config."""
    data = config.data
    rows = corpus.load_rows(data.source, data.split)
    fractions = {"reward": data.reward_fraction, "gold": data.gold_fraction, "prompts": data.prompts_fraction}
    splits = corpus.split_rows(rows, data.text_field, data.label_field, fractions)
    corpus.check_splits(splits, num_eval=config.evaluation.num_prompts, labelled=needs_labels(config))
    return splits


def load_tokenizer(vocab_size: int, corpora: Mapping[str, Corpus], path: Path) -> Tokenizer:
    """The workdir's tokenizer, trained on the texts that SFT uses if there is none yet."""
    if not path.exists():
        trained = Tokenizer.train(corpora["reward"].texts + corpora["gold"].texts, vocab_size)
        partial = path.with_suffix(".partial")
        trained.save(partial)
        partial.replace(path)
    return Tokenizer.load(path)


def make_model_config(config: ConfigDict, vocab_size: int, head: str) -> TransformerConfig:
    """Settings of the policy (head 'language') or of the reward model (head 'scalar')."""
    settings = config.to_dict()
    scaling = rope.RopeScaling(**settings.pop("rope_scaling"))
    pattern = tuple(settings.pop("local_pattern"))
    return TransformerConfig(vocab_size=vocab_size, head=head, rope_scaling=scaling, local_pattern=pattern, **settings)


def init_and_layout(model: Transformer, mesh: Mesh) -> tuple[Callable[[jax.Array], Params], Any]:
    """The function key -> random parameters, and where each of them lies. Raises ValueError if the mesh cannot."""

    def init(key: jax.Array) -> Params:
        return model.init(key, token_ids=jnp.zeros((1, 2), jnp.int32), mask=jnp.ones((1, 2), bool))["params"]

    return init, sharding.param_shardings(mesh, jax.eval_shape(init, jax.random.key(0)))


def make_optimizer(stage: ConfigDict, adam: ConfigDict) -> optax.GradientTransformation:
    """The optimizer of one stage: its learning_rate, warmup_steps and clip_norm, and what all stages share."""
    names = {name: stage[name] for name in ("learning_rate", "warmup_steps", "clip_norm")}
    return optimizers.make_optimizer(**names, b1=adam.b1, b2=adam.b2, eps=adam.eps)


def make_apply_fn(model: Transformer) -> ApplyFn:
    """`model.apply` on the bare parameter tree."""
    return lambda params, *args, **kwargs: model.apply({"params": params}, *args, **kwargs)


def needs_reward_model(config: ConfigDict) -> bool:
    """True if a part of the reward is the learned model."""
    return any(part.source == "reward_model" and part.weight for part in config.rewards.values())


def needs_labels(config: ConfigDict) -> bool:
    """True if the reward model or the gold reward learns from the labels of the source."""
    return needs_reward_model(config) or config.gold.source == "tfidf"


def make_reward_fn(
    config: ConfigDict,
    learned: Callable[[Rollout], Any] | None,
    tokenizer: Tokenizer,
    rows: Sequence[Mapping[str, Any]],
) -> RewardFn:
    """The weighted sum of all parts with a weight other than 0."""
    used = {name: part for name, part in config.items() if part.weight}
    parts: dict[str, Callable[[Rollout], Any]] = {}
    for name, part in used.items():
        if part.source == "length":
            parts[name] = rewards.length
        elif part.source == "reward_model":
            assert learned is not None  # needs_reward_model saw this part
            parts[name] = learned
        else:
            parts[name] = rewards.make_from_text(rewards.load_function(part.source), tokenizer, rows)
    return rewards.weighted_sum({name: part.weight for name, part in used.items()}, parts)


@dataclasses.dataclass(frozen=True)
class Maker:
    """Makes the three trained ingredients, each in a folder of the workdir with its held-out quality."""

    config: ConfigDict
    workdir: Path
    progress: JobProgress
    mesh: Mesh
    tokenizer: Tokenizer

    def sft(self, model: Transformer, tokens: Mapping[str, Tokens]) -> Params:
        """theta_sft: next-token training from random weights on the reward and gold splits."""
        config, rows = self.config.sft, tokens["reward"] + tokens["gold"]

        def batch_fn(step: int) -> supervised.Batch:
            chosen = prompts.epoch_rows(len(rows), config.batch_size, step, seed=self.config.seed, stream="sft")
            return self._text_batch(rows, chosen, config.sequence_tokens, step, "sft window")

        def held_out_batch(step: int) -> supervised.Batch:
            chosen = (np.arange(config.batch_size) + step * config.batch_size) % len(tokens["eval"])
            return self._text_batch(tokens["eval"], chosen, config.sequence_tokens, step, "sft held out")

        loss_fn = functools.partial(supervised.language_loss, make_apply_fn(model))
        return self._stage(
            "sft",
            loss_fn=loss_fn,
            start=self._init_params(model),
            batch_fn=batch_fn,
            held_out_batch=held_out_batch,
            held_out_rows=len(tokens["eval"]),
        )

    def reward_model(
        self, tokens: Mapping[str, Tokens], corpora: Mapping[str, Corpus], sft_params: Params
    ) -> Callable[[Rollout], Any]:
        """r(x, y): the SFT trunk with a scalar head, trained on fragments of the reward split and their labels."""
        config = self.config.reward_model
        model = Transformer(make_model_config(self.config.model, self.tokenizer.vocab_size, "scalar"))
        labels = {name: np.array(corpora[name].labels) for name in ("reward", "eval")}

        def batch_fn(step: int, split: str = "reward") -> supervised.Batch:
            chosen = supervised.paired_rows(
                labels[split], config.batch_size, step, seed=self.config.seed, stream=f"labels {split}"
            )
            batch = self._text_batch(tokens[split], chosen, config.sequence_tokens, step, f"fragments {split}")
            return {**batch, "labels": labels[split][chosen]}

        loss_fn = functools.partial(supervised.REWARD_LOSSES[config.loss], make_apply_fn(model))
        start = {**self._init_params(model), **{k: v for k, v in sft_params.items() if k != "lm_head"}}
        params = self._stage(
            "reward_model",
            loss_fn=loss_fn,
            start=start,
            batch_fn=batch_fn,
            held_out_batch=functools.partial(batch_fn, split="eval"),
            held_out_rows=len(tokens["eval"]),
        )
        return rewards.make_learned(make_apply_fn(model), params)

    def gold(self, tokens: Mapping[str, Tokens], corpora: Mapping[str, Corpus]) -> rewards.TextFn:
        """The gold reward, fitted on fragments of the gold split."""
        config = self.config.gold
        if config.source != "tfidf":
            return rewards.load_function(config.source)
        path = self.workdir / "gold" / "gold.json"
        if not path.exists():
            texts, labels = self._fragments(tokens["gold"], corpora["gold"].labels, config.fragments_per_text)
            fitted = gold.fit(texts, labels, config.max_terms)
            held_out = gold.auc(fitted, *self._fragments(tokens["eval"], corpora["eval"].labels, 1))
            self.progress.note(f"gold reward: held-out AUC {held_out:.3f}")
            files.write_json(path.with_name("summary.json"), {"auc": held_out})
            gold.save(fitted, path)
        return gold.load(path).score

    def _stage(
        self,
        name: str,
        *,
        loss_fn: supervised.LossFn,
        start: Params,
        batch_fn: Callable[[int], supervised.Batch],
        held_out_batch: Callable[[int], supervised.Batch],
        held_out_rows: int,
    ) -> Params:
        config, directory = self.config[name], self.workdir / name
        finished = checkpoint.has_params(directory / "params")
        self.progress.start_stage(name, config.num_steps, finished=finished)
        if finished:
            return checkpoint.restore_params(directory / "params", start)
        params = supervised.fit(
            loss_fn,
            start,
            batch_fn,
            optimizer=make_optimizer(config, self.config.adam),
            mesh=self.mesh,
            num_steps=config.num_steps,
            checkpoint_every=self.config.checkpoint_every,
            directory=directory,
            on_step=self.progress.on_step,
        )
        batches = [held_out_batch(i) for i in range(np.clip(held_out_rows // config.batch_size, 1, HELD_OUT_BATCHES))]
        summary = supervised.held_out(loss_fn, params, batches, self.mesh)
        self.progress.note(f"{name}: held-out " + ", ".join(f"{key} {value:.3f}" for key, value in summary.items()))
        files.write_json(directory / "summary.json", summary)
        checkpoint.save_params(directory / "params", params)
        checkpoint.forget_state(directory)
        self.progress.end_stage(config.num_steps)
        return params

    def _init_params(self, model: Transformer) -> Params:
        init, layout = init_and_layout(model, self.mesh)
        return jax.jit(init, out_shardings=layout)(jax.random.key(self.config.seed))

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


def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> Tokens:
    """Ids of whole texts, each with its end-of-sequence token."""
    return [np.append(ids, np.int32(tokenizer.eos_id)) for ids in tokenizer.encode(texts)]
