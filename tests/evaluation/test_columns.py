"""The columns of front.csv that come from saved completions: pass@k, similarity, gold gap, loss of held-out texts."""

import itertools
import math

import numpy as np
import pytest

from tests.settings_of import settings_of
from warp_jax.evaluation import columns
from warp_jax.evaluation.measure import Evaluation
from warp_jax.evaluation.points import Point

CLUSTERS = np.array([4, 4, 4, 4, 1, 1, 1])  # a prompt with 4 completions, and one with 3
PASSED = np.array([True, False, False, True, False, True, False])


def _evaluation(rows, clusters, **values):
    """An evaluation of completions, given as lists of tokens."""
    width = max(map(len, rows))
    ids = np.array([[*row, *[0] * (width - len(row))] for row in rows], np.int32)
    mask = np.arange(width) < np.array([len(row) for row in rows])[:, None]
    flat = np.zeros(len(rows), np.float32)
    fields = {"reward": flat, "gold_reward": flat, "sft_kl": flat, "length": mask.sum(1), "distinct_2": np.array(0.5)}
    fields |= {"completion_ids": ids, "completion_mask": mask, "clusters": np.array(clusters)}
    return Evaluation(**fields | values)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_pass_at_k_is_that_of_all_subsets(k):
    """Fails when 1 - (1 - c/n)^k is taken, c and n - c are swapped, or prompts count alike whatever their number."""
    shares = {}
    for cluster in (4, 1):
        subsets = list(itertools.combinations(PASSED[cluster == CLUSTERS], k))
        shares[cluster] = sum(map(any, subsets)) / len(subsets)
    value, error = columns.pass_at_k(PASSED, CLUSTERS, k)
    assert value == pytest.approx((4 * shares[4] + 3 * shares[1]) / 7)
    assert error == pytest.approx(math.sqrt(2 * 2) * 4 * abs(shares[4] - value) / 7)  # deviations of 2 clusters: d, -d


def test_pass_at_k_is_unbiased():
    """Fails when the estimator has another expectation than 1 - (1 - p)^k, over all outcomes of 5 completions."""
    p, n, k = 0.3, 5, 3
    expected = sum(
        math.prod(p if right else 1 - p for right in outcome)
        * columns.pass_at_k(np.array(outcome), np.zeros(n, int), k)[0]
        for outcome in itertools.product((False, True), repeat=n)
    )
    assert expected == pytest.approx(1 - (1 - p) ** k)


def test_similarity_by_hand():
    """Fails when padding or pairs of other prompts count, a repeated token counts once, or a pair is left out."""
    rows = [[5, 5, 6], [5, 5, 5, 7], [6], [8, 9], [8]]
    value, error = columns.similarity(_evaluation(rows, [3, 3, 3, 0, 0]))
    first = (4 / 7 + 2 / 4 + 0) / 3
    second = 2 / 3
    assert value == pytest.approx((3 * first + 2 * second) / 5)
    assert error == pytest.approx(math.sqrt(2 * 2) * 3 * abs(first - value) / 5)


def test_the_gold_gap_is_the_gain_in_gold_minus_the_gain_in_reward():
    """Fails when the sign turns, a gain has the other's standard deviation, or the policy's own is taken."""
    rows = [[1], [1]]
    sft = _evaluation(rows, [0, 1], reward=np.array([1.0, 3.0]), gold_reward=np.array([0.0, 10.0]))
    policy = _evaluation(rows, [0, 1], reward=np.array([4.0, 3.5]), gold_reward=np.array([2.0, 11.0]))
    spreads = math.sqrt(2), math.sqrt(50)
    want = [2 / spreads[1] - 3 / spreads[0], 1 / spreads[1] - 0.5 / spreads[0]]
    assert columns.gold_gap(policy, sft) == pytest.approx(want)
    assert columns.gold_gap(sft, sft).tolist() == [0, 0]
    flat = _evaluation(3 * [[1]], [0, 1, 2], reward=np.full(3, 0.1), gold_reward=np.arange(3.0))
    assert np.isnan(columns.gold_gap(flat, flat)).all()


def _row(evaluation, **changes):
    settings = settings_of({"evaluation.num_prompts": 16, **{f"evaluation.{k}": v for k, v in changes.items()}})
    return columns.as_rows([Point("sft", 0, 0, 0.0, 0, evaluation)], settings.evaluation)[0]


def test_the_loss_of_texts_counts_tokens_alike():
    """Fails when texts count alike whatever their length, or the error is that of the texts' own means."""
    texts = {"text_nats": np.array([6.0, 2.0, 13.0]), "text_tokens": np.array([3, 2, 5])}
    row = _row(_evaluation([[1], [2]], [0, 1], **texts))
    assert row["text_loss"] == pytest.approx(2.1)
    residuals = np.array([6 - 6.3, 2 - 4.2, 13 - 10.5])
    assert row["text_loss_se"] == pytest.approx(math.sqrt(3 / 2 * (residuals**2).sum()) / 10)


def test_measures_that_are_off_have_no_column():
    """Fails when similarity or pass@k of single completions, or the loss of no text, is a column; or distinct_3 is
    distinct_2."""
    row = _row(_evaluation([[1, 2, 1, 2, 1], [3, 1]], [0, 1]))
    assert not [name for name in row if name.startswith(("similarity", "pass", "text"))]
    assert (row["distinct_1"], row["distinct_3"]) == pytest.approx((3 / 7, 2 / 3))


def test_gold_decides_what_passes_if_there_is_one():
    """Fails when the reward decides although there is a gold reward, or a completion at the threshold fails."""
    rows, clusters = [[1, 2], [1, 3], [2], [3]], [0, 0, 1, 1]
    evaluation = _evaluation(rows, clusters, reward=np.array([0.0, 1.0, 1.0, 1.0]))
    changes = {"samples_per_prompt": 2, "pass_threshold": 0.5}
    gold = _row(evaluation._replace(gold_reward=np.array([0.5, 0.0, 0.0, 0.0])), **changes)
    assert (gold["pass_at_1"], gold["pass_at_2"]) == (0.25, 0.5)
    reward = _row(evaluation._replace(gold_reward=np.full(4, np.nan)), **changes)
    assert (reward["pass_at_1"], reward["pass_at_2"]) == (0.75, 1.0)
    assert math.isnan(reward["gold_gap"])
    assert reward["similarity"] == pytest.approx((0.5 + 0) / 2)
