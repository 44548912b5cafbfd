"""Which completions best-of-N is chosen from, and what is measured of them."""

import types

import numpy as np
import pytest

from scripts import best_of_n
from warp_jax.evaluation.measure import Evaluation

PROMPTS, PER_PROMPT = 3, 2


def _samples(reward, **columns):
    """An evaluation of samples [G, K]."""
    fields = dict.fromkeys(("gold_reward", "sft_kl", "length", "clusters"), reward) | columns
    return Evaluation(reward=reward, distinct_2=None, completion_ids=None, completion_mask=None, **fields)


def test_samples_stay_with_their_prompt(monkeypatch):
    """Fails when completions of other prompts are mixed, two evaluations have the same noise, or more are kept."""
    seeds = []

    def evaluate(examiner, params):
        seeds.append(examiner.seed)
        assert params == "sft"
        return _samples(np.repeat(np.arange(PROMPTS), PER_PROMPT) * 100 + np.tile([0, 1], PROMPTS) + 10 * len(seeds))

    monkeypatch.setattr(best_of_n, "measure", types.SimpleNamespace(evaluate=evaluate))

    class Examiner(types.SimpleNamespace):
        def _replace(self, seed):
            return Examiner(seed=seed, sft_params=self.sft_params)

    found = best_of_n.draw(Examiner(seed=3, sft_params="sft"), PER_PROMPT, 5)
    assert found.reward.tolist() == [[100 * g + k for k in (10, 11, 20, 21, 30)] for g in range(PROMPTS)]
    assert len(set(seeds)) == 3


def test_the_reward_chooses_and_all_is_measured_of_the_chosen():
    """Fails when gold or length is that of another completion, gold chooses, or rows are not those of SFT."""
    reward = np.array([[1.0, 3.0, 2.0], [5.0, 5.0, 4.0]])
    gold = np.array([[9.0, 0.0, 3.0], [1.0, 2.0, 6.0]])
    samples = _samples(reward, gold_reward=gold, length=gold + 1, clusters=np.array([[4] * 3, [2] * 3]))
    found = best_of_n.best_of(samples, 2, PER_PROMPT)
    chosen = (0 + 0 + 3) / 3, (1.5 + 1 + 2) / 3  # of the three pairs
    assert found.gold_reward == pytest.approx(np.repeat(chosen, 2))
    assert found.length == pytest.approx(np.repeat(chosen, 2) + 1)
    assert found.reward == pytest.approx([8 / 3, 8 / 3, 5, 5])
    assert found.clusters.tolist() == [4, 4, 2, 2]
    assert len(found.completion_ids) == 4
