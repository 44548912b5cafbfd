"""Data types that several modules share: pytrees of arrays, and the functions on them.

Axis letters: B batch, P prompt, C completion, S = P + C, V vocabulary.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from warp_jax import exit_codes

Array = jax.Array
HostOrDevice = jax.Array | np.ndarray
Params = Any  # a pytree of arrays
ApplyFn = Callable[..., Any]  # flax `Module.apply`


class PromptBatch(NamedTuple):
    """B prompts, left-padded to one length."""

    prompt_ids: HostOrDevice  # int32 [B, P]
    prompt_mask: HostOrDevice  # bool [B, P], True = real token
    example_ids: HostOrDevice  # int32 [B], row of the data source that holds the prompt


class Rollout(NamedTuple):
    """Prompts, as in PromptBatch, and one completion sampled for each."""

    prompt_ids: HostOrDevice
    prompt_mask: HostOrDevice
    example_ids: HostOrDevice
    completion_ids: Array  # int32 [B, C]
    completion_mask: Array  # bool [B, C], True up to and including the stop token
    per_token_logps: Array  # float32 [B, C], nats, of the distribution sampled from; 0 where masked
    # bits of the tokens that top-k and top-p keep, uint8 [B, C, ceil(V / 8)], 0 where masked; None = all tokens
    allowed: Array | None = None


class States(NamedTuple):
    """Hidden states of each token, in the dtype of the activations: [B, S, D], D the width of the model.

    The trunk is the embedding and the first layers, if all of these are frozen: policy and SFT share it.
    """

    trunk: Array | None  # after the trunk's last layer; None without a trunk
    final: Array  # the input of the head


class StorageError(Exception):
    """A saved file is missing or is not what was written: one line, which says what to delete."""

    exit_code = exit_codes.STORAGE


class RewardError(ValueError):
    """A reward function failed, or did not return one finite number for each completion. The message is one line.

    In a multi-host job every process raises it. index: number of the completion in the batch, if known.
    """

    exit_code = exit_codes.USER_FUNCTION

    def __init__(self, message: str, index: int | None = None) -> None:
        super().__init__(message)
        self.index = index


class GuardError(FloatingPointError):
    """A guard of config.health ended the training; the state is saved. In a multi-host job every process raises it."""


class Rewards(NamedTuple):
    """Rewards of B completions."""

    total: Array  # float32 [B], reward units
    parts: Mapping[str, Array]  # name -> float32 [B], before weighting


RewardFn = Callable[[Rollout], Rewards]


class TrainState(NamedTuple):
    """State of one RL run."""

    step: Array
    params: Params  # trained weights, or with LoRA the factors of their change (`models.lora`)
    anchor_params: Any  # state of the anchor (`training.anchors`); for an EMA the trained weights, float32
    opt_state: Any  # of the optimizer; with rl.kl_schedule "adaptive": (that, kl_coef of the next step, float32 [])
