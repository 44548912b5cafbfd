"""Reward functions: a RewardFn maps a Rollout to Rewards, the total for training and its parts by name.

A part is a learned reward model on the device, a Python function of decoded text, or the length of the completion.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from warp_jax.data.tokenizer import Tokenizer
from warp_jax.parallel import hosts
from warp_jax.rewards.text_reward import TextFn, checked, located
from warp_jax.types import ApplyFn, Array, Params, RewardError, RewardFn, Rewards, Rollout


def sequence_scores(
    apply_fn: ApplyFn, params: Params, token_ids: Array, mask: Array, *, pad_id: int | None = None
) -> Array:
    """Score each sequence by a reward model, at its last real token: float32 [B], log-odds.

    token_ids int32 [B, S] and mask bool [B, S] may have padding on both sides. pad_id: a token that never counts as the
    last one, even inside the text, as in transformers: some models are padded with their end-of-sequence token.
    """
    scores, _ = apply_fn(params, token_ids, mask)
    counted = mask if pad_id is None else mask & (token_ids != pad_id)
    last = mask.shape[1] - 1 - jnp.argmax(counted[:, ::-1], axis=1)
    return jnp.take_along_axis(scores, last[:, None], axis=1)[:, 0]


def make_learned(apply_fn: ApplyFn, params: Params) -> Callable[[Rollout], Array]:
    """Make a reward that scores prompt + completion by a reward model on the device."""

    @jax.jit
    def score(params: Params, rollout: Rollout) -> Array:
        token_ids = jnp.concatenate([rollout.prompt_ids, rollout.completion_ids], axis=1)
        mask = jnp.concatenate([rollout.prompt_mask, rollout.completion_mask], axis=1)
        return sequence_scores(apply_fn, params, token_ids, mask)

    return lambda rollout: score(params, rollout)


def make_from_text(
    function: TextFn, tokenizer: Tokenizer, rows: Sequence[Mapping[str, Any]], split: str = ""
) -> Callable[[Rollout], np.ndarray]:
    """Make a reward that calls a function of decoded text; rows[example_id] is the row of a prompt.

    split: name of the rows' split, for errors.
    """

    def score(rollout: Rollout) -> np.ndarray:
        host = hosts.fetch(rollout)
        with naming_row(host.example_ids, split):
            return np.asarray(function(*_texts(tokenizer, host), [rows[i] for i in host.example_ids]), np.float32)

    return score


def make_finite(reward_fn: RewardFn, tokenizer: Tokenizer, split: str) -> RewardFn:
    """Make a RewardFn that raises RewardError if reward_fn returns nan or inf. It waits for the device."""

    def reward(rollout: Rollout) -> Rewards:
        host, rewards = hosts.fetch((rollout, reward_fn(rollout)))
        named = {f"config.rewards.{name}": values for name, values in rewards.parts.items()}
        for name, values in {**named, "sum of all rewards": rewards.total}.items():
            with naming_row(host.example_ids, split):
                try:
                    checked(values, len(values))
                except RewardError as error:
                    raise located(error, name, *_texts(tokenizer, host)) from error
        return rewards

    return reward


@contextlib.contextmanager
def naming_row(example_ids: Sequence[int], split: str) -> Iterator[None]:
    """Add the row of the completion to a RewardError that has the index of one."""
    try:
        yield
    except RewardError as error:
        if error.index is None:
            raise
        raise RewardError(f"{error}, row {example_ids[error.index]} of split {split!r}") from error


def _texts(tokenizer: Tokenizer, host: Any) -> tuple[list[str], list[str]]:
    """Prompts and completions of a rollout of numpy arrays."""
    return tokenizer.decode_answers(host.prompt_ids, host.prompt_mask, host.completion_ids, host.completion_mask)


def length(rollout: Rollout) -> Array:
    """Number of tokens of each completion; with weight -0.0005 it is the length penalty of the paper's Appendix E."""
    return rollout.completion_mask.sum(axis=1).astype(jnp.float32)


def weighted_sum(weights: Mapping[str, float], parts: Mapping[str, Callable[[Rollout], Any]]) -> RewardFn:
    """Make the RewardFn sum over names of weights[name] * parts[name](rollout). Rewards.parts are unweighted."""

    def reward(rollout: Rollout) -> Rewards:
        scores = {name: part(rollout) for name, part in parts.items()}
        total = sum(weights[name] * scores[name] for name in scores)
        return Rewards(jnp.asarray(total, jnp.float32), scores)

    return reward
