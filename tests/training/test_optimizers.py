"""The optimizer against Adam written out."""

import jax
import jax.numpy as jnp
import numpy as np
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
