"""Inputs of Algorithm 1: data, tokenizer, prompts, SFT policy, rewards."""

import numbers
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from warp_jax import files
from warp_jax.data import batches, chat, corpus, fields, stop_tokens
from warp_jax.data.corpus import Corpus
from warp_jax.data.tokenizer import Tokenizer
from warp_jax.evaluation import measure
from warp_jax.experiment import architecture, ingredients
from warp_jax.experiment.ingredients import Maker
from warp_jax.experiment.programs import make_programs
from warp_jax.models import freezing
from warp_jax.parallel import hosts, meshes
from warp_jax.pretrained import sources
from warp_jax.progress import JobProgress
from warp_jax.rewards import reward_functions, row_checks
from warp_jax.settings import Settings, groups
from warp_jax.storage import manifest
from warp_jax.training import reinforce
from warp_jax.types import PromptBatch, RewardFn, Rollout


def prepare(
    settings: Settings, corpora: Mapping[str, Corpus], workdir: Path, progress: JobProgress
) -> tuple[Tokenizer, tuple[reinforce.Trainer, ...], measure.Examiner]:
    """Make what all runs share, or restore what the workdir already has; return a trainer for each run.

    Training and evaluation have a reward function each, because a reward on text may read the rows of its split.
    """
    mesh = meshes.make_mesh(settings.mesh)
    tokenizer = load_tokenizer(settings, corpora, workdir / "tokenizer.json")
    if settings.model.source:
        progress.note(stop_tokens.describe(tokenizer, use_chat=settings.data.chat))
    prompts = {name: make_prompts(settings, tokenizer, corpora[name], name) for name in ("prompts", "eval")}
    for name, batch in prompts.items():
        if dropped := len(corpora[name].texts) - len(batch.example_ids):
            limit = settings.sampling.prompt_tokens
            progress.note(f"split {name!r}: {dropped} prompts of more than sampling.prompt_tokens = {limit} left out")
    policy = architecture.policy_config(settings.model, tokenizer.vocab_size)
    maker = Maker(settings, workdir, progress, mesh, tokenizer, corpora)
    gold_fn = maker.gold()
    sft_params = maker.sft(policy)
    learned = maker.reward_model(policy, sft_params) if settings.needs_reward_model else None
    trained, frozen = freezing.split(sft_params, *settings.model.trained)
    stop_ids, pad_id = tokenizer.stop_ids, tokenizer.pad_id
    programs = make_programs(settings, mesh, policy, trained=trained, frozen=frozen, stop_ids=stop_ids, pad_id=pad_id)
    trainers = tuple(
        reinforce.Trainer(
            programs=train,
            sampler=programs.sampler,
            reward_fn=make_reward_fn(maker, of_run.reward_parts, learned, corpora["prompts"].rows, "prompts"),
            train_prompts=prompts["prompts"],
            frozen_params=frozen,
            mesh=mesh,
            rl=of_run.rl,
            lora=settings.model.lora,
            seed=of_run.seed,
        )
        for of_run, train in zip(settings.of_runs, programs.train, strict=True)
    )
    reward_fn = make_reward_fn(maker, settings.reward_parts, learned, corpora["eval"].rows, "eval")
    examiner = measure.Examiner(
        mesh=mesh,
        sampler=programs.evaluation_sampler,
        kl_to_sft=programs.kl_to_sft,
        reward_fn=reward_functions.make_finite(reward_fn, tokenizer, "eval"),
        gold_fn=reward_functions.make_from_text(gold_fn, tokenizer, corpora["eval"].rows, "eval"),
        sft_params=trained,
        frozen_params=frozen,
        eval_prompts=examined_prompts(settings, prompts["eval"]),
        batch_size=settings.evaluation.batch_size,
        seed=settings.seed,
        texts=measure.Texts(programs.text_losses, held_out_texts(settings, tokenizer, corpora["text"])),
    )
    return tokenizer, trainers, examiner


def load_corpora(settings: Settings) -> dict[str, Corpus]:
    """The four splits of the source, and the texts whose perplexity is measured: "text", empty if there are none.

    Raises ValueError if a split lacks rows or labels, a prompt cannot be made, or a reward's check_row refuses a row.
    """
    data = settings.data
    rows = corpus.load_rows(data.source, data.split, task=data.task)
    text_types = str if settings.learns_from_texts else _prompt_types(data)
    splits = corpus.split_rows(rows, data.text_field, data.label_field, data.fractions, text_types=text_types)
    needed = {"prompts", "eval", *settings.learned_splits}
    corpus.check_splits(
        {name: split for name, split in splits.items() if name in needed},
        num_eval=settings.evaluation.num_prompts,
        labelled=settings.needs_labels,
    )
    tokenizer = read_tokenizer(settings) if settings.model.source else None
    encoded = ingredients.check_responses(settings, splits, tokenizer)
    for name in ("prompts", "eval"):
        if tokenizer is not None:
            make_prompts(settings, tokenizer, splits[name], name)
        else:
            prompt_values(settings, splits[name])
    limits = {part.source: part.timeout for part in settings.all_reward_parts.values()}
    row_checks.check(limits, splits["prompts"])
    row_checks.check({**limits, settings.gold.source: settings.gold.timeout}, splits["eval"])
    text = settings.evaluation
    texts = corpus.read_texts(text.text, text.text_field, text.text_rows)
    return ingredients.Corpora({**splits, "text": texts}, encoded)


def _prompt_types(data: groups.Data) -> Any:
    """Types that the text field may have if nothing learns from whole texts: a number only with a template."""
    types: Any = str | numbers.Real if data.prompt_template else str
    return types | list if data.chat else types


def load_tokenizer(settings: Settings, corpora: Mapping[str, Corpus], path: Path) -> Tokenizer:
    """The tokenizer of a job. Without a pretrained model, it is trained on the texts of SFT if `path` is missing.

    Responses that SFT or the reward model learns from are among these texts.
    """

    def make() -> None:
        texts = [text for name in ingredients.LEARNED["sft"] for text in corpora[name].texts]
        for part, names in settings.response_fields.items():
            for split in ingredients.LEARNED[part]:
                texts += [str(row[name]) for row in corpora[split].rows for name in names]
        trained = Tokenizer.train(texts, settings.vocab_size)
        files.write_text(path, trained.to_json())
        manifest.note(path.parent, path.name)

    if not settings.model.source:
        hosts.make_if_missing(path, make)
    return read_tokenizer(settings, path)


def read_tokenizer(settings: Settings, path: Path = Path("tokenizer.json")) -> Tokenizer:
    """The pretrained model's tokenizer, or else the trained one at `path`, with the stop tokens of the job."""
    source = settings.model.source
    tokenizer = Tokenizer.from_folder(sources.find(source)) if source else Tokenizer.load(path)
    return stop_tokens.extend(tokenizer, settings.sampling.stop_tokens, use_chat=settings.data.chat)


def make_prompts(settings: Settings, tokenizer: Tokenizer, split: Corpus, name: str) -> PromptBatch:
    """The prompts of a split: the beginnings of its texts, its rows filled into a template, or conversations.

    Too long prompts from a template or conversation are left out. Raises ValueError if too few are left.
    """
    data, length = settings.data, settings.sampling.prompt_tokens
    if not data.prompt_template and not data.chat:
        return batches.left_pad(tokenizer.encode_with_bos(split.texts), length, tokenizer.pad_id)
    values = prompt_values(settings, split)
    rows = encode_chats(tokenizer, values, split.places) if data.chat else tokenizer.encode_with_bos(values)
    batch = batches.drop_long(rows, length, tokenizer.pad_id)
    wanted = settings.evaluation.num_prompts if name == "eval" else 1
    if len(batch.example_ids) < wanted:
        raise ValueError(
            f"config.sampling.prompt_tokens: {len(batch.example_ids)} of {len(rows)} prompts of split {name!r} have at "
            f"most {length} tokens, want {wanted}; allow longer prompts"
        )
    return batch


def examined_prompts(settings: Settings, prompts: PromptBatch) -> PromptBatch:
    """The first evaluation.num_prompts prompts of the eval split, each samples_per_prompt times."""
    wanted = settings.evaluation
    return batches.take(prompts, np.repeat(np.arange(wanted.num_prompts), wanted.samples_per_prompt))


def held_out_texts(settings: Settings, tokenizer: Tokenizer, split: Corpus) -> PromptBatch:
    """The beginnings of the texts whose perplexity is measured."""
    rows = tokenizer.encode_with_bos(split.texts)
    return batches.left_pad(rows, settings.evaluation.text_tokens, tokenizer.pad_id)


def prompt_values(settings: Settings, split: Corpus) -> list[Any]:
    """The prompt of every row, a text or a conversation. A ValueError names the row."""
    values = []
    for place, row in zip(split.places, split.rows, strict=True):
        with fields.at(place):
            values.append(fields.asked(row, settings.data.text_field, settings.data.prompt_template))
    return values


def encode_chats(tokenizer: Tokenizer, values: Sequence[Any], places: Sequence[str]) -> list[np.ndarray]:
    """Ids of conversations in the chat template, which writes the BOS token. A ValueError names the row."""
    rows = []
    for place, value in zip(places, values, strict=True):
        with fields.at(place):
            rows += tokenizer.encode_with_special([chat.prompt_text(tokenizer, value)])
    return rows


def make_reward_fn(
    maker: Maker,
    used: Mapping[str, groups.RewardPart],
    learned: Callable[[Rollout], Any] | None,
    rows: Sequence[Mapping[str, Any]],
    split: str,
) -> RewardFn:
    """The weighted sum of the parts of a reward; learned: the reward model trained here, if one is needed."""
    on_device = {"length": reward_functions.length, "reward_model": learned}
    parts = {
        name: on_device.get(part.source)
        or reward_functions.make_from_text(maker.text_fn(f"rewards.{name}", part), maker.tokenizer, rows, split)
        for name, part in used.items()
    }
    return reward_functions.weighted_sum({name: part.weight for name, part in used.items()}, parts)
