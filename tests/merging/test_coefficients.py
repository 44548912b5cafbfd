"""Each method of merging against its formula, on vectors in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from warp_jax import merging
from warp_jax.merging import coefficients

INIT = np.array([0.5, -1.0, 2.0, 0.25])
DELTAS = np.array([[3.0, 0.5, -0.25, 0.0], [1.0, 2.0, 0.5, 1.0], [-0.5, 1.5, 0.0, 2.0]])


def _trees(count):
    init = {"w": jnp.asarray(INIT, jnp.float32)}
    return init, [{"w": jnp.asarray(INIT + delta, jnp.float32)} for delta in DELTAS[:count]]


def _moved(merged):
    return np.asarray(merged["w"]).astype(np.float64) - INIT


def _cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


@pytest.mark.parametrize("count", [2, 3])
def test_model_stock_is_its_formula(count):
    """Fails when the angle is of full weights, one pair stands for all, or the ratio weighs init (arXiv 2403.19522)."""
    init, policies = _trees(count)
    pairs = [_cosine(DELTAS[a], DELTAS[b]) for a in range(count) for b in range(a)]
    ratio = count * np.mean(pairs) / (1 + (count - 1) * np.mean(pairs))
    want = ratio * DELTAS[:count].mean(0)
    np.testing.assert_allclose(_moved(merging.model_stock(init, policies)), want, rtol=1e-5)


def test_model_stock_of_orthogonal_runs_is_init():
    """Fails when the sine is taken: the paper's Appendix C.2 drops the method for this."""
    init = {"w": jnp.zeros(2)}
    merged = merging.model_stock(init, [{"w": jnp.array([3.0, 0])}, {"w": jnp.array([0, 2.0])}])
    np.testing.assert_allclose(merged["w"], 0, atol=1e-7)


def test_model_stock_takes_the_tensor_as_its_unit():
    """Fails when layers share an angle, as in WARP."""
    init = {"layers/0/a": jnp.zeros(2), "layers/0/b": jnp.zeros(2)}
    first = {"layers/0/a": jnp.array([1.0, 0]), "layers/0/b": jnp.array([1.0, 0])}
    second = {"layers/0/a": jnp.array([1.0, 0]), "layers/0/b": jnp.array([0, 1.0])}
    merged = merging.model_stock(init, [first, second])
    np.testing.assert_allclose(merged["layers/0/a"], [1, 0], atol=1e-6)
    np.testing.assert_allclose(merged["layers/0/b"], [0, 0], atol=1e-6)


@pytest.mark.parametrize(("weights", "want"), [(None, [1, 1, 1]), ([0.2, 0.7, -0.1], [0.2, 0.7, -0.1])])
def test_task_arithmetic_adds_task_vectors(weights, want):
    """Fails when the default is the mean, or weights are normalised."""
    init, policies = _trees(3)
    np.testing.assert_allclose(
        _moved(merging.task_arithmetic(init, policies, weights)), np.array(want) @ DELTAS, rtol=1e-5
    )


@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_slerp_of_full_weights(rate):
    """Fails when task vectors are taken, or LITI does not go back to init (the paper's Appendix C.2)."""
    init, (first, second) = _trees(2)
    a, b = INIT + DELTAS[0], INIT + DELTAS[1]
    angle = np.arccos(_cosine(a, b))
    merged = (np.sin(0.8 * angle) * a + np.sin(0.2 * angle) * b) / np.sin(angle)
    options = {"weights": [0.2], "liti_rate": rate}
    found = merging.slerp_full_weights(init, [first, second], **options)
    np.testing.assert_allclose(_moved(found), rate * (merged - INIT), rtol=1e-5, atol=1e-6)


def test_full_weights_that_are_nearly_collinear_are_averaged():
    """Fails when the guard of parallel vectors is left out: this is why the paper takes task vectors."""
    init, policies = {"w": jnp.asarray(100 * INIT)}, [{"w": jnp.asarray(100 * INIT + d)} for d in 1e-3 * DELTAS[:2]]
    found = merging.slerp_full_weights(init, policies)
    np.testing.assert_allclose(found["w"], 100 * INIT + 1e-3 * DELTAS[:2].mean(0), rtol=1e-6)


@pytest.mark.parametrize("method", ["model_stock", "slerp_symmetric"])
def test_methods_that_set_their_weights_take_none(method):
    """Fails when weights are ignored in silence."""
    init, policies = _trees(2)
    with pytest.raises(ValueError, match="weights: got 2 for 2 policies, want 0"):
        merging.merge(init, policies, method, weights=[0.2, 0.8])


def test_unknown_methods_and_single_policies_are_refused():
    """Fails when a typo falls back to slerp, or model stock divides by zero."""
    init, policies = _trees(2)
    with pytest.raises(ValueError, match="method: got 'ties', want one of slerp, "):
        merging.merge(init, policies, "ties")
    with pytest.raises(ValueError, match="want at least two for model stock"):
        merging.model_stock(init, policies[:1])


def test_every_method_is_a_function_of_the_gram_matrix():
    """Fails when a method returns another shape or dtype."""
    matrix = np.stack([DELTAS @ DELTAS.T, np.eye(3)])
    for name, method in coefficients.METHODS.items():
        found = method.solve(matrix, None)
        assert (found.shape, found.dtype) == ((2, 3), np.float64), name
