"""Token batches for every stage, each a pure function of (seed, stream, step): nothing to store, nothing to restore."""

import zlib
from collections.abc import Sequence

import numpy as np

from warp_jax.types import PromptBatch


def make_prompts(token_rows: Sequence[np.ndarray], prompt_tokens: int, bos_id: int | None, pad_id: int) -> PromptBatch:
    """Bos, if there is one, and the first tokens of every row, left-padded to prompt_tokens: a PromptBatch (numpy)."""
    bos = np.array([] if bos_id is None else [bos_id], np.int32)
    return left_pad([np.concatenate([bos, row])[:prompt_tokens] for row in token_rows], prompt_tokens, pad_id)


def left_pad(token_rows: Sequence[np.ndarray], length: int, pad_id: int) -> PromptBatch:
    """All N rows, none of more than `length` tokens, as a PromptBatch (numpy); example_ids are 0 .. N - 1."""
    count = len(token_rows)
    ids = np.full((count, length), pad_id, np.int32)
    mask = np.zeros((count, length), bool)
    for i, row in enumerate(token_rows):
        ids[i, length - len(row) :] = row
        mask[i, length - len(row) :] = True
    return PromptBatch(ids, mask, np.arange(count, dtype=np.int32))


def drop_long(token_rows: Sequence[np.ndarray], length: int, pad_id: int) -> PromptBatch:
    """`left_pad` of the rows that have at most `length` tokens; example_ids tell which these are."""
    kept = [i for i, row in enumerate(token_rows) if len(row) <= length]
    batch = left_pad([token_rows[i] for i in kept], length, pad_id)
    return batch._replace(example_ids=np.array(kept, np.int32))


def take(prompts: PromptBatch, rows: np.ndarray) -> PromptBatch:
    """The chosen rows of a PromptBatch."""
    return PromptBatch(*(field[rows] for field in prompts))


def epoch_rows(count: int, batch: int, step: int, *, seed: int, stream: str) -> np.ndarray:
    """Rows of batch number `step`: int [batch]. A new permutation of `count` rows for each pass over them.

    stream names who draws ('sft', 'iteration 1 run 2'): runs differ in the order of their prompts.
    """
    places = np.arange(step * batch, (step + 1) * batch)
    epochs, offsets = places // count, places % count
    orders = {epoch: _permutation(count, seed, stream, epoch) for epoch in np.unique(epochs)}
    return np.array([orders[e][o] for e, o in zip(epochs, offsets, strict=True)])


def random_windows(
    token_rows: Sequence[np.ndarray], length: int, step: int, *, seed: int, stream: str, bos_id: int | None, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """One window of each row for batch number `step`: ids int32 [B, length] and mask bool [B, length].

    Bos comes first, if the model has one. Half of the windows are the row's beginning, as prompts are; rows shorter
    than the window are left-padded.
    """
    generator = np.random.default_rng([seed, zlib.crc32(stream.encode()), step])
    windows = []
    for row in token_rows:
        room = length - (bos_id is not None)
        spare = max(len(row) - room, 0)
        start = int(generator.integers(0, spare + 1)) if generator.random() < 0.5 else 0
        windows.append(row[start : start + room])
    batch = make_prompts(windows, length, bos_id, pad_id)
    return np.asarray(batch.prompt_ids), np.asarray(batch.prompt_mask)


def _permutation(count: int, seed: int, stream: str, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, zlib.crc32(stream.encode()), int(epoch)]).permutation(count)
