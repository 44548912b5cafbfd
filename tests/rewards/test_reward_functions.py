"""Rewards of every kind are one thing."""

import numpy as np
import pytest

from warp_jax.data.tokenizer import Tokenizer
from warp_jax.rewards import reward_functions, text_reward, tfidf
from warp_jax.types import Rollout


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["good film bad film"] * 9, 280)


def _rollout(tokenizer, prompts, completions):
    def pad(texts):
        rows = tokenizer.encode(texts)
        ids = np.zeros((len(rows), 12), np.int32)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
        return ids, np.arange(12) < np.array([len(row) for row in rows])[:, None]

    prompt_ids, prompt_mask = pad(prompts)
    ids, mask = pad(completions)
    numbers = np.array([1, 0], np.int32)
    return Rollout(prompt_ids, prompt_mask, numbers, ids, mask, np.zeros(ids.shape, np.float32))


def test_text_reward_sees_prompt_completion_and_row(tokenizer):
    """Fails when texts are swapped, padding is decoded, or rows are taken by position instead of example id."""
    seen = []

    def function(prompts, completions, rows):
        seen.extend(zip(prompts, completions, rows, strict=True))
        return [1.5, -2.0]

    part = reward_functions.make_from_text(function, tokenizer, [{"answer": "zero"}, {"answer": "one"}])
    values = part(_rollout(tokenizer, ["good ", "bad "], ["film", "film film"]))
    assert values.tolist() == [1.5, -2.0]
    assert seen == [("good ", "film", {"answer": "one"}), ("bad ", "film film", {"answer": "zero"})]


def test_wrong_number_of_values_is_refused(tokenizer, monkeypatch):
    """Fails when a scalar would be broadcast over the batch."""
    monkeypatch.setattr(tfidf, "one_for_all", lambda *texts: 1.0, raising=False)
    part = reward_functions.make_from_text(
        text_reward.load_function("warp_jax.rewards.tfidf:one_for_all"), tokenizer, [{}, {}]
    )
    with pytest.raises(ValueError, match="shape"):
        part(_rollout(tokenizer, ["a", "b"], ["c", "d"]))


def test_weighted_sum_with_length_penalty(tokenizer):
    """Fails when a weight is dropped, parts are weighted in the log, or length counts padding."""
    rollout = _rollout(tokenizer, ["good", "bad"], ["film", "good bad film"])
    lengths = rollout.completion_mask.sum(1)
    parts = {"constant": lambda _: np.array([2.0, 3.0], np.float32), "length": reward_functions.length}
    found = reward_functions.weighted_sum({"constant": 0.2, "length": -0.0005}, parts)(rollout)
    assert found.total.tolist() == pytest.approx([0.4 - 0.0005 * lengths[0], 0.6 - 0.0005 * lengths[1]])
    assert found.parts["constant"].tolist() == [2.0, 3.0]
    assert lengths[0] < lengths[1]


def test_score_is_read_at_the_last_real_token():
    """Fails when it is read at the last position, or padding before the prompt shifts it."""

    def apply_fn(params, token_ids, mask):
        return params * token_ids, None

    ids = np.array([[0, 4, 5, 0], [6, 7, 8, 9]], np.int32)
    mask = np.array([[False, True, True, False], [True, True, True, True]])
    assert reward_functions.sequence_scores(apply_fn, 1, ids, mask).tolist() == [5, 9]


@pytest.mark.parametrize("source", ["nosuch.module:f", "math:nosuch", "math:pi", "plain"])
def test_unknown_functions_are_refused(source):
    """Fails when a typo in the config surfaces only after SFT."""
    with pytest.raises(ValueError, match="rewards"):
        text_reward.load_function(source)


def test_gold_reward_ranks_and_survives_disk(tmp_path):
    """Fails when terms and weights are stored in different orders, or idf is lost."""
    texts = ["a good fine film", "good acting and fine music", "a bad dull film", "dull story and bad acting"] * 10
    fitted = tfidf.fit(texts, [1, 1, 0, 0] * 10, 100)
    assert tfidf.auc(fitted, ["good film", "bad film"], [1, 0]) == 1.0
    tfidf.save(fitted, tmp_path / "gold.json")
    again = tfidf.load(tmp_path / "gold.json")
    assert again.score(["a "], ["fine story"]) == pytest.approx(fitted.score(["a "], ["fine story"]))
    assert fitted.score(["good film "], [""])[0] > 0.1 > fitted.score(["dull film "], [""])[0]
