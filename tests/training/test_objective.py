"""The policy-gradient objective against gradients computed by enumerating every completion."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from warp_jax.training import objective

STOP = 2
COMPLETIONS = [(STOP,)] + [(first, second) for first in (0, 1) for second in (0, 1, STOP)]
TOKENS = np.array([(*y, 0)[:2] for y in COMPLETIONS])
MASK = np.array([[True, len(y) == 2] for y in COMPLETIONS])
REWARDS = np.array([0.3, -1.0, 2.0, 0.7, 1.5, -0.4, 0.9], np.float32)
KL_COEF = 0.1


def bigram(seed):
    """Logits of the first token [3] and of the second given the first [3, 3]."""
    rng = np.random.default_rng(seed)
    return {
        "first": jnp.asarray(rng.normal(size=3), jnp.float32),
        "second": jnp.asarray(rng.normal(size=(3, 3)), jnp.float32),
    }


def token_logps(params, rows):
    """[B, 2] for the completions numbered `rows`; the second column of (STOP,) holds a number that must not count."""
    first, second = jnp.asarray(TOKENS)[rows].T
    second = jax.nn.log_softmax(params["second"], axis=-1)[first, second]
    first = jax.nn.log_softmax(params["first"])[first]
    return jnp.stack([first, second], axis=1)


def completion_logps(params):
    """[7]; only the first completion, (STOP,), has one token."""
    first, second = token_logps(params, np.arange(len(COMPLETIONS))).T
    return first.at[1:].add(second[1:])


@jax.jit
@jax.grad
def exact_gradient(params, anchor):
    """E[reward] - KL_COEF * KL(policy || anchor), summed over all completions."""
    logps = completion_logps(params)
    return jnp.sum(jnp.exp(logps) * (REWARDS - KL_COEF * (logps - completion_logps(anchor))))


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def expected_loss_gradient(params, anchor, kind, batch_size, group_size):
    """The mean of the sampled loss's gradient over every batch that the policy can draw."""
    batches = np.array(list(itertools.product(range(len(COMPLETIONS)), repeat=batch_size)))
    probabilities = jax.lax.stop_gradient(jnp.exp(completion_logps(params)[batches].sum(axis=1)))

    def loss(params, rows):
        policy_logps, mask = token_logps(params, rows), jnp.asarray(MASK)[rows]
        ratio = objective.log_ratio(policy_logps, token_logps(anchor, rows), mask)
        shaped = objective.shaped_rewards(jnp.asarray(REWARDS)[rows], ratio, KL_COEF)
        weights = objective.advantages(shaped, kind, group_size, whiten=False)
        return objective.reinforce_loss(policy_logps, mask, weights)

    return jax.grad(lambda p: probabilities @ jax.vmap(lambda rows: loss(p, rows))(batches))(params)


@pytest.mark.parametrize(
    ("kind", "batch_size", "group_size", "factor"),
    [
        ("none", 1, 1, 1.0),
        ("none", 2, 1, 1.0),
        ("batch_mean", 2, 1, 1 / 2),
        ("batch_mean", 3, 1, 2 / 3),
        ("leave_one_out", 2, 2, 1.0),
        ("leave_one_out", 3, 3, 1.0),
        ("leave_one_out", 4, 2, 1.0),
    ],
)
def test_expected_gradient_is_that_of_the_exact_objective(kind, batch_size, group_size, factor):
    """Fails if the log-ratio's sign flips, kl_coef is dropped, or leave_one_out keeps a sample in its own mean."""
    params, anchor = bigram(0), bigram(1)
    exact = exact_gradient(params, anchor)
    assert min(np.abs(x).max() for x in exact.values()) > 0.05
    sampled = expected_loss_gradient(params, anchor, kind, batch_size, group_size)
    for name in params:
        assert_allclose(-sampled[name], factor * exact[name], atol=2e-6)


@functools.partial(jax.jit, static_argnames=("kind", "size", "cap"))
def expected_gradient_of_a_sampler(params, anchor, sampler, *, kind, size, cap):
    """As expected_loss_gradient, over batches drawn from another distribution, with importance weights."""
    batches = np.array(list(itertools.product(range(len(COMPLETIONS)), repeat=size)))
    probabilities = jnp.exp(completion_logps(sampler)[batches].sum(axis=1))

    def loss(params, rows):
        policy_logps, mask = token_logps(params, rows), jnp.asarray(MASK)[rows]
        ratio = objective.log_ratio(policy_logps, token_logps(anchor, rows), mask)
        shaped = objective.shaped_rewards(jnp.asarray(REWARDS)[rows], ratio, KL_COEF)
        weights = objective.advantages(shaped, kind, size, whiten=False)
        weights *= objective.importance_weights(policy_logps, token_logps(sampler, rows), mask, cap)[:, None]
        return objective.reinforce_loss(policy_logps, mask, weights)

    return jax.grad(lambda p: probabilities @ jax.vmap(lambda rows: loss(p, rows))(batches))(params)


@pytest.mark.parametrize(("kind", "size"), [("none", 1), ("leave_one_out", 2), ("leave_one_out", 3)])
def test_importance_weights_correct_another_sampler(kind, size):
    """Fails if the ratio is inverted, is taken per token, counts the masked token, or has a gradient."""
    params, anchor, sampler = bigram(0), bigram(1), bigram(2)
    exact = exact_gradient(params, anchor)
    corrected = expected_gradient_of_a_sampler(params, anchor, sampler, kind=kind, size=size, cap=1e6)
    capped = expected_gradient_of_a_sampler(params, anchor, sampler, kind=kind, size=size, cap=1e-9)
    for name in params:
        assert_allclose(-corrected[name], exact[name], atol=5e-6)
        assert np.abs(capped[name]).max() < 1e-7


def test_importance_weights_by_hand():
    """Fails if the cap is a floor, or applies to the logarithm."""
    policy, sampler = jnp.log(jnp.array([[0.6, 0.5], [0.2, 0.1]])), jnp.log(jnp.array([[0.3, 0.4], [0.4, 0.9]]))
    mask = jnp.array([[True, True], [True, False]])
    assert_allclose(objective.importance_weights(policy, sampler, mask, 10.0), [2.5, 0.5], rtol=1e-6)
    assert_allclose(objective.importance_weights(policy, sampler, mask, 1.5), [1.5, 0.5], rtol=1e-6)


def test_sampler_drift_by_hand():
    """Fails if the sign is reversed, the masked token counts, only ratios above 1.1 are outside, the largest one has a
    sign, or nats are compared with the limit of ratios."""
    drift = np.log(np.array([[1.2, 1.102, 0.75], [1.0, 0.95, 7.0]]))
    mask = np.array([[True, True, True], [True, True, False]])
    found = objective.sampler_drift(jnp.asarray(drift - 2.0), jnp.full((2, 3), -2.0), jnp.asarray(mask))
    values = drift[mask]
    assert {name: float(value) for name, value in found.items()} == pytest.approx(
        {"drift/mean": values.mean(), "drift/std": values.std(), "drift/max": -np.log(0.75), "drift/outside": 3 / 5},
        rel=1e-5,
    )


def test_truncated_by_hand():
    """Fails if a completion that stops with its last token counts, or one that stops before it does."""
    ids = jnp.array([[1, 1, 3], [1, 1, 2], [1, 2, 0], [1, 1, 1]], jnp.int32)
    mask = jnp.array([[True] * 3, [True] * 3, [True, True, False], [True] * 3])
    assert objective.truncated(ids, mask, (2, 3)).tolist() == [False, False, False, True]


def test_log_ratio_of_three_tokens():
    """Fails if the masked token counts, or if policy and anchor are swapped."""
    policy = jnp.array([[-1.0, -2.0, -0.5], [-3.0, -0.25, -9.0]])
    anchor = jnp.array([[-1.5, -1.0, -2.0], [-1.0, -0.75, -4.0]])
    mask = jnp.array([[True, True, True], [True, True, False]])
    assert_allclose(objective.log_ratio(policy, anchor, mask), [0.5 - 1.0 + 1.5, -2.0 + 0.5], rtol=1e-6)


def test_shaped_rewards_by_hand():
    """Fails if the penalty is added instead of subtracted."""
    shaped = objective.shaped_rewards(jnp.array([2.0, -1.0]), jnp.array([1.0, -1.5]), 0.2)
    assert_allclose(shaped, [1.8, -0.7], rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "group_size", "want"),
    [
        ("none", 1, [1.0, 2.0, 6.0, -1.0]),
        ("batch_mean", 1, [-1.0, 0.0, 4.0, -3.0]),
        ("leave_one_out", 2, [-1.0, 1.0, 7.0, -7.0]),
        ("leave_one_out", 4, [-4 / 3, 0.0, 16 / 3, -4.0]),
        ("group_norm", 2, [-0.5 / 0.5001, 0.5 / 0.5001, 3.5 / 3.5001, -3.5 / 3.5001]),
        ("group_norm", 4, np.array([-1.0, 0.0, 4.0, -3.0]) / (26**0.5 / 2 + 1e-4)),
    ],
)
def test_advantages_by_hand(kind, group_size, want):
    """Fails if a sample stays in its own leave-one-out mean, or if groups take every group_size-th row."""
    shaped = jnp.array([1.0, 2.0, 6.0, -1.0])
    assert_allclose(objective.advantages(shaped, kind, group_size, whiten=False)[:, 0], want, rtol=1e-6, atol=1e-6)


def test_whiten_divides_by_the_standard_deviation():
    """Fails if whitening divides by the variance, or centres a second time."""
    std = (14 / 3) ** 0.5
    centred = objective.advantages(jnp.array([1.0, 2.0, 6.0]), "batch_mean", 1, whiten=True)[:, 0]
    assert_allclose(centred, np.array([-2.0, -1.0, 3.0]) / std, rtol=1e-4)
    kept = objective.advantages(jnp.array([1.0, 2.0, 6.0]), "none", 1, whiten=True)[:, 0]
    assert_allclose(kept, np.array([1.0, 2.0, 6.0]) / std, rtol=1e-4)


def test_whiten_of_equal_rewards_is_zero():
    """Fails if the division by a standard deviation of 0 is not guarded."""
    equal = jnp.full(128, 0.7)  # 128: their mean has a rounding error, which must not be amplified
    assert_allclose(objective.advantages(equal, "batch_mean", 1, whiten=True)[:, 0], np.zeros(128), atol=2e-3)


def test_unknown_advantage_is_refused():
    """Fails if an unknown kind is accepted."""
    with pytest.raises(ValueError, match="'median', want one of none, batch_mean, leave_one_out"):
        objective.advantages(jnp.ones(2), "median", 1, whiten=False)


def test_reinforce_loss_by_hand():
    """Fails if the loss averages over tokens instead of summing them, or counts the masked token."""
    logps = jnp.array([[-1.0, -2.0, -4.0], [-0.5, -8.0, -16.0]])
    mask = jnp.array([[True, True, True], [True, False, False]])
    loss = objective.reinforce_loss(logps, mask, jnp.array([[2.0, -3.0]]).T)
    assert_allclose(loss, -(2.0 * -7.0 + -3.0 * -0.5) / 2, rtol=1e-6)


def test_masked_token_gets_no_gradient():
    """Fails if the loss sums over the tokens after the stop token too."""
    mask = jnp.array([[True, True, False]])
    grad = jax.grad(objective.reinforce_loss)(jnp.array([[-1.0, -2.0, -4.0]]), mask, jnp.array([[3.0]]))
    assert_allclose(grad, [[-3.0, -3.0, 0.0]])


def test_masked_token_may_be_infinite():
    """Fails if the mask multiplies: 0 times infinity is not a number."""
    logps, mask = jnp.array([[-1.0, -jnp.inf]]), jnp.array([[True, False]])
    assert_allclose(objective.log_ratio(logps, jnp.array([[-3.0, -5.0]]), mask), [2.0])
    assert_allclose(objective.reinforce_loss(logps, mask, jnp.array([[0.5]]).T), 0.5)


def test_no_gradient_through_the_shaped_reward():
    """Fails without stop_gradient in shaped_rewards."""
    grad = jax.grad(lambda ratio: objective.shaped_rewards(jnp.ones(2), ratio, 0.3).sum())(jnp.array([0.5, -0.2]))
    assert_allclose(grad, [0.0, 0.0])


def test_no_gradient_through_the_importance_weights():
    """Fails without stop_gradient in importance_weights."""
    logps, mask = jnp.array([[-1.0], [-2.0]]), jnp.ones((2, 1), bool)
    grad = jax.grad(lambda policy: objective.importance_weights(policy, logps, mask, 3.0).sum())(logps - 0.5)
    assert_allclose(grad, [[0.0], [0.0]])


def test_no_gradient_through_the_advantage():
    """Fails without stop_gradient in reinforce_loss."""
    logps, mask = jnp.array([[-1.0], [-2.0]]), jnp.ones((2, 1), bool)
    grad = jax.grad(objective.reinforce_loss, argnums=2)(logps, mask, jnp.array([[0.5], [-0.2]]))
    assert_allclose(grad, [[0.0], [0.0]])


@pytest.mark.parametrize(("advantage", "sign"), [(0.8, 1), (-0.8, -1)])
def test_a_step_raises_what_was_rewarded_and_lowers_what_was_punished(advantage, sign):
    """Fails if the loss has the wrong sign."""
    params, row = bigram(2), np.array([4])

    @jax.jit
    def loss(params):
        return objective.reinforce_loss(token_logps(params, row), jnp.asarray(MASK)[row], jnp.array([[advantage]]).T)

    stepped = jax.tree.map(lambda x, g: x - 0.1 * g, params, jax.grad(loss)(params))
    change = completion_logps(stepped)[4] - completion_logps(params)[4]
    assert sign * float(change) > 0.01
