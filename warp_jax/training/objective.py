"""The policy-gradient objective: REINFORCE with the KL to the anchor inside the reward (Algorithm 1, lines 7-8).

Training maximises E_x E_y [ r(x, y) - kl_coef * log(policy(y | x) / anchor(y | x)) ]. All arrays are float32, except
completion_mask: bool [B, C], True for the tokens that count.
"""

import chex
import jax
import jax.numpy as jnp

from warp_jax.types import Array

WHITEN_EPSILON = 1e-4  # reward units; above the float32 noise of equal rewards, below any spread that matters
DRIFT_RATIO = 0.1  # probability ratios further than this from 1 count as outside
ADVANTAGES = ("none", "batch_mean", "leave_one_out")


def log_ratio(policy_logps: Array, anchor_logps: Array, completion_mask: Array) -> Array:
    """Log policy(y | x) - log anchor(y | x) of each completion: logps [B, C] -> [B], nats."""
    chex.assert_equal_shape([policy_logps, anchor_logps, completion_mask])
    return jnp.where(completion_mask, policy_logps - anchor_logps, 0.0).sum(axis=1)


def shaped_rewards(rewards: Array, sequence_log_ratio: Array, kl_coef: float | Array) -> Array:
    """r_beta = rewards - kl_coef * log_ratio (line 7): [B], without gradient. kl_coef: reward units per nat."""
    chex.assert_equal_shape([rewards, sequence_log_ratio])
    return jax.lax.stop_gradient(rewards - kl_coef * sequence_log_ratio)


def advantages(shaped: Array, kind: str, group_size: int, whiten: bool) -> Array:
    """Weight of each completion in the policy gradient: shaped rewards minus a baseline, [B] -> [B].

    Args:
        shaped: the shaped rewards.
        kind: "none": no baseline, as in the paper. "batch_mean": the mean of the batch, which includes the sample
            itself, so the expected gradient is (B - 1) / B times the true one. "leave_one_out": the mean of the other
            samples of the same prompt; unbiased.
        group_size: samples per prompt, in consecutive rows; only leave_one_out uses it.
        whiten: divide by the standard deviation of the batch.
    """
    chex.assert_rank(shaped, 1)
    if kind == "none":
        result = shaped
    elif kind == "batch_mean":
        result = shaped - shaped.mean()
    elif kind == "leave_one_out":
        groups = shaped.reshape(-1, group_size)
        others = (groups.sum(axis=1, keepdims=True) - groups) / (group_size - 1)
        result = (groups - others).reshape(-1)
    else:
        raise ValueError(f"advantages: got {kind!r}, want one of {', '.join(ADVANTAGES)}")
    return result / (result.std() + WHITEN_EPSILON) if whiten else result


def importance_weights(policy_logps: Array, sampler_logps: Array, completion_mask: Array, cap: float) -> Array:
    """Truncated importance weight of each completion: min(policy(y | x) / sampler(y | x), cap), logps [B, C] -> [B].

    Completions come from the sampler, which rounds differently from the policy's log-probabilities. An advantage times
    this weight gives the gradient under the policy: a large cap makes it unbiased, a small cap biased but with less
    variance (Ionides 2008, Truncated Importance Sampling).
    """
    ratio = jnp.exp(log_ratio(policy_logps, sampler_logps, completion_mask))
    return jax.lax.stop_gradient(jnp.minimum(ratio, cap))


def truncated(completion_ids: Array, completion_mask: Array, stop_ids: tuple[int, ...]) -> Array:
    """True for each completion that has the maximum length and no stop token at its end: [B, C] -> bool [B]."""
    chex.assert_equal_shape([completion_ids, completion_mask])
    return completion_mask[:, -1] & ~jnp.isin(completion_ids[:, -1], jnp.array(stop_ids, jnp.int32))


def sampler_drift(sampler_logps: Array, policy_logps: Array, completion_mask: Array) -> dict[str, Array]:
    """Statistics over tokens of log sampler(token) - log policy(token), logps [B, C], nats; 0 without rounding.

    Returns the mean, the standard deviation, the largest absolute value, and the share of tokens whose probability
    ratio is outside [0.9, 1.1].
    """
    chex.assert_equal_shape([sampler_logps, policy_logps, completion_mask])
    tokens = completion_mask.sum(dtype=jnp.float32)
    drift = jnp.where(completion_mask, sampler_logps - policy_logps, 0.0)
    mean = drift.sum() / tokens
    variance = jnp.where(completion_mask, (drift - mean) ** 2, 0.0).sum() / tokens
    outside = completion_mask & (jnp.abs(jnp.exp(drift) - 1) > DRIFT_RATIO)
    return {
        "drift/mean": mean,
        "drift/std": jnp.sqrt(variance),
        "drift/max": jnp.abs(drift).max(),
        "drift/outside": outside.sum(dtype=jnp.float32) / tokens,
    }


def reinforce_loss(policy_logps: Array, completion_mask: Array, advantage: Array) -> Array:
    """-mean_b advantage_b * log policy(y_b | x_b), a scalar: minimising it raises the reward (line 8)."""
    chex.assert_equal_shape([policy_logps, completion_mask])
    sequence_logps = jnp.where(completion_mask, policy_logps, 0.0).sum(axis=1)
    return -jnp.mean(jax.lax.stop_gradient(advantage) * sequence_logps)
