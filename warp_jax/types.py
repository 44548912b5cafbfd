"""The values that pass from one stage to the next: arrays only, all of them pytrees.

Axis letters: B batch, P prompt, C completion, S = P + C, V vocabulary.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

Array = jax.Array
HostOrDevice = jax.Array | np.ndarray
Params = Any  # a pytree of arrays
ApplyFn = Callable[..., Any]  # flax `Module.apply`


class PromptBatch(NamedTuple):
    """B prompts, left-padded to one length.

    prompt_ids: int32 [B, P]; prompt_mask: bool [B, P], True = real token;
    example_ids: int32 [B], the row of the data source each prompt came from.
    """

    prompt_ids: HostOrDevice
    prompt_mask: HostOrDevice
    example_ids: HostOrDevice


class Rollout(NamedTuple):
    """Prompts and the completions sampled for them.

    prompt_ids, prompt_mask, example_ids: as in PromptBatch. completion_ids: int32 [B, C];
    completion_mask: bool [B, C], True up to and including the stop token;
    per_token_logps: float32 [B, C], nats, under the distribution that was sampled; 0 where masked.
    """

    prompt_ids: HostOrDevice
    prompt_mask: HostOrDevice
    example_ids: HostOrDevice
    completion_ids: Array
    completion_mask: Array
    per_token_logps: Array


class Rewards(NamedTuple):
    """What a RewardFn returns. total: float32 [B], reward units; parts: name -> float32 [B], unweighted."""

    total: Array
    parts: Mapping[str, Array]


RewardFn = Callable[[Rollout], Rewards]


class TrainState(NamedTuple):
    """State of one optimisation. `anchor_params` is float32; both trees have one structure."""

    step: Array
    params: Params
    anchor_params: Params
    opt_state: Any
