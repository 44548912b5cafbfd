"""Best-of-N against enumeration: of all draws of a small policy, and of all subsets of its samples."""

import itertools
import math

import numpy as np
import pytest

from warp_jax.evaluation import best_of_n

PROBABILITIES = np.array([5, 2, 1]) / 8  # of the completions of a policy with three tokens


def _best(rewards, draw):
    """Completions of a draw that have the highest reward, one for each time they were drawn."""
    high = max(rewards[y] for y in draw)
    return [y for y in draw if rewards[y] == high]


def _exact(rewards, n):
    """Distribution of best-of-n over the completions, from all draws of n completions."""
    found = np.zeros(len(PROBABILITIES))
    for draw in itertools.product(range(len(PROBABILITIES)), repeat=n):
        best = _best(rewards, draw)
        for y in best:
            found[y] += math.prod(PROBABILITIES[list(draw)]) / len(best)
    return found


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("rewards", [(0.3, -1.0, 2.0), (1.0, 0.5, 1.0), (2.0, 2.0, 2.0)], ids=str)
def test_the_kl_is_that_of_all_draws(rewards, n):
    """Fails when equal rewards count as different ones, F is taken below r only, or the ratio is to another policy."""
    chosen = _exact(rewards, n)
    want = (chosen * np.log(chosen / PROBABILITIES)).sum()
    samples = np.repeat(rewards, (80 * PROBABILITIES).astype(int))  # their distribution is exactly the policy's
    assert best_of_n.kl(samples, n) == pytest.approx(want, abs=1e-12)
    assert best_of_n.kl(samples, n) <= best_of_n.kl_bound(n) + 1e-12


@pytest.mark.parametrize("n", [1, 2, 3])
def test_weights_are_those_of_all_subsets(n):
    """Fails when the first n samples are taken, samples are put back, or ties go to one of the samples."""
    rewards = [0.5, 2.0, 0.5, -1.0, 2.0]
    want = np.zeros(len(rewards))
    subsets = list(itertools.combinations(range(len(rewards)), n))
    for subset in subsets:
        best = _best(rewards, subset)
        want[best] += 1 / len(best) / len(subsets)
    assert best_of_n.weights(np.array(rewards), n) == pytest.approx(want)


@pytest.mark.parametrize(("n", "samples"), [(2, 16), (8, 64), (32, 256)])
def test_the_kl_of_different_rewards_is_just_below_its_bound(n, samples):
    """Fails when the bound has another form, or the error of F from so many samples exceeds what the docstring says."""
    short = best_of_n.kl_bound(n) - best_of_n.kl(np.random.default_rng(0).permutation(samples), n)
    assert 0 < short < (n / samples) ** 2
    assert best_of_n.kl_bound(2) == pytest.approx(math.log(2) - 0.5)
