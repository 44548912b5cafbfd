"""Prompts with responses: one to learn from in SFT, or two to compare for a reward model."""

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from warp_jax.data import batches, chat, fields
from warp_jax.data.corpus import Corpus
from warp_jax.data.tokenizer import Tokenizer

# texts that stand before a response while it is encoded, and are taken off again; "" = it is encoded alone
ANCHORS = ("", "\n", ".", "a")
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

    Prompts have the ids that RL gives them. Prompt and response decode to both texts, as in RL. Rows with more than
    `length` tokens are left out. Raises ValueError that names the row, if one has no prompt or response, cannot be
    rendered, or has a response that no tokens decode to.
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
    if use_chat:
        prompts, answers = [], []
        for place, (prompt, response) in zip(split.places, texts, strict=True):
            with fields.at(place):
                prompts += tokenizer.encode_with_special([chat.prompt_text(tokenizer, prompt)])
                answer = chat.response_text(tokenizer, prompt, response)
                answers += _encode_after(tokenizer, prompts[-1:], [answer], tokenizer.encode_with_special)
    else:
        prompts = tokenizer.encode_with_bos([prompt for prompt, _ in texts])
        answers = _encode_after(tokenizer, prompts, [response for _, response in texts], tokenizer.encode)
    for place, (_, response), answer in zip(split.places, texts, answers, strict=True):
        if answer is None:
            raise ValueError(
                f"{place}: field {name!r}: no tokens after the prompt decode to {response[:60]!r}; remove the row, or "
                "use a model whose tokenizer can write it"
            )
    return list(zip(prompts, answers, strict=True))


def _encode_after(
    tokenizer: Tokenizer,
    prompts: Sequence[np.ndarray],
    texts: Sequence[str],
    encode: Callable[[Sequence[str]], list[np.ndarray]],
) -> list[Any]:
    """Ids of texts that follow prompts, up to a stop token, which is EOS if the text has none.

    None where prompt and text would not decode to both. A SentencePiece tokenizer puts a space before the first word of
    a text. It does not after an anchor, whose ids are taken off again.
    """
    found: list[Any] = [None] * len(texts)
    before = tokenizer.decode_whole(prompts)
    for anchor in ANCHORS:
        left = [i for i, row in enumerate(found) if row is None]
        start, *rows = encode([anchor, *(anchor + texts[i] for i in left)])
        rows = [_until_stop(tokenizer, row[len(start) :]) for row in rows]
        both = tokenizer.decode_whole([np.append(prompts[i], row) for i, row in zip(left, rows, strict=True)])
        for i, row, decoded in zip(left, rows, both, strict=True):
            ended = len(row) > 0 and row[-1] in tokenizer.stop_ids
            if _is_same(decoded, before[i] + texts[i], ended=ended):
                found[i] = row if ended else np.append(row, np.int32(tokenizer.eos_id))
    return found


def _is_same(decoded: str, text: str, *, ended: bool) -> bool:
    """True if the decoded text is the text, or its beginning if it has ended; some tokenizers bring it to NFC."""
    decoded, text = (unicodedata.normalize("NFC", each) for each in (decoded, text))
    return text.startswith(decoded) if ended else text == decoded


def _until_stop(tokenizer: Tokenizer, ids: np.ndarray) -> np.ndarray:
    """The ids up to their first stop token, where sampling would end."""
    stops = np.flatnonzero(np.isin(ids, tokenizer.stop_ids))
    return ids[: stops[0] + 1] if len(stops) else ids


def _texts(split: Corpus, name: str, ask: Ask, *, use_chat: bool) -> list[tuple[Any, str]]:
    """Prompt and response of each row."""
    texts = []
    for place, row in zip(split.places, split.rows, strict=True):
        with fields.at(place):
            prompt = ask(row)
            texts.append((prompt, fields.response(row, name, prompt, use_chat=use_chat)))
    return texts
