"""Prompts with responses: one to learn from in SFT, or two to compare for a reward model."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from warp_jax.data import batches, chat, fields
from warp_jax.data.corpus import Corpus
from warp_jax.data.tokenizer import Tokenizer

Ask = Callable[[Mapping[str, Any]], Any]  # row -> its prompt, a text or a conversation


class Sequences(NamedTuple):
    """N prompts, each with K responses, as token ids. A response ends with a stop token, as a completion does."""

    rows: np.ndarray  # int [N], numbers of the rows in their split
    token_ids: list[list[np.ndarray]]  # K lists of N rows: prompt and response
    response_lengths: list[np.ndarray]  # K times int [N], end included
    left_out: int  # rows with a response that is too long

    def batch(self, chosen: np.ndarray, length: int, pad_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Left-pad the first responses of the chosen prompts, then their second ones.

        Returns token_ids int32, mask and is_response bool, each [K * len(chosen), length].
        """
        rows = [ids[i] for ids in self.token_ids for i in chosen]
        lengths = np.concatenate([lengths[chosen] for lengths in self.response_lengths])
        padded = batches.left_pad(rows, length, pad_id)
        ids, mask = np.asarray(padded.prompt_ids), np.asarray(padded.prompt_mask)
        return ids, mask, np.arange(length) >= length - lengths[:, None]


def check(splits: Sequence[Corpus], names: Sequence[str], ask: Ask, *, use_chat: bool) -> None:
    """Raise ValueError that names the row, if one has no prompt, or no response in one of these fields."""
    for split in splits:
        for name in names:
            _texts(split, name, ask, use_chat=use_chat)


def encode(
    tokenizer: Tokenizer, splits: Sequence[Corpus], names: Sequence[str], ask: Ask, *, use_chat: bool, length: int
) -> Sequences:
    """Encode the prompts of all rows of these splits, joined, and their responses in the fields `names`.

    Prompts have the ids that RL gives them. Rows with more than `length` tokens are left out. Raises ValueError that
    names the row, if one has no prompt or response, or cannot be rendered.
    """
    pairs = [[pair for split in splits for pair in _encode(tokenizer, split, n, ask, use_chat=use_chat)] for n in names]
    sizes = np.array([[len(prompt) + len(response) for prompt, response in column] for column in pairs])
    rows = np.flatnonzero((sizes <= length).all(axis=0))
    token_ids = [[np.concatenate(column[i]) for i in rows] for column in pairs]
    lengths = [np.array([len(column[i][1]) for i in rows], int) for column in pairs]
    return Sequences(rows, token_ids, lengths, sizes.shape[1] - len(rows))


def _encode(
    tokenizer: Tokenizer, split: Corpus, name: str, ask: Ask, *, use_chat: bool
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Token ids of the prompt and of the response of each row."""
    texts = _texts(split, name, ask, use_chat=use_chat)
    if not use_chat:
        prompts, answers = (list(column) for column in zip(*texts, strict=True))
        encoded = zip(tokenizer.encode_with_bos(prompts), tokenizer.encode(answers), strict=True)
        return [(prompt, _ended(tokenizer, response)) for prompt, response in encoded]
    pairs = []
    for place, (prompt, response) in zip(split.places, texts, strict=True):
        with fields.at(place):
            both = [chat.prompt_text(tokenizer, prompt), chat.response_text(tokenizer, prompt, response)]
            prompt_ids, response_ids = tokenizer.encode_with_special(both)
        pairs.append((prompt_ids, _ended(tokenizer, response_ids)))
    return pairs


def _texts(split: Corpus, name: str, ask: Ask, *, use_chat: bool) -> list[tuple[Any, str]]:
    """Prompt and response of each row."""
    texts = []
    for place, row in zip(split.places, split.rows, strict=True):
        with fields.at(place):
            prompt = ask(row)
            texts.append((prompt, fields.response(row, name, prompt, use_chat=use_chat)))
    return texts


def _ended(tokenizer: Tokenizer, ids: np.ndarray) -> np.ndarray:
    """The ids up to their first stop token, where sampling would end; without one, all ids and the EOS token."""
    stops = np.flatnonzero(np.isin(ids, tokenizer.stop_ids))
    return ids[: stops[0] + 1] if len(stops) else np.append(ids, np.int32(tokenizer.eos_id))
