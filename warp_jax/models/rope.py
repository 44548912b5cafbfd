"""Rotary position embedding (arXiv 2104.09864), with the context extensions of released models."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from warp_jax.types import Array


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Scaling of the rotary frequencies for a longer context."""

    kind: str = "none"  # "linear": all frequencies; "llama3": low ones only; "yarn": arXiv 2309.00071
    factor: float = 1.0  # divides the scaled frequencies
    original_length: int = 8192  # tokens of the context before the scaling
    low_frequency_factor: float = 1.0  # llama3: fewer turns in the original context = fully scaled
    high_frequency_factor: float = 4.0  # llama3: more turns in the original context = not scaled
    beta_fast: float = 32.0  # yarn: more turns in the original context = not scaled
    beta_slow: float = 1.0  # yarn: fewer turns in the original context = fully scaled
    attention_factor: float = 0.0  # yarn: factor on queries and keys; 0 = 0.1 ln(factor) + 1


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """Angle in radians per position, for each rotated pair: float32 [head_dim / 2]."""
    plain = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling.kind == "none":
        result = plain
    elif scaling.kind == "linear":
        result = plain / scaling.factor
    elif scaling.kind == "llama3":
        result = _llama3(plain, scaling)
    elif scaling.kind == "yarn":
        result = _yarn(plain, theta, scaling)
    else:
        raise ValueError(f"rope_scaling.kind: got {scaling.kind!r}, want none, linear, llama3 or yarn")
    return result.astype(np.float32)


def attention_scale(scaling: RopeScaling) -> float:
    """Factor on the rotated queries and keys: 1 unless the kind is yarn."""
    if scaling.kind != "yarn":
        return 1.0
    return scaling.attention_factor or (0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0)


def rotate(x: Array, positions: Array, frequencies: Array, scale: Array | float = 1.0) -> Array:
    """Rotate pairs (i, i + K / 2) of x [B, S, H, K] by angles positions [B, S] * frequencies [K / 2], then scale."""
    angles = positions[..., None, None].astype(jnp.float32) * frequencies[None, None, None]
    cosine, sine = jnp.cos(angles) * scale, jnp.sin(angles) * scale
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return rotated.astype(x.dtype)


def _llama3(plain: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Blend scaled and plain frequencies by the number of turns in the original context."""
    turns = scaling.original_length * plain / (2 * math.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    blend = np.clip((turns - low) / (high - low), 0, 1)
    return (1 - blend) * plain / scaling.factor + blend * plain


def _yarn(plain: np.ndarray, theta: float, scaling: RopeScaling) -> np.ndarray:
    """Blend scaled and plain frequencies by the index of the pair."""
    half = len(plain)

    def pair_with(turns: float) -> float:
        return half * math.log(scaling.original_length / (turns * 2 * math.pi)) / math.log(theta)

    low = max(math.floor(pair_with(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_with(scaling.beta_slow)), 2 * half - 1)
    ramp = np.clip((np.arange(half) - low) / max(high - low, 0.001), 0, 1)
    return ramp * plain / scaling.factor + (1 - ramp) * plain
