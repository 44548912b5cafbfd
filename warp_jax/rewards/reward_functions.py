"""Reward functions: a RewardFn maps a Rollout to Rewards, the total for training and its parts by name.

A part is a learned reward model on the device, a Python function of decoded text, or the length of the completion.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from warp_jax.data.tokenizer import Tokenizer
from warp_jax.parallel import hosts
from warp_jax.settings.legacy import MOVED
from warp_jax.types import ApplyFn, Array, Params, RewardFn, Rewards, Rollout

# (prompts, completions, rows of the data source) -> one number for each completion
TextFn = Callable[[Sequence[str], Sequence[str], Sequence[Mapping[str, Any]]], Any]


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
    function: TextFn, tokenizer: Tokenizer, rows: Sequence[Mapping[str, Any]]
) -> Callable[[Rollout], np.ndarray]:
    """Make a reward that calls a Python function of decoded text; rows[example_id] is the row of a prompt."""

    def score(rollout: Rollout) -> np.ndarray:
        host = hosts.fetch(rollout)
        prompts, completions = tokenizer.decode_answers(
            host.prompt_ids, host.prompt_mask, host.completion_ids, host.completion_mask
        )
        return np.asarray(function(prompts, completions, [rows[i] for i in host.example_ids]), np.float32)

    return score


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


def load_function(source: str) -> TextFn:
    """Import the Python function 'package.module:name'. In a multi-host job, only process 0 calls it."""
    module_name, _, name = source.partition(":")
    try:
        function = getattr(importlib.import_module(MOVED.get(module_name, module_name)), name)
    except Exception as error:  # a module of the user's can raise anything
        raise ValueError(f"rewards: cannot load {source!r}: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise ValueError(f"rewards: {source!r} is not a function")
    return hosts.computed_on_first_process(function)
