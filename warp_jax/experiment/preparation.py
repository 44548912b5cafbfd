"""What Algorithm 1 starts from: data, tokenizer, prompts, SFT policy, rewards."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from warp_jax import files
from warp_jax.data import batches, chat, corpus
from warp_jax.data.corpus import Corpus
from warp_jax.data.tokenizer import Tokenizer
from warp_jax.experiment import architecture
from warp_jax.experiment.ingredients import Maker, Tokens
from warp_jax.models import freezing
from warp_jax.models.transformer import TransformerConfig
from warp_jax.parallel import hosts, meshes
from warp_jax.pretrained import sources
from warp_jax.progress import JobProgress
from warp_jax.rewards import reward_functions
from warp_jax.training import sampling
from warp_jax.types import Params, PromptBatch, RewardFn, Rollout


class Setup(NamedTuple):
    """All that the runs share. sft_params: what is trained of the policy; frozen_params: its other leaves. Two reward
    functions, because a text reward may look at the rows of its split.
    """

    mesh: Mesh
    model: TransformerConfig
    tokenizer: Tokenizer
    sampling_config: sampling.SamplingConfig
    sft_params: Params
    frozen_params: Params
    train_prompts: PromptBatch
    eval_prompts: PromptBatch
    train_reward_fn: RewardFn
    eval_reward_fn: RewardFn
    gold_fn: Callable[[Rollout], np.ndarray]


def prepare(config: ConfigDict, corpora: Mapping[str, Corpus], workdir: Path, progress: JobProgress) -> Setup:
    """Load or make every ingredient; stages that the workdir already holds are skipped."""
    mesh = meshes.make_mesh(config.mesh)
    tokenizer = load_tokenizer(config, corpora, workdir / "tokenizer.json")
    prompt_batches = {name: make_prompts(config, tokenizer, corpora[name], name) for name in ("prompts", "eval")}
    for name, batch in prompt_batches.items():
        if dropped := len(corpora[name].texts) - len(batch.example_ids):
            limit = config.sampling.prompt_tokens
            progress.note(f"split {name!r}: {dropped} prompts of more than sampling.prompt_tokens = {limit} left out")
    policy = architecture.policy_config(config.model, tokenizer.vocab_size)
    tokens = {name: _encode(tokenizer, corpora[name].texts) for name in learned_splits(config)}
    maker = Maker(config, workdir, progress, mesh, tokenizer)
    gold_fn = maker.gold(tokens, corpora)
    sft_params = maker.sft(policy, tokens)
    learned = maker.reward_model(policy, tokens, corpora, sft_params) if needs_reward_model(config) else None
    reward_fns = {name: make_reward_fn(config.rewards, maker, learned, corpora[name].rows) for name in prompt_batches}
    trained, frozen = freezing.split(sft_params, config.model.trainable)
    return Setup(
        mesh=mesh,
        model=policy,
        tokenizer=tokenizer,
        sampling_config=sampling.SamplingConfig(
            max_new_tokens=config.sampling.max_new_tokens,
            temperature=config.sampling.temperature,
            stop_ids=tokenizer.stop_ids,
            pad_id=tokenizer.pad_id,
        ),
        sft_params=trained,
        frozen_params=frozen,
        train_prompts=prompt_batches["prompts"],
        eval_prompts=batches.take(prompt_batches["eval"], np.arange(config.evaluation.num_prompts)),
        train_reward_fn=reward_fns["prompts"],
        eval_reward_fn=reward_fns["eval"],
        gold_fn=reward_functions.make_from_text(gold_fn, tokenizer, corpora["eval"].rows),
    )


def load_corpora(config: ConfigDict) -> dict[str, Corpus]:
    """The four splits of the source. Raises ValueError if they cannot serve this config."""
    data = config.data
    rows = corpus.load_rows(data.source, data.split)
    fractions = {"reward": data.reward_fraction, "gold": data.gold_fraction, "prompts": data.prompts_fraction}
    splits = corpus.split_rows(rows, data.text_field, data.label_field, fractions)
    needed = {"prompts", "eval", *learned_splits(config)}
    corpus.check_splits(
        {name: split for name, split in splits.items() if name in needed},
        num_eval=config.evaluation.num_prompts,
        labelled=needs_labels(config),
    )
    return splits


def load_tokenizer(config: ConfigDict, corpora: Mapping[str, Corpus], path: Path) -> Tokenizer:
    """The tokenizer of the model at `model.source`; without one the workdir's, trained on SFT's texts if need be."""
    if config.model.source:
        return Tokenizer.from_folder(sources.find(config.model.source))

    def make() -> None:
        trained = Tokenizer.train(corpora["reward"].texts + corpora["gold"].texts, config.tokenizer.vocab_size)
        files.write_text(path, trained.to_json())

    hosts.make_if_missing(path, make)
    return Tokenizer.load(path)


def check_prompts(config: ConfigDict, corpora: Mapping[str, Corpus]) -> None:
    """Raise ValueError if the prompts cannot be made, before anything is written."""
    if not config.model.source:  # its tokenizer is yet to be trained
        if config.data.chat:
            raise ValueError("config.data.chat: a tokenizer trained here has no chat template, want False")
        for name in ("prompts", "eval"):
            for row in corpora[name].rows:
                corpus.asked(row, config.data.text_field, config.data.prompt_template)
        return
    tokenizer = Tokenizer.from_folder(sources.find(config.model.source))
    for name in ("prompts", "eval"):
        make_prompts(config, tokenizer, corpora[name], name)


def make_prompts(config: ConfigDict, tokenizer: Tokenizer, split: Corpus, name: str) -> PromptBatch:
    """The prompts of a split: the beginnings of its texts, or its rows as a template writes them, less the too long."""
    data, length = config.data, config.sampling.prompt_tokens
    if not data.prompt_template and not data.chat:
        return batches.make_prompts(tokenizer.encode(split.texts), length, tokenizer.bos_id, tokenizer.pad_id)
    texts = [prompt_text(tokenizer, data, row) for row in split.rows]
    rows = tokenizer.encode_with_special(texts) if data.chat else tokenizer.encode(texts)
    if not data.chat and tokenizer.bos_id is not None:  # a chat template writes its own
        rows = [np.append(np.int32(tokenizer.bos_id), row) for row in rows]
    batch = batches.drop_long(rows, length, tokenizer.pad_id)
    wanted = config.evaluation.num_prompts if name == "eval" else 1
    if len(batch.example_ids) < wanted:
        raise ValueError(
            f"config.sampling.prompt_tokens: {len(batch.example_ids)} of {len(rows)} prompts of split {name!r} have at "
            f"most {length} tokens, want {wanted}; allow longer prompts"
        )
    return batch


def prompt_text(tokenizer: Tokenizer, data: ConfigDict, row: Mapping[str, Any]) -> str:
    """The prompt of a row: what it asks, in the model's chat template if `data.chat`."""
    value = corpus.asked(row, data.text_field, data.prompt_template)
    return chat.prompt_text(tokenizer, value) if data.chat else value


def needs_reward_model(config: ConfigDict) -> bool:
    """True if a part of the reward is the learned model."""
    return any(part.source == "reward_model" and part.weight for part in config.rewards.values())


def needs_labels(config: ConfigDict) -> bool:
    """True if the reward model or the gold reward learns from the labels of the source."""
    return needs_reward_model(config) or config.gold.source == "tfidf"


def learned_splits(config: ConfigDict) -> tuple[str, ...]:
    """The splits that a stage before RL learns from or is measured on."""
    return ("reward", "gold", "eval") if config.sft.num_steps or needs_labels(config) else ()


def make_reward_fn(
    config: ConfigDict,
    maker: Maker,
    learned: Callable[[Rollout], Any] | None,
    rows: Sequence[Mapping[str, Any]],
) -> RewardFn:
    """The weighted sum of all parts with a weight other than 0."""
    used = {name: part for name, part in config.items() if part.weight}
    parts: dict[str, Callable[[Rollout], Any]] = {}
    for name, part in used.items():
        if part.source == "length":
            parts[name] = reward_functions.length
        elif part.source == "reward_model":
            assert learned is not None  # needs_reward_model saw this part
            parts[name] = learned
        else:
            parts[name] = reward_functions.make_from_text(maker.text_fn(part.source), maker.tokenizer, rows)
    return reward_functions.weighted_sum({name: part.weight for name, part in used.items()}, parts)


def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> Tokens:
    """Ids of whole texts, each with its end-of-sequence token."""
    return [np.append(ids, np.int32(tokenizer.eos_id)) for ids in tokenizer.encode(texts)]
