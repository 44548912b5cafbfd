"""A reward model from a Hugging Face folder, as a reward on decoded text."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from warp_jax import files
from warp_jax.data import batches, chat
from warp_jax.data.tokenizer import Tokenizer
from warp_jax.models import partitioning
from warp_jax.models.apply import make_apply_fn, param_shapes
from warp_jax.parallel import hosts, meshes
from warp_jax.pretrained import hf_config, hf_weights, sources
from warp_jax.rewards import reward_functions, text_reward
from warp_jax.rewards.text_reward import cut
from warp_jax.types import RewardError

LENGTH_STEP = 64  # tokens; texts are padded to a multiple of it, so that few shapes are compiled


def load(
    folder: Path, mesh: Mesh, dtype: str, conversation_of: Callable[[Mapping[str, Any]], Any] | None = None
) -> text_reward.TextFn:
    """Load a *ForSequenceClassification checkpoint with one label as a text reward, with its own tokenizer.

    dtype: of activations. conversation_of: returns the conversation of a row; the model then scores this conversation
    with the completion as its last turn, in its own chat template, instead of the text prompt + completion.
    """
    tokenizer = Tokenizer.from_folder(folder)
    config = sources.read_settings(folder, "scalar", dtype)
    params = hf_weights.load_params(folder, config, partitioning.with_shardings(mesh, param_shapes(config)))
    score = jax.jit(
        functools.partial(reward_functions.sequence_scores, make_apply_fn(config, mesh), pad_id=_pad_id(folder))
    )
    devices = meshes.batch_devices(mesh)

    def reward(prompts: Sequence[str], completions: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
        if conversation_of is None:
            texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
            token_rows = tokenizer.encode_with_bos(texts)
        else:
            texts = answered(tokenizer, list(map(conversation_of, rows)), completions)
            token_rows = tokenizer.encode_with_special(texts)
        longest = max(map(len, token_rows))
        filled = token_rows + token_rows[:1] * (-len(texts) % devices)
        batch = batches.left_pad(filled, longest + -longest % LENGTH_STEP, tokenizer.pad_id)
        batch = meshes.put_batch(mesh, batch)
        return hosts.fetch(score(params, batch.prompt_ids, batch.prompt_mask))[: len(texts)]

    return reward


def _pad_id(folder: Path) -> int | None:
    """Padding id in config.json (no other file counts): in transformers, it is never the last token of a text."""
    content = files.read_json(folder / hf_config.CONFIG)
    return (content.get("text_config") or content).get("pad_token_id")


def answered(tokenizer: Tokenizer, conversations: Sequence[Any], completions: Sequence[str]) -> list[str]:
    """Render conversations with a completion as last turn in the reward model's chat template.

    Raises RewardError if the template refuses one.
    """
    texts = []
    for number, (conversation, completion) in enumerate(zip(conversations, completions, strict=True)):
        try:
            messages = [*chat.as_messages(conversation), {"role": "assistant", "content": completion}]
            texts.append(chat.render(tokenizer, messages, add_generation_prompt=False))
        except ValueError as error:
            raise RewardError(f"reward model: {error}; completion {cut(completion)}", number) from error
    return texts
