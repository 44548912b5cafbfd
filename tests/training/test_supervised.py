"""The losses of SFT and of the reward model against hand arithmetic."""

import jax.numpy as jnp
import numpy as np
import pytest

from warp_jax.training import supervised


def _scores(params, token_ids, mask, cache=None, num_outputs=0):
    return params[token_ids], None


def test_language_loss_is_the_next_tokens():
    """Fails when targets are not shifted, or padding is counted."""
    logits = jnp.log(jnp.array([[0.2, 0.8], [0.7, 0.3]]))
    batch = {"token_ids": jnp.array([[0, 1, 1, 0]]), "mask": jnp.array([[False, True, True, True]])}
    loss, _ = supervised.language_loss(_scores, logits, batch)
    assert float(loss) == pytest.approx(-(np.log(0.3) + np.log(0.7)) / 2, rel=1e-6)


def test_label_loss_is_binary_cross_entropy():
    """Fails when labels are inverted, or scores are used as probabilities."""
    scores = jnp.array([0.0, 2.0, -1.0])
    batch = {"token_ids": jnp.array([[0, 1], [0, 2]]), "mask": jnp.ones((2, 2), bool), "labels": jnp.array([1, 1])}
    loss, metrics = supervised.label_loss(_scores, scores, batch)
    assert float(loss) == pytest.approx((np.log1p(np.exp(-2)) + np.log1p(np.exp(1))) / 2, rel=1e-6)
    assert float(metrics["accuracy"]) == 0.5


def test_bradley_terry_prefers_the_first_half():
    """Fails when the pair is swapped, or rows are paired as neighbours."""
    scores = jnp.array([0.0, 2.0, -1.0, 0.5, 0.7])
    batch = {"token_ids": jnp.array([[1], [2], [3], [4]]), "mask": jnp.ones((4, 1), bool)}
    loss, metrics = supervised.bradley_terry_loss(_scores, scores, batch)
    margins = np.array([2.0 - 0.5, -1.0 - 0.7])
    assert float(loss) == pytest.approx(np.log1p(np.exp(-margins)).mean(), rel=1e-6)
    assert float(metrics["accuracy"]) == 0.5


def test_reward_batches_hold_label_one_first():
    """Fails when the halves are swapped: Bradley-Terry would learn the opposite."""
    labels = np.array([0, 1, 0, 0, 1, 1, 0, 1])
    chosen = supervised.paired_rows(labels, 6, 1, seed=0, stream="s")
    assert labels[chosen].tolist() == [1, 1, 1, 0, 0, 0]
