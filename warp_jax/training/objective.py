"""The policy-gradient objective: REINFORCE with the KL to the anchor inside the reward (Algorithm 1, lines 7-8).

Training maximises E_x E_y [ r(x, y) - kl_coef * log(policy(y | x) / anchor(y | x)) ]. All arrays are float32, except
completion_mask: bool [B, C], True for the tokens that count.
"""

import chex
import jax
import jax.numpy as jnp

from warp_jax.settings.groups import Rl
from warp_jax.types import Array

WHITEN_EPSILON = 1e-4  # reward units; above the float32 noise of equal rewards, below any spread that matters
KL_ERROR = 0.2  # largest relative error that kl_coef is adapted to
DRIFT_RATIO = 0.1  # probability ratios further than this from 1 count as outside
ADVANTAGES = ("none", "batch_mean", "leave_one_out", "group_norm")


def log_ratios(policy_logps: Array, anchor_logps: Array, completion_mask: Array) -> Array:
    """Log policy(token) - log anchor(token) of each token, 0 where masked: logps [B, C] -> [B, C], nats."""
    chex.assert_equal_shape([policy_logps, anchor_logps, completion_mask])
    return jnp.where(completion_mask, policy_logps - anchor_logps, 0.0)


def log_ratio(policy_logps: Array, anchor_logps: Array, completion_mask: Array) -> Array:
    """Log policy(y | x) - log anchor(y | x) of each completion: logps [B, C] -> [B], nats."""
    return log_ratios(policy_logps, anchor_logps, completion_mask).sum(axis=1)


def kl_estimates(ratios: Array, estimator: str) -> Array:
    """Estimate KL(policy || anchor) at each token from its log-ratio d, sampled from the policy: [B, C], nats.

    k1: d.  k2: d^2 / 2.  k3: exp(-d) - 1 + d (Schulman 2020, joschu.net/blog/kl-approx.html).
    k1 and k3 have the KL as their mean, k2 does not. In a loss, the expected gradient, for given tokens before, is
    k1: 0.  k2: that of KL(policy || anchor).  k3: that of KL(anchor || policy).
    """
    if estimator == "k1":
        return ratios
    return ratios**2 / 2 if estimator == "k2" else jnp.expm1(-ratios) + ratios


def shaped_rewards(rewards: Array, sequence_kl: Array, kl_coef: float | Array) -> Array:
    """r_beta = rewards - kl_coef * sequence_kl (line 7): [B], without gradient. kl_coef: reward units per nat."""
    chex.assert_equal_shape([rewards, sequence_kl])
    return jax.lax.stop_gradient(rewards - kl_coef * sequence_kl)


def advantages(shaped: Array, kind: str, group_size: int, whiten: bool, earlier_kl: Array | None = None) -> Array:
    """Weight of each token in the policy gradient: shaped rewards minus a baseline, [B] -> [B, 1] or [B, C].

    Args:
        shaped: the shaped rewards.
        kind: "none": no baseline, as in the paper. "batch_mean": the mean of the batch, which includes the sample
            itself, so the expected gradient is (B - 1) / B times the true one. "leave_one_out": the mean of the other
            samples of the same prompt; unbiased. "group_norm": the mean of all samples of the prompt, then divided by
            their standard deviation (GRPO, arXiv 2402.03300).
        group_size: samples per prompt, in consecutive rows; only leave_one_out and group_norm use it.
        whiten: divide by the standard deviation of the batch.
        earlier_kl: [B, C], the part of the KL in `shaped` that belongs to the tokens before each token, in reward
            units. It does not depend on the token, so without it the gradient has the same mean and less variance.
    """
    chex.assert_rank(shaped, 1)
    scale = None
    if kind == "none":
        centred = shaped
    elif kind == "batch_mean":
        centred = shaped - shaped.mean()
    elif kind == "leave_one_out":
        groups = shaped.reshape(-1, group_size)
        others = (groups.sum(axis=1, keepdims=True) - groups) / (group_size - 1)
        centred = (groups - others).reshape(-1)
    elif kind == "group_norm":
        groups = shaped.reshape(-1, group_size)
        centred = (groups - groups.mean(axis=1, keepdims=True)).reshape(-1)
        scale = jnp.repeat(groups.std(axis=1) + WHITEN_EPSILON, group_size)
    else:
        raise ValueError(f"advantages: got {kind!r}, want one of {', '.join(ADVANTAGES)}")
    if whiten:
        normed = centred if scale is None else centred / scale
        scale = (1.0 if scale is None else scale) * jnp.broadcast_to(normed.std() + WHITEN_EPSILON, shaped.shape)
    weights = centred[:, None] if earlier_kl is None else centred[:, None] + earlier_kl
    return weights if scale is None else weights / scale[:, None]


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
    """-mean_b sum_t advantage_bt * log policy(y_bt | x_b, y_b<t), a scalar: minimising it raises the reward (line 8).

    advantage: [B, 1] or [B, C].
    """
    chex.assert_equal_shape([policy_logps, completion_mask])
    weighed = jnp.where(completion_mask, jax.lax.stop_gradient(advantage) * policy_logps, 0.0)
    return -jnp.mean(weighed.sum(axis=1))


def clipped_loss(ratios: Array, completion_mask: Array, advantage: Array, rl: Rl) -> Array:
    """The clipped surrogate for a policy that has left the one that was sampled from: -mean_b of

    rl.clip_ratio "token": sum_t min(p A, clip(p) A), p the probability ratio of a token (PPO, arXiv 1707.06347).
    rl.clip_ratio "sequence": min(s A, clip(s) A), s the geometric mean of p over the tokens (GSPO, arXiv 2507.18071).

    Args:
        ratios: log policy(token) - log old policy(token), [B, C], 0 where masked.
        completion_mask: bool [B, C].
        advantage: A, [B, 1] or [B, C]; [B, 1] for "sequence".
        rl: clip_ratio, clip_low and clip_high: clip(p) is p within [1 - clip_low, 1 + clip_high].
    """
    if rl.clip_ratio == "sequence":
        lengths = completion_mask.sum(axis=1, keepdims=True, dtype=jnp.float32)
        ratios, completion_mask = ratios.sum(axis=1, keepdims=True) / lengths, jnp.ones_like(advantage, bool)
    ratio, advantage = jnp.exp(ratios), jax.lax.stop_gradient(advantage)
    clipped = jnp.clip(ratio, 1 - rl.clip_low, 1 + rl.clip_high)
    surrogate = jnp.minimum(ratio * advantage, clipped * advantage)
    return -jnp.mean(jnp.where(completion_mask, surrogate, 0.0).sum(axis=1))


def adapted_kl_coef(kl_coef: Array, kl: Array, rl: Rl) -> Array:
    """Move kl_coef so that the KL comes nearer to rl.kl_target nats (Ziegler et al. 2019, arXiv 1909.08593, Eq. 4).

    kl_coef * (1 + kl_gain * e), e = kl / kl_target - 1 within [-0.2, 0.2].
    """
    return kl_coef * (1 + rl.kl_gain * jnp.clip(kl / rl.kl_target - 1, -KL_ERROR, KL_ERROR))
