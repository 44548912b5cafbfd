"""Best-of-N: the completion with the highest reward among N samples of a policy, measured from K >= N of its samples.

The baseline of BOND (arXiv 2407.14622): no training, but N samples per answer. Among equal rewards, chance decides.
Axis letters: G prompts, K samples of one prompt.
"""

import math
from collections.abc import Callable

import numpy as np
from scipy import special

from warp_jax.evaluation import measure
from warp_jax.evaluation.measure import Evaluation


def weights(rewards: np.ndarray, n: int) -> np.ndarray:
    """Probability of each of K samples to be the best of n of them: [K].

    Over all C(K, n) subsets, so that a mean with these weights is an unbiased estimate for best-of-n. Each of the
    samples with reward r has (C(k, n) - C(j, n)) / C(K, n) / (k - j), if k rewards are at most r and j are below it.
    """
    ordered = np.sort(rewards)
    below, up_to = (np.searchsorted(ordered, rewards, side) for side in ("left", "right"))
    share_of = _share_of_subsets(len(rewards), n)
    return (share_of[up_to] - share_of[below]) / (up_to - below)


def _share_of_subsets(count: int, n: int) -> np.ndarray:
    """C(k, n) / C(count, n) for k = 0 .. count, by factors: the numbers themselves overflow."""
    larger = np.arange(n, count)
    shares = np.append(np.cumprod((larger[::-1] + 1 - n) / (larger[::-1] + 1))[::-1], 1.0)
    return np.concatenate([np.zeros(n), shares])


def kl(rewards: np.ndarray, n: int) -> float:
    """KL of best-of-n to the policy of one prompt, in nats, with the distribution F of rewards of its K samples.

    Best-of-n has the highest reward r with probability F(r)^n - F(r-)^n, the policy has it with F(r) - F(r-), and both
    choose alike among completions of equal reward. So the ratio of their probabilities depends on the reward only.

    Of continuous rewards, F in steps of 1 / K makes the KL too small, by less than (n / K)^2. Of rewards with few
    values, the bias falls as 1 / K and has either sign (docs/evaluation.md has figures).
    """
    counts = np.unique(rewards, return_counts=True)[1]
    up_to = counts.cumsum()
    chosen = (up_to / len(rewards)) ** n - ((up_to - counts) / len(rewards)) ** n
    return float(special.xlogy(chosen, chosen / (counts / len(rewards))).sum())


def kl_bound(n: int) -> float:
    """Upper bound of the KL of best-of-n, nats (Beirami et al., arXiv 2401.01879); reached if no rewards are equal."""
    return math.log(n) - (n - 1) / n


def draw(
    examiner: measure.Examiner, samples_per_prompt: int, wanted: int, on_round: Callable[[int, int], None]
) -> Evaluation:
    """Evaluate SFT, with other random keys each time, until each prompt has `wanted` = K completions.

    Each of the examiner's prompts stands there samples_per_prompt times in a row. The arrays of numbers of the result
    are [G, K]. on_round: called after each evaluation with their number so far, and in all.
    """
    rounds, found = -(-wanted // samples_per_prompt), []
    for number in range(rounds):
        seed = int(np.random.SeedSequence([examiner.seed, number]).generate_state(1)[0])
        found.append(measure.evaluate(examiner._replace(seed=seed), examiner.sft_params))
        on_round(number + 1, rounds)

    def joined(name: str) -> np.ndarray:
        arrays = [getattr(evaluation, name).reshape(-1, samples_per_prompt) for evaluation in found]
        return np.concatenate(arrays, axis=1)[:, :wanted]

    names = ("reward", "gold_reward", "length", "sft_kl", "clusters")
    return found[0]._replace(**{name: joined(name) for name in names})


def expected(samples: Evaluation, n: int, samples_per_prompt: int) -> Evaluation:
    """The expected evaluation of best-of-n, from the result of `draw`. It has no completions.

    Its rows are those of an evaluation of SFT, each prompt samples_per_prompt times, so that both can be compared.
    """
    chances = np.stack([weights(rewards, n) for rewards in samples.reward])
    kls = np.array([kl(rewards, n) for rewards in samples.reward])

    def repeated(values: np.ndarray) -> np.ndarray:
        return np.repeat(values, samples_per_prompt)

    rows = len(kls) * samples_per_prompt
    means = {name: (chances * getattr(samples, name)).sum(1) for name in ("reward", "gold_reward", "length")}
    return Evaluation(
        **{name: repeated(values) for name, values in means.items()},
        sft_kl=repeated(kls),
        distinct_2=np.array(np.nan),
        completion_ids=np.zeros((rows, 0), np.int32),
        completion_mask=np.zeros((rows, 0), bool),
        clusters=repeated(samples.clusters[:, 0]),
    )
