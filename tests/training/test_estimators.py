"""Where the KL stands, how it is estimated, and clipped updates: against gradients computed by enumeration.

The policy draws one or two of three tokens (`test_objective.COMPLETIONS`).
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose

from tests.settings_of import settings_of
from tests.training.test_objective import (
    COMPLETIONS,
    MASK,
    REWARDS,
    STOP,
    TOKENS,
    bigram,
    completion_logps,
    token_logps,
)
from warp_jax.training import anchors, objective, reinforce
from warp_jax.types import Rollout

KL_COEF = 0.3
SETTINGS = {"rl.batch_size": 6, "rl.samples_per_prompt": 2, "rl.kl_coef": KL_COEF}


@pytest.fixture(autouse=True)
def _strict_promotion():
    """Overrides the strict one of conftest.py: optax compares floats with integer steps."""


def _rule(**changes):
    rl = settings_of({**SETTINGS, **{f"rl.{name}": value for name, value in changes.items()}}).rl
    return reinforce.Rule(_score, optax.sgd(0.2), rl, anchors.ema(0.3), (STOP,))


def _rollout(rows):
    """The completions numbered `rows`, which are their prompts too: the score function needs no other input."""
    rows = jnp.asarray(rows, jnp.int32)
    prompts = rows[:, None], jnp.ones((len(rows), 1), bool), rows
    return Rollout(*prompts, jnp.asarray(TOKENS, jnp.int32)[rows], jnp.asarray(MASK)[rows], jnp.zeros((len(rows), 2)))


def _score(params, rollout):
    first, second = rollout.completion_ids.T
    first_logps, second_logps = (jax.nn.log_softmax(params[name], axis=-1) for name in ("first", "second"))
    return jnp.stack([first_logps[first], second_logps[first, second]], axis=1)


def _expected_gradient(rule, params, anchor, size):
    """Of the sampled loss, over every batch that the policy can draw; negative: the direction of ascent."""
    batches = np.array(list(itertools.product(range(len(COMPLETIONS)), repeat=size)))
    probabilities = jnp.exp(completion_logps(params)[batches].sum(axis=1))

    def loss(params, rows):
        rollout, logps = _rollout(rows), _score(params, _rollout(rows))
        fixed = jax.lax.stop_gradient((logps, _score(anchor, rollout)))
        weighed = reinforce._weigh(rule, rule.rl.kl_coef, fixed, rollout, jnp.asarray(REWARDS)[rows])
        return reinforce._loss(rule, rule.rl.kl_coef, logps, weighed, rollout)

    gradients = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(params, batches)
    return jax.tree.map(lambda x: -jnp.tensordot(probabilities, x, 1), gradients), gradients, probabilities


def _kl(p, q):
    """KL of the next-token distributions with these logits."""
    p, q = jax.nn.log_softmax(p, axis=-1), jax.nn.log_softmax(q, axis=-1)
    return (jnp.exp(p) * (p - q)).sum(axis=-1)


def _exact_gradient(params, anchor, kl):
    """Of E[reward] - KL_COEF * kl(params, anchor)."""

    def objective_of(params):
        return jnp.sum(jnp.exp(completion_logps(params)) * REWARDS) - KL_COEF * kl(params, anchor)

    return jax.grad(objective_of)(params)


def _sequence_kl(params, anchor):
    return jnp.sum(jnp.exp(completion_logps(params)) * (completion_logps(params) - completion_logps(anchor)))


def _token_kls(params, anchor, kl):
    """Sum over positions of kl(policy, anchor) at them; how often the policy gets there has no gradient."""
    reached = jax.lax.stop_gradient(jax.nn.softmax(params["first"]))[:STOP]
    return kl(params["first"], anchor["first"]) + reached @ kl(params["second"][:STOP], anchor["second"][:STOP])


EXPECTED = {  # where the KL is and its estimator: the KL whose gradient the update follows on average
    ("reward", "k1"): _sequence_kl,
    ("token_reward", "k1"): _sequence_kl,
    ("loss", "k1"): lambda params, anchor: 0.0,
    ("loss", "k2"): functools.partial(_token_kls, kl=_kl),
    ("loss", "k3"): functools.partial(_token_kls, kl=lambda p, q: _kl(q, p)),
}


@pytest.mark.parametrize(("place", "estimator"), EXPECTED)
@pytest.mark.parametrize(("advantage", "size"), [("none", 1), ("leave_one_out", 2)])
def test_the_expected_gradient_is_that_of_the_stated_kl(place, estimator, advantage, size):
    """Fails when the KL before a token keeps its weight twice or loses its sign, the KL in the loss is in the reward
    too, an estimator is another, or the masked token counts.
    """
    params, anchor = bigram(0), bigram(1)
    rule = _rule(kl_in=place, kl_estimator=estimator, advantage=advantage)
    found, *_ = _expected_gradient(rule, params, anchor, size)
    want = _exact_gradient(params, anchor, EXPECTED[place, estimator])
    other = _exact_gradient(params, anchor, lambda params, anchor: 0.0)
    assert (estimator == "k1" and place == "loss") or np.abs(want["first"] - other["first"]).max() > 0.02
    for name in params:
        assert_allclose(found[name], want[name], atol=3e-6)


def test_the_kl_of_a_token_and_those_after_it_has_less_variance():
    """Fails when the KL of the tokens before a token is added to its weight once more."""
    spread = []
    for place in ("reward", "token_reward"):
        rule = _rule(kl_in=place, advantage="none", kl_coef=3.0)
        mean, gradients, probabilities = _expected_gradient(rule, bigram(0), bigram(1), 1)
        deviation = jax.tree.map(lambda x, m: (x + m) ** 2, gradients, mean)["second"].sum((1, 2))
        spread.append(float(probabilities @ deviation))
    assert spread[1] < 0.98 * spread[0]


@pytest.mark.parametrize(("estimator", "unbiased"), [("k1", True), ("k2", False), ("k3", True)])
def test_the_means_of_the_estimators(estimator, unbiased):
    """Fails when k3 has the other sign of the log-ratio, or k2 is not halved (its error is 14 % here, not 128 %)."""
    params, anchor = bigram(0), bigram(1)
    rows, probabilities = np.arange(len(COMPLETIONS)), np.exp(np.asarray(completion_logps(params), np.float64))
    ratios = objective.log_ratios(token_logps(params, rows), token_logps(anchor, rows), jnp.asarray(MASK))
    mean = probabilities @ np.asarray(objective.kl_estimates(ratios, estimator)).sum(axis=1)
    exact = float(_sequence_kl(params, anchor))
    assert (abs(mean - exact) < 1e-6) == unbiased
    assert mean == pytest.approx(exact, rel=0.4)


RATIOS = np.log(np.array([[0.8, 1.5, 9.0], [1.1, 0.5, 1.25]]))
CLIP_MASK = np.array([[True, True, False], [True, True, True]])
ADVANTAGE = np.array([[2.0], [-3.0]])


def _clipped(kind, ratios=RATIOS):
    rl = _rule(updates_per_rollout=2, clip_ratio=kind, clip_low=0.1, clip_high=0.3).rl
    kept = jnp.where(CLIP_MASK, jnp.asarray(ratios, jnp.float32), 0.0)
    return objective.clipped_loss(kept, jnp.asarray(CLIP_MASK), jnp.asarray(ADVANTAGE, jnp.float32), rl)


def test_the_clipped_losses_by_hand():
    """Fails when the two limits are exchanged, the larger surrogate is taken, or the sequence ratio is no geometric
    mean over the tokens that count.
    """
    # token: a positive advantage is clipped above 1.3, a negative one below 0.9
    first, second = 2 * (0.8 + 1.3), -3 * (1.1 + 0.9 + 1.25)
    assert_allclose(_clipped("token"), -(first + second) / 2, rtol=1e-6)
    means = (0.8 * 1.5) ** (1 / 2), (1.1 * 0.5 * 1.25) ** (1 / 3)
    assert means[0] < 1.3
    assert means[1] < 0.9
    assert_allclose(_clipped("sequence"), -(2 * means[0] - 3 * 0.9) / 2, rtol=1e-6)


@pytest.mark.parametrize("kind", ["token", "sequence"])
def test_the_first_clipped_update_is_the_policy_gradient(kind):
    """Fails when a ratio is taken to another policy than that of the rollout, or GSPO does not divide by the length."""
    gradient = jax.grad(lambda ratios: _clipped(kind, ratios))(jnp.zeros((2, 3)))
    lengths = np.array([[2.0], [3.0]]) if kind == "sequence" else 1.0
    assert_allclose(gradient, np.where(CLIP_MASK, -ADVANTAGE / lengths / 2, 0.0), rtol=1e-6)


def test_several_updates_of_one_rollout():
    """Fails when the advantages or old log-probabilities are taken again in a later update, the anchor or the optimizer
    moves otherwise than once per step or update, or the number of updates is another.
    """
    rule = _rule(updates_per_rollout=3, advantage="none", clip_low=0.05, clip_high=0.08)
    rows, params, anchor = np.array([1, 4, 3, 3, 6, 0]), bigram(0), bigram(1)
    rollout, rewards = _rollout(rows), jnp.asarray(REWARDS)[rows]
    state = reinforce.init_state(rule, params)._replace(anchor_params=anchor)
    after, metrics, _ = jax.jit(functools.partial(reinforce.policy_update, rule))(state, {}, rollout, rewards)

    mask, old = jnp.asarray(MASK)[rows], _score(params, rollout)
    shaped = rewards - KL_COEF * jnp.where(mask, old - _score(anchor, rollout), 0.0).sum(axis=1)

    def loss(params):
        ratio = jnp.exp(_score(params, rollout) - old)
        low = jnp.minimum(ratio * shaped[:, None], jnp.clip(ratio, 0.95, 1.08) * shaped[:, None])
        return -jnp.where(mask, low, 0.0).sum(axis=1).mean()

    want = params
    for _ in range(3):
        want = jax.tree.map(lambda x, g: x - 0.2 * g, want, jax.grad(loss)(want))
    for name in params:
        assert_allclose(after.params[name], want[name], rtol=1e-5)
        assert_allclose(after.anchor_params[name], 0.7 * anchor[name] + 0.3 * want[name], rtol=1e-5)
    assert int(after.step) == 1
    assert_allclose(metrics["reward"], rewards.mean(), rtol=1e-6)


def test_truncated_completions_are_masked_or_penalised():
    """Fails when completed ones are, the penalty is added, or it is in the logged reward."""
    rows = np.array([1, 3, 0, 2])  # of two tokens: (0, 0) without a stop token, (0, STOP); then (STOP,), (0, 1)
    cut_off = np.array([COMPLETIONS[row][-1] != STOP for row in rows])
    assert cut_off.tolist() == [True, False, False, True]
    rollout, rewards = _rollout(rows), jnp.asarray(REWARDS)[rows]
    logps = _score(bigram(0), rollout), _score(bigram(1), rollout)
    plain = reinforce._weigh(_rule(advantage="none"), KL_COEF, logps, rollout, rewards)
    masked = reinforce._weigh(_rule(advantage="none", mask_truncated=True), KL_COEF, logps, rollout, rewards)
    fined = reinforce._weigh(_rule(advantage="none", truncation_penalty=0.7), KL_COEF, logps, rollout, rewards)
    assert_allclose(masked.advantages[:, 0], np.where(cut_off, 0, plain.advantages[:, 0]))
    assert_allclose(fined.shaped_rewards, plain.shaped_rewards - 0.7 * cut_off, rtol=1e-6)


def test_a_masked_completion_has_no_kl_in_the_loss():
    """Fails when mask_truncated leaves the KL term of a completion that was cut off, or takes that of the others."""
    rule = _rule(kl_in="loss", kl_estimator="k2", advantage="none", mask_truncated=True)
    rollout = _rollout(np.array([1, 3, 0, 2]))
    logps = _score(bigram(0), rollout), _score(bigram(1), rollout)
    weighed = reinforce._weigh(rule, KL_COEF, logps, rollout, jnp.zeros(4))
    slopes = jax.grad(functools.partial(reinforce._loss, rule, KL_COEF))(logps[0], weighed, rollout)
    assert np.abs(slopes).sum(axis=1).astype(bool).tolist() == [False, True, True, False]


def _kl_coefs(steps=6, **changes):
    """kl_coef of each step, and the KL to the anchor."""
    rule = _rule(**changes)
    update = jax.jit(functools.partial(reinforce.policy_update, rule))
    state = reinforce.init_state(rule, bigram(0))._replace(anchor_params=bigram(1))
    rows, found = np.array([1, 4, 3, 3, 6, 0]), []
    for _ in range(steps):
        state, metrics, _ = update(state, {}, _rollout(rows), jnp.asarray(REWARDS)[rows])
        found.append((float(metrics["kl_coef"]), float(metrics["anchor_kl"])))
    return np.array(found).T


def test_the_schedules_of_kl_coef():
    """Fails when a schedule counts from step 1, ends elsewhere, or does not stay at its end."""
    linear, _ = _kl_coefs(kl_schedule="linear", kl_steps=4, kl_coef_end=0.1)
    assert_allclose(linear, [0.3, 0.25, 0.2, 0.15, 0.1, 0.1], rtol=1e-5)
    cosine, _ = _kl_coefs(kl_schedule="cosine", kl_steps=4, kl_coef_end=0.1)
    half = 0.1 * np.cos(np.pi / 4)
    assert_allclose(cosine, [0.3, 0.2 + half, 0.2, 0.2 - half, 0.1, 0.1], rtol=1e-5)


def test_kl_coef_adapts_to_the_target():
    """Fails when the error has the other sign, is not clipped, the gain is dropped, or a KL of another step counts."""
    found, kl = _kl_coefs(kl_schedule="adaptive", kl_target=0.2, kl_gain=0.5)
    errors = np.clip(kl / 0.2 - 1, -0.2, 0.2)
    assert (np.abs(errors) < 0.199).any()
    assert (np.abs(errors) > 0.199).any()
    assert_allclose(found, 0.3 * np.cumprod([1.0, *(1 + 0.5 * errors[:-1])]), rtol=1e-5)
