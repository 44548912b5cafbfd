"""top-k and top-p in training: what is scored is what is sampled, against sums over all completions.

A policy is a table of logits [4, 4] of the next of four tokens given the last one. A completion has one or two tokens.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose
from scipy import stats

from tests.settings_of import settings_of
from warp_jax.generation import drawing, sampling
from warp_jax.generation.drawing import SamplingConfig
from warp_jax.training import anchors, objective, reinforce, scoring
from warp_jax.types import PromptBatch, Rollout

START, STOP, TEMPERATURE, KL_COEF = 0, 3, 0.8, 0.3
COMPLETIONS = [(STOP,), *itertools.product((0, 1, 2), range(4))]
TOKENS = np.array([(*y, 0)[:2] for y in COMPLETIONS])
MASK = np.array([[True, len(y) == 2] for y in COMPLETIONS])
LAST = np.stack([np.full(len(TOKENS), START), TOKENS[:, 0]], 1)  # the token before each
REWARDS = np.random.default_rng(5).normal(size=len(TOKENS)).astype(np.float32)
CUTS = [{"top_k": 2}, {"top_p": 0.7}, {"top_k": 3, "top_p": 0.8}]


@pytest.fixture(autouse=True)
def _strict_promotion():
    """Overrides the strict one of conftest.py: optax compares floats with integer steps."""


def _table(seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(4, 4)), jnp.float32)


def _apply(params, token_ids, mask=None, cache=None, *, num_outputs=0, method=None):
    if method == "head":
        return params[token_ids]
    last = token_ids[:, -num_outputs:]
    return (last if method == "hidden" else params[last]), cache


def _config(cut):
    return SamplingConfig(2, TEMPERATURE, (STOP,), pad_id=0, **cut)


def _kept(table, cut):
    """The tokens that are kept after each token, by walking down the sorted tokens in float64: bool [4, 4]."""
    kept = np.zeros((4, 4), bool)
    for row, logits in enumerate(np.asarray(table, np.float64) / TEMPERATURE):
        order = np.argsort(-logits)[: cut.get("top_k")]
        probabilities = np.exp(logits[order]) / np.exp(logits[order]).sum()
        kept[row, order[np.cumsum(probabilities) - probabilities < cut.get("top_p", 1.0)]] = True
    return kept


def _logps(table, kept):
    """Log-probability of every token after every token, renormalised over the kept ones."""
    return jax.nn.log_softmax(jnp.where(kept, table / TEMPERATURE, -jnp.inf), axis=1)


def _completion_logps(table, kept, rows):
    """[len(rows)], by enumeration; the second token of (STOP,) does not count."""
    return jnp.where(MASK, _logps(table, kept)[LAST, TOKENS], 0.0).sum(axis=1)[rows]


def _support(kept):
    """Numbers of the completions that can be drawn."""
    return np.flatnonzero(np.where(MASK, kept[LAST, TOKENS], True).all(axis=1))


def _rollout(rows, kept):
    rows = np.asarray(rows)
    prompts = np.full((len(rows), 1), START, np.int32), np.ones((len(rows), 1), bool), rows
    allowed = jnp.packbits(jnp.asarray(np.where(MASK[..., None], kept[LAST], False)), axis=-1)[rows]
    return Rollout(*prompts, TOKENS[rows].astype(np.int32), MASK[rows], np.zeros((len(rows), 2), np.float32), allowed)


_score = functools.partial(scoring.per_token_logps, _apply, temperature=TEMPERATURE)


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_the_sampler_and_the_scorer_have_one_distribution(cut):
    """Fails when scores are those of all tokens, a set belongs to another token or sequence, or bits are shifted."""
    table, count = _table(0), 4000
    prompts = PromptBatch(np.full((count, 1), START, np.int32), np.ones((count, 1), bool), np.arange(count))
    rollout = jax.jit(functools.partial(sampling.sample, _apply, lambda rows, columns: (), config=_config(cut)))(
        table, prompts, jax.random.key(1)
    )
    scored, mask = _score(table, rollout), rollout.completion_mask
    drift = objective.sampler_drift(rollout.per_token_logps, scored, mask)
    assert float(drift["drift/max"]) < 1e-6
    rows = _support(_kept(table, cut))
    assert 2 < len(rows) < len(TOKENS)
    ids = np.asarray(rollout.completion_ids)
    hits = [(ids == TOKENS[row]).all(1) & (np.asarray(mask).sum(1) == MASK[row].sum()) for row in rows]
    assert sum(hit.sum() for hit in hits) == count
    expected = [np.exp(scored[hit.argmax()].sum()) for hit in hits]
    assert_allclose(sum(expected), 1, atol=1e-6)
    counts = [hit.sum() for hit in hits]
    assert stats.chisquare(counts, count * np.array(expected), sum_check=False).pvalue > 0.01


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize(("advantage", "size"), [("none", 1), ("leave_one_out", 2)])
@pytest.mark.parametrize(("place", "estimator"), [("reward", "k1"), ("token_reward", "k1"), ("loss", "k2")])
def test_the_expected_gradient_is_that_of_the_objective_with_fixed_sets(cut, advantage, size, place, estimator):
    """Fails when the policy or the anchor is not renormalised over the policy's tokens, or has a set of its own."""
    params, anchor = _table(0), _table(1)
    kept = _kept(params, cut)
    rl = {"advantage": advantage, "kl_in": place, "kl_estimator": estimator, "kl_coef": KL_COEF}
    settings = settings_of(
        {"rl.batch_size": 2, "rl.samples_per_prompt": 2, **{f"rl.{name}": value for name, value in rl.items()}}
    )
    rule = reinforce.Rule(_score, optax.sgd(0.1), settings.rl, anchors.ema(0.3), (STOP,))
    batches = np.array(list(itertools.product(_support(kept), repeat=size)))
    everything = _rollout(np.arange(len(TOKENS)), kept)

    def loss(params, rows):
        rollout = jax.tree.map(lambda x: jnp.asarray(x)[rows], everything)
        logps = _score(params, rollout)
        fixed = jax.lax.stop_gradient((logps, _score(anchor, rollout)))
        weighed = reinforce._weigh(rule, KL_COEF, fixed, rollout, jnp.asarray(REWARDS)[rows])
        return reinforce._loss(rule, KL_COEF, logps, weighed, rollout)

    probabilities = np.exp(_completion_logps(params, kept, batches)).prod(axis=1)
    assert probabilities.sum() == pytest.approx(1, abs=1e-6)
    gradients = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(params, batches)
    found = -np.tensordot(probabilities, gradients, 1)

    rows = _support(kept)

    def exact(params):
        logps = _completion_logps(params, kept, rows)
        ratio = logps - _completion_logps(anchor, kept, rows)
        kl = (jnp.exp(logps) * ratio).sum()
        if place == "loss":  # of each next token; how often the policy gets there has no gradient
            before = jax.lax.stop_gradient(jnp.exp(_logps(params, kept)[START]))
            policy, other = _logps(params, kept), _logps(anchor, kept)
            kls = jnp.where(kept, jnp.exp(policy) * jnp.where(kept, policy - other, 0.0), 0.0).sum(axis=1)
            kl = kls[START] + before[:STOP] @ kls[:STOP]
        return jnp.exp(logps) @ REWARDS[rows] - KL_COEF * kl

    want = np.asarray(jax.grad(exact)(params))
    assert np.isfinite(want).all()
    assert np.abs(want).max() > 0.05
    assert_allclose(found, want, atol=3e-6)


@pytest.mark.parametrize("chunk", [0, 1, 3])
def test_pieces_of_the_logits_have_their_own_sets(chunk):
    """Fails when a piece has the sets of another, or the empty sets of masked tokens and of padding give nan."""
    rng = np.random.default_rng(0)
    table, other = (jnp.asarray(rng.normal(size=(11, 11)), jnp.float32) for _ in range(2))
    ids, mask = rng.integers(0, 11, (3, 4)).astype(np.int32), np.arange(4) < np.array([[4], [2], [3]])
    last = np.concatenate([[[1], [2], [3]], ids[:, :-1]], axis=1)
    kept = rng.random((3, 4, 11)) < 0.5
    kept[np.arange(3)[:, None], np.arange(4), ids] = True
    allowed = jnp.packbits(jnp.asarray(kept & mask[..., None]), axis=-1)
    rollout = Rollout(last[:, :1], np.ones((3, 1), bool), np.arange(3), ids, mask, np.zeros((3, 4)), allowed)
    weights = jnp.arange(12.0).reshape(3, 4)

    def want(table):
        logps = jax.nn.log_softmax(jnp.where(kept, table[last] / TEMPERATURE, -jnp.inf), axis=-1)
        found = jnp.take_along_axis(logps, jnp.asarray(ids)[..., None], axis=-1)[..., 0]
        return (jnp.where(mask, found, 0.0) * weights).sum()

    for params in (table, other):  # the second is an anchor: the sets are not its own
        found = jax.value_and_grad(lambda p: (_score(p, rollout, chunk=chunk) * weights).sum())(params)
        for ours, theirs in zip(found, jax.value_and_grad(want)(params), strict=True):
            assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_rounding_does_not_change_a_set():
    """Fails when the scorer finds its own set: it rounds differently, and would score a drawn token as impossible."""
    logits = jnp.array([[1.0, 0.5, 0.5 - 1e-6, -1.0]])
    allowed = drawing.pack(drawing.kept_logits(logits, SamplingConfig(1, 1.0, (), 0, top_k=2)))
    rounded = jnp.array([[1.0, 0.5 - 1e-6, 0.5, -1.0]])
    probabilities = jax.nn.softmax(drawing.restrict(rounded, allowed))[0]
    assert_allclose(probabilities, [1 / (1 + np.exp(-0.5)), 1 / (1 + np.exp(0.5)), 0, 0], rtol=1e-5)
