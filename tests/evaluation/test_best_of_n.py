"""Best-of-N against enumeration: of all draws of a small policy, and of all subsets of its samples."""

import itertools
import math
import types

import numpy as np
import pytest

from warp_jax.evaluation import best_of_n
from warp_jax.evaluation.measure import Evaluation

PROBABILITIES = np.array([5, 2, 1]) / 8  # of the completions of a policy with three tokens
PROMPTS, PER_PROMPT = 3, 2


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


def _samples(reward, **columns):
    """An evaluation of samples [G, K]."""
    fields = dict.fromkeys(("gold_reward", "sft_kl", "length", "clusters"), reward) | columns
    return Evaluation(reward=reward, distinct_2=None, completion_ids=None, completion_mask=None, **fields)


def test_samples_stay_with_their_prompt(monkeypatch):
    """Fails when completions of other prompts are mixed, two evaluations have the same noise, or more are kept."""
    seeds, rounds = [], []

    def evaluate(examiner, params):
        seeds.append(examiner.seed)
        assert params == "sft"
        return _samples(np.repeat(np.arange(PROMPTS), PER_PROMPT) * 100 + np.tile([0, 1], PROMPTS) + 10 * len(seeds))

    monkeypatch.setattr(best_of_n.measure, "evaluate", evaluate)

    class Examiner(types.SimpleNamespace):
        def _replace(self, seed):
            return Examiner(seed=seed, sft_params=self.sft_params)

    found = best_of_n.draw(Examiner(seed=3, sft_params="sft"), PER_PROMPT, 5, lambda *args: rounds.append(args))
    assert found.reward.tolist() == [[100 * g + k for k in (10, 11, 20, 21, 30)] for g in range(PROMPTS)]
    assert len(set(seeds)) == 3
    assert rounds == [(1, 3), (2, 3), (3, 3)]


def test_the_reward_chooses_and_all_is_measured_of_the_chosen():
    """Fails when gold or length is that of another completion, gold chooses, or rows are not those of SFT."""
    reward = np.array([[1.0, 3.0, 2.0], [5.0, 5.0, 4.0]])
    gold = np.array([[9.0, 0.0, 3.0], [1.0, 2.0, 6.0]])
    samples = _samples(reward, gold_reward=gold, length=gold + 1, clusters=np.array([[4] * 3, [2] * 3]))
    found = best_of_n.expected(samples, 2, PER_PROMPT)
    chosen = (0 + 0 + 3) / 3, (1.5 + 1 + 2) / 3  # of the three pairs
    assert found.gold_reward == pytest.approx(np.repeat(chosen, 2))
    assert found.length == pytest.approx(np.repeat(chosen, 2) + 1)
    assert found.reward == pytest.approx([8 / 3, 8 / 3, 5, 5])
    assert found.clusters.tolist() == [4, 4, 2, 2]
    assert len(found.completion_ids) == 4


def test_large_numbers_do_not_overflow():
    """Fails when the numbers of subsets, which exceed float64, are computed themselves."""
    rewards = np.random.default_rng(0).normal(size=2048)
    found = best_of_n.weights(rewards, 256)
    assert found.sum() == pytest.approx(1.0, rel=1e-9)
    assert found[np.argsort(rewards)[-1]] == pytest.approx(256 / 2048, rel=1e-9)
