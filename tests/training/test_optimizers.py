"""The optimizer against Adam written out."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.settings_of import settings_of
from warp_jax.training import optimizers

TINY = settings_of({"rl.learning_rate": 0.02, "adam.b1": 0.9, "adam.b2": 0.99, "adam.eps": 1e-8})


@pytest.fixture(autouse=True)
def _strict_promotion():
    """Overrides the strict one of conftest.py: optax raises a float to an integer power."""


def _run(gradients, **settings):
    optimizer = optimizers.make_optimizer(TINY.rl.model_copy(update=settings), TINY.adam)
    params = jnp.zeros(2)
    state = optimizer.init(params)
    moves = []
    for gradient in gradients:
        updates, state = jax.jit(optimizer.update)(jnp.array(gradient), state, params)
        moves.append(np.asarray(updates))
    return np.stack(moves)


def _adam(gradients, rates):
    first = second = np.zeros(2)
    moves = []
    for t, (gradient, rate) in enumerate(zip(np.array(gradients), rates, strict=True), start=1):
        first, second = 0.9 * first + 0.1 * gradient, 0.99 * second + 0.01 * gradient**2
        moves.append(-rate * first / (1 - 0.9**t) / (np.sqrt(second / (1 - 0.99**t)) + 1e-8))
    return np.stack(moves)


GRADIENTS = [[0.3, -0.2], [0.1, 0.4], [-0.6, 0.0], [0.2, 0.2]]


def test_adam_with_warmup():
    """Fails when the warm-up starts at 0, ends a step late, or falls again."""
    expected = _adam(GRADIENTS, 0.02 * np.array([1 / 3, 2 / 3, 1, 1]))
    np.testing.assert_allclose(_run(GRADIENTS, warmup_steps=3, clip_norm=0.0), expected, rtol=1e-5)
    constant = _adam(GRADIENTS, [0.02] * 4)
    np.testing.assert_allclose(_run(GRADIENTS, warmup_steps=0, clip_norm=0.0), constant, rtol=1e-5)


def test_the_global_norm_is_clipped():
    """Fails when clipping is dropped, comes after Adam, or goes by element."""
    large = [[3.0, -4.0], *GRADIENTS[1:]]
    clipped = [[0.6, -0.8], *GRADIENTS[1:]]
    found = _run(large, warmup_steps=0, clip_norm=1.0)
    np.testing.assert_allclose(found, _adam(clipped, [0.02] * 4), rtol=1e-5)
    assert np.abs(found - _run(large, warmup_steps=0, clip_norm=0.0)).max() > 1e-3


@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0, 7.0, np.nan])
def test_clipping_is_that_of_optax(scale):
    """Fails when a small gradient is scaled up, a large one is not scaled to the limit, or nan is replaced."""
    grads = {"a": scale * jnp.array([0.48, -0.64]), "b": scale * jnp.array([[0.6]])}
    (ours, _), (theirs, _) = (
        clip(1.0).update(grads, optax.EmptyState())
        for clip in (optimizers.clip_by_global_norm, optax.clip_by_global_norm)
    )
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), ours, theirs)


def test_a_clipped_gradient_is_not_kept_beside_the_gradient():
    """Fails when optax clips the gradients: XLA then keeps all of them twice."""
    optimizer = optimizers.make_optimizer(TINY.rl.model_copy(update={"clip_norm": 1.0}), TINY.adam)
    params = {str(i): jax.ShapeDtypeStruct((256, 256), jnp.float32) for i in range(8)}
    state = jax.eval_shape(optimizer.init, params)

    def step(params, state, x):
        grads = jax.grad(lambda params: sum(jnp.sum((x @ w) ** 2) for w in params.values()))(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    x = jax.ShapeDtypeStruct((4, 256), jnp.float32)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1.5 * 8 * 256 * 256 * 4


@pytest.mark.parametrize(("kind", "end"), [("linear", 0.1), ("cosine", 0.1), ("linear", 0.0)])
def test_the_rate_decays_after_the_warmup(kind, end):
    """Fails when the decay starts before the end of the warm-up or a step late, ends elsewhere, or goes on after it."""
    gradients = [*GRADIENTS, [0.1, -0.3], [0.2, 0.5]]
    passed = np.clip((np.arange(6) - 1) / 3, 0, 1)  # of the decay's three steps; the warm-up ends with step 1
    share = 1 - passed if kind == "linear" else (1 + np.cos(np.pi * passed)) / 2
    rates = 0.02 * np.array([0.5, *(end + (1 - end) * share[1:])])
    decay = {"learning_rate_schedule": kind, "learning_rate_steps": 3, "learning_rate_end": end}
    found = _run(gradients, warmup_steps=2, clip_norm=0.0, **decay)
    np.testing.assert_allclose(found, _adam(gradients, rates), rtol=1e-5, atol=1e-9)


def test_matrices_decay_and_norms_do_not():
    """Fails when the decay is left out, is part of the gradient, or reaches the scale of a norm or a bias."""
    params = {"mlp": {"kernel": jnp.full(2, 3.0), "bias": jnp.ones(2)}, "norm": {"scale": jnp.ones(2)}}
    moves = []
    for decay in (0.0, 0.1):
        optimizer = optimizers.make_optimizer(TINY.rl.model_copy(update={"weight_decay": decay}), TINY.adam)
        gradients = jax.tree.map(jnp.ones_like, params)
        moves.append(optimizer.update(gradients, optimizer.init(params), params)[0])
    change = jax.tree.map(lambda new, old: new - old, moves[1], moves[0])
    rate = 0.02 / TINY.rl.warmup_steps
    np.testing.assert_allclose(change["mlp"]["kernel"], -rate * 0.1 * 3.0, rtol=1e-4)
    assert not np.any(change["mlp"]["bias"])
    assert not np.any(change["norm"]["scale"])
