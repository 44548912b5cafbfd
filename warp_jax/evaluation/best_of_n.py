"""Best-of-N: the completion with the highest reward among N samples of a policy, measured from K >= N of its samples.

The baseline of BOND (arXiv 2407.14622): no training, but N samples per answer. Among equal rewards, chance decides.
Axis letters: K samples of one prompt.
"""

import math

import numpy as np
from scipy import special


def weights(rewards: np.ndarray, n: int) -> np.ndarray:
    """Probability of each of K samples to be the best of n of them: [K].

    Over all C(K, n) subsets, so that a mean with these weights is an unbiased estimate for best-of-n. Each of the
    samples with reward r has (C(k, n) - C(j, n)) / C(K, n) / (k - j), if k rewards are at most r and j are below it.
    """
    ordered = np.sort(rewards)
    below, up_to = (np.searchsorted(ordered, rewards, side) for side in ("left", "right"))
    found = special.comb(up_to, n) - special.comb(below, n)
    return found / special.comb(len(rewards), n) / (up_to - below)


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
