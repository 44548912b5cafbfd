"""Token batches for every stage, each a pure function of (seed, stream, step): nothing to store, nothing to restore."""

import zlib
from collections.abc import Sequence

import numpy as np

from warp_jax.types import PromptBatch


def make_prompts(token_rows: Sequence[np.ndarray], prompt_tokens: int, bos_id: int, pad_id: int) -> PromptBatch:
    """Bos and the first tokens of every row, left-padded to prompt_tokens: a PromptBatch of all N rows (numpy)."""
    count = len(token_rows)
    ids = np.full((count, prompt_tokens), pad_id, np.int32)
    mask = np.zeros((count, prompt_tokens), bool)
    for i, row in enumerate(token_rows):
        prompt = np.concatenate([[bos_id], row[: prompt_tokens - 1]])
        ids[i, -len(prompt) :] = prompt
        mask[i, -len(prompt) :] = True
    return PromptBatch(ids, mask, np.arange(count, dtype=np.int32))


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
    token_rows: Sequence[np.ndarray], length: int, step: int, *, seed: int, stream: str, bos_id: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """One window of each row, bos first, for batch number `step`: ids int32 [B, length] and mask bool [B, length].

    Half of the windows are the row's beginning, as prompts are; rows shorter than the window are left-padded.
    """
    generator = np.random.default_rng([seed, zlib.crc32(stream.encode()), step])
    windows = []
    for row in token_rows:
        spare = max(len(row) - (length - 1), 0)
        start = int(generator.integers(0, spare + 1)) if generator.random() < 0.5 else 0
        windows.append(row[start : start + length - 1])
    batch = make_prompts(windows, length, bos_id, pad_id)
    return np.asarray(batch.prompt_ids), np.asarray(batch.prompt_mask)


def _permutation(count: int, seed: int, stream: str, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, zlib.crc32(stream.encode()), int(epoch)]).permutation(count)
