"""Log-probabilities and KL computed in pieces of the sequence (logits_chunk)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp

from warp_jax.models import apply
from warp_jax.models.transformer import TransformerConfig
from warp_jax.training import scoring, supervised
from warp_jax.types import Rollout

CONFIG = TransformerConfig(
    vocab_size=50, width=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=32, final_softcap=4.0
)
GENERATOR = np.random.default_rng(0)
LENGTH = 7
MASK = np.arange(LENGTH) < np.array([[7], [3], [5]])
ROLLOUT = Rollout(
    GENERATOR.integers(0, 50, (3, 4)),
    np.ones((3, 4), bool),
    np.arange(3),
    GENERATOR.integers(0, 50, (3, LENGTH)),
    MASK,
    np.zeros(MASK.shape, np.float32),
)
WINDOWS = {"local_pattern": (True, False), "sliding_window": 3}
MODELS = {"tied": {}, "untied": {"tied_head": False}, "windows": WINDOWS}
COPIES = 3
PADDED = np.array([[True] * 4, [False, False, True, True]])
SHARED = Rollout(  # two prompts, each with three completions
    np.repeat(GENERATOR.integers(0, 50, (2, 4)), COPIES, axis=0),
    np.repeat(PADDED, COPIES, axis=0),
    np.arange(6),
    GENERATOR.integers(0, 50, (6, LENGTH)),
    np.arange(LENGTH) < np.array([[7], [3], [1], [5], [7], [2]]),
    np.zeros((6, LENGTH), np.float32),
)


@functools.cache
def _model(name="tied"):
    config = dataclasses.replace(CONFIG, **MODELS[name])
    init = jax.jit(functools.partial(apply.init_params, config))
    params = jax.tree.map(lambda x: 4 * x, [init(jax.random.key(seed)) for seed in (1, 2)])  # far from uniform
    return apply.make_apply_fn(config), *params


@functools.cache
def _logps_and_grads(name, chunk):
    apply_fn, params, _ = _model(name)

    @functools.partial(jax.value_and_grad, has_aux=True)
    def mean(params):
        logps = scoring.per_token_logps(apply_fn, params, ROLLOUT, 0.7, chunk=chunk)
        return (logps * jnp.arange(1.0, 22.0).reshape(3, 7)).sum(), logps

    (_, logps), grads = jax.jit(mean)(params)
    return logps, grads


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("chunk", [1, 3, 5])
def test_pieces_change_neither_logps_nor_their_gradient(model, chunk):
    """Fails when pieces are put back in another order, the last one is cut short, or the head has no gradient."""
    whole, whole_grads = _logps_and_grads(model, 0)
    pieces, grads = _logps_and_grads(model, chunk)
    np.testing.assert_allclose(pieces, whole, rtol=1e-5, atol=1e-6)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(whole_grads), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())
    assert not np.asarray(pieces)[~MASK].any()


@pytest.mark.parametrize(("model", "chunk"), [("tied", 0), ("windows", 0), ("windows", 3)])
def test_a_prompt_is_computed_once_for_its_completions(model, chunk):
    """Fails if completions see each other, padding, or not the prompt; are numbered from 0; or get another's prompt."""
    apply_fn, params, _ = _model(model)
    weights = np.random.default_rng(1).normal(size=SHARED.completion_mask.shape)

    def run(copies, rollout):
        def total(params):
            logps = scoring.per_token_logps(apply_fn, params, rollout, 0.7, chunk=chunk, copies=copies)
            return (logps * weights[:, : logps.shape[1]]).sum(), logps

        return jax.jit(jax.value_and_grad(total, has_aux=True))(params)

    first_token = SHARED._replace(completion_ids=SHARED.completion_ids[:, :1], completion_mask=np.ones((6, 1), bool))
    for rollout in (SHARED, first_token):
        ((_, alone), grads), ((_, shared), shared_grads) = run(1, rollout), run(COPIES, rollout)
        np.testing.assert_allclose(shared, alone, rtol=1e-5, atol=1e-6)
        for a, b in zip(jax.tree.leaves(shared_grads), jax.tree.leaves(grads), strict=True):
            np.testing.assert_allclose(a, b, atol=3e-5 * np.abs(b).max())


def test_shared_prompts_save_their_tokens():
    """Fails if each completion still computes its prompt: 6 rows of 4 + 6 tokens instead of 2 rows of 4 + 3 x 6."""
    apply_fn, params, _ = _model()

    def rows(copies):
        score = functools.partial(scoring.per_token_logps, apply_fn, temperature=0.7, copies=copies)
        return str(jax.make_jaxpr(score)(params, SHARED))

    assert "f32[6,10,16]" in rows(1)
    assert "f32[2,22,16]" in rows(COPIES)
    assert "f32[6,10,16]" not in rows(COPIES)


def test_kl_in_pieces():
    """Fails when the pieces of policy and reference are not of the same positions."""
    apply_fn, policy, reference = _model()
    whole, pieces = (
        jax.jit(functools.partial(scoring.sequence_kl, apply_fn, rollout=ROLLOUT, temperature=0.7, chunk=chunk))(
            params=policy, reference_params=reference
        )
        for chunk in (0, 3)
    )
    assert float(whole.min()) > 0.1
    np.testing.assert_allclose(pieces, whole, rtol=1e-5)


def test_language_loss_in_pieces():
    """Fails when the loss ignores its chunk's targets."""
    apply_fn, params, _ = _model()
    batch = {"token_ids": ROLLOUT.completion_ids, "mask": MASK}
    loss = jax.jit(functools.partial(supervised.language_loss, apply_fn), static_argnames="logits_chunk")
    (whole, _), (pieces, _) = loss(params, batch, logits_chunk=0), loss(params, batch, logits_chunk=4)
    assert float(pieces) == pytest.approx(float(whole), rel=1e-5)


def test_logits_are_never_whole():
    """Fails when the chunk is ignored: an array of all positions and the vocabulary would be in the program."""
    apply_fn, params, _ = _model()

    def shapes(chunk):
        grad = jax.grad(lambda p: scoring.per_token_logps(apply_fn, p, ROLLOUT, 0.7, chunk=chunk).sum())
        return str(jax.make_jaxpr(grad)(params))

    assert "f32[3,7,50]" in shapes(0)
    assert "f32[3,7,50]" not in shapes(3)
    assert "f32[3,3,50]" in shapes(3)


@pytest.mark.parametrize(("spread", "noise"), [(0.3, 0.01), (3.0, 0.01), (3.0, 1.0)])
def test_the_kl_of_large_vocabularies_keeps_its_digits(spread, noise):
    """Fails if the sums over the vocabulary round as one long sum does (1e-5 nats), or large logits are subtracted."""
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=(4, 49152)) * spread + 60).astype(np.float32)
    reference = (logits + rng.normal(size=logits.shape) * noise).astype(np.float32)
    exact = (x.astype(np.float64) for x in (logits, reference))
    logps, reference_logps = (x - logsumexp(x, 1, keepdims=True) for x in exact)
    want = (np.exp(logps) * (logps - reference_logps)).sum(1)
    found = jax.jit(scoring._next_token_kl)(logits, reference)
    np.testing.assert_allclose(found, want, rtol=2e-6, atol=1e-7)
