"""Token batches for SFT, the reward model and RL: each is a function of (seed, stream, step), so none is saved."""

import zlib
from collections.abc import Sequence

import numpy as np

from warp_jax.types import PromptBatch


def make_prompts(token_rows: Sequence[np.ndarray], prompt_tokens: int, bos_id: int | None, pad_id: int) -> PromptBatch:
    """Left-padded batch (numpy) of the first tokens of each row, after the BOS token if the model has one."""
    bos = np.array([] if bos_id is None else [bos_id], np.int32)
    return left_pad([np.concatenate([bos, row])[:prompt_tokens] for row in token_rows], prompt_tokens, pad_id)


def left_pad(token_rows: Sequence[np.ndarray], length: int, pad_id: int) -> PromptBatch:
    """Left-pad N rows of at most `length` tokens to a PromptBatch (numpy); example_ids are 0 .. N - 1."""
    count = len(token_rows)
    ids = np.full((count, length), pad_id, np.int32)
    mask = np.zeros((count, length), bool)
    for i, row in enumerate(token_rows):
        ids[i, length - len(row) :] = row
        mask[i, length - len(row) :] = True
    return PromptBatch(ids, mask, np.arange(count, dtype=np.int32))


def drop_long(token_rows: Sequence[np.ndarray], length: int, pad_id: int) -> PromptBatch:
    """Like `left_pad`, without the rows of more than `length` tokens; example_ids are the numbers of the kept rows."""
    kept = [i for i, row in enumerate(token_rows) if len(row) <= length]
    batch = left_pad([token_rows[i] for i in kept], length, pad_id)
    return batch._replace(example_ids=np.array(kept, np.int32))


def take(prompts: PromptBatch, rows: np.ndarray) -> PromptBatch:
    """Select rows of a PromptBatch."""
    return PromptBatch(*(field[rows] for field in prompts))


def epoch_rows(count: int, batch: int, step: int, *, seed: int, stream: str) -> np.ndarray:
    """Row numbers of batch number `step`: int [batch]. Each epoch is a new permutation of all `count` rows.

    stream: name of the training ('sft', 'iteration 1 run 2'); each stream has another order.
    """
    places = np.arange(step * batch, (step + 1) * batch)
    epochs, offsets = places // count, places % count
    orders = {epoch: _permutation(count, seed, stream, epoch) for epoch in np.unique(epochs)}
    return np.array([orders[e][o] for e, o in zip(epochs, offsets, strict=True)])


def random_windows(
    token_rows: Sequence[np.ndarray], length: int, step: int, *, seed: int, stream: str, bos_id: int | None, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """One random window of each row for batch number `step`: ids int32 [B, length] and mask bool [B, length].

    The BOS token comes first if the model has one. Half of the windows are the row's beginning, like prompts. Rows
    shorter than the window are left-padded.
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
