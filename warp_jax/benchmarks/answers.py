"""Sample answers of a policy to text prompts and conversations."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from warp_jax import files
from warp_jax.data import batches, chat, fields
from warp_jax.data.tokenizer import Tokenizer
from warp_jax.generation import sampling
from warp_jax.models.apply import make_apply_fn
from warp_jax.models.transformer import TransformerConfig, init_cache
from warp_jax.parallel import meshes
from warp_jax.types import Params

BATCH = 32  # prompts per batch


def read_prompts(path: Path, field: str) -> list[Any]:
    """Read one field, a text or a conversation, from each line of a JSONL file. ValueError names the line."""
    if path.suffix != ".jsonl":
        raise ValueError(f"{path}: want a .jsonl file, one JSON object a line")
    rows = files.read_jsonl(path)
    for place, row in rows:
        if field not in row:
            raise ValueError(f"{place}: got fields {sorted(row)}, want the field {field!r}")
        with fields.at(place):
            fields.check_text(row, field, str | list, "--field")
    return [row[field] for _, row in rows]


def encode(tokenizer: Tokenizer, values: Sequence[Any], *, use_chat: bool) -> list[np.ndarray]:
    """Tokenize prompts. With use_chat, apply the chat template; else put the bos token before the text."""
    if use_chat:
        texts = []
        for number, value in enumerate(values):
            with fields.at(f"prompt {number}"):
                texts.append(chat.prompt_text(tokenizer, value))
        return tokenizer.encode_with_special(texts)
    for number, value in enumerate(values):
        if not isinstance(value, str):
            raise ValueError(f"prompt {number}: got a conversation, want a text; set --chat to use the chat template")
    return tokenizer.encode_with_bos(values)


def sample_answers(
    params: Params,
    model: TransformerConfig,
    tokenizer: Tokenizer,
    rows: Sequence[np.ndarray],
    *,
    mesh: jax.sharding.Mesh,
    seed: int,
    config: sampling.SamplingConfig,
) -> list[str]:
    """Sample one answer to each prompt in `rows` (token ids from `encode`)."""
    sample = jax.jit(
        functools.partial(sampling.sample, make_apply_fn(model), functools.partial(init_cache, model), config=config)
    )
    length = max(len(row) for row in rows)
    answers: list[str] = []
    for number, start in enumerate(range(0, len(rows), BATCH)):
        part = list(rows[start : start + BATCH])
        filled = part + [part[0]] * (-len(part) % meshes.batch_devices(mesh))
        batch = meshes.put_batch(mesh, batches.left_pad(filled, length, tokenizer.pad_id))
        rollout = jax.device_get(sample(params, batch, jax.random.fold_in(jax.random.key(seed), number)))
        _, texts = tokenizer.decode_answers(
            rollout.prompt_ids, rollout.prompt_mask, rollout.completion_ids, rollout.completion_mask
        )
        answers += texts[: len(part)]
    return answers
