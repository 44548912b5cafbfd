"""Token batches for SFT, the reward model and RL: each is a function of (seed, stream, step), so none is saved."""

import zlib
from collections.abc import Sequence

import numpy as np

from warp_jax.types import PromptBatch


def left_pad(token_rows: Sequence[np.ndarray], length: int, pad_id: int) -> PromptBatch:
    """Left-pad the first `length` tokens of N rows to a PromptBatch (numpy); example_ids are 0 .. N - 1."""
    count = len(token_rows)
    ids = np.full((count, length), pad_id, np.int32)
    mask = np.zeros((count, length), bool)
    for i, row in enumerate(token_rows):
        start = max(length - len(row), 0)
        ids[i, start:] = row[:length]
        mask[i, start:] = True
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
    epochs, offsets = np.divmod(np.arange(step * batch, (step + 1) * batch), count)
    key = seed, zlib.crc32(stream.encode())
    orders = {epoch: np.random.default_rng([*key, epoch]).permutation(count) for epoch in set(epochs.tolist())}
    return np.array([orders[epoch][offset] for epoch, offset in zip(epochs, offsets, strict=True)])


def random_windows(
    token_rows: Sequence[np.ndarray], length: int, step: int, *, seed: int, stream: str, bos_id: int | None, pad_id: int
) -> PromptBatch:
    """One random window of `length` tokens of each row for batch number `step`.

    The BOS token comes first if the model has one. Half of the windows are the row's beginning, like prompts. Rows
    shorter than the window are left-padded.
    """
    generator = np.random.default_rng([seed, zlib.crc32(stream.encode()), step])
    bos = np.array([] if bos_id is None else [bos_id], np.int32)
    room = length - len(bos)
    windows = []
    for row in token_rows:
        spare = max(len(row) - room, 0)
        start = int(generator.integers(0, spare + 1)) if generator.random() < 0.5 else 0
        windows.append(np.append(bos, row[start : start + room]))
    return left_pad(windows, length, pad_id)
