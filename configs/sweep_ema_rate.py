"""A sweep over mu, the rate of the EMA anchor, on configs/quickstart.py: 0 (frozen), 0.003, 0.01 (the paper's), 0.03.

  python scripts/sweep.py --config=configs/sweep_ema_rate.py --out=runs/sweep_ema_rate

Run time: four times that of the quickstart, one point after another; each point trains the same SFT policy and reward
model in its own workdir. After the 300 steps of a run, the start of the run still has the weight (1 - mu)^300 in the
anchor: 1, 0.41, 0.05 and 0.0001. Expected (not measured yet): reward and KL to SFT of the runs rise with mu, because
the anchor moves away from the start; so compare the fronts at equal KL. The paper compares the rates 0.01 and 0.005
[P Fig. 15]: with the slower one, the reward rises more slowly, to a marginally better front.
"""

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from warp_jax.configs import quickstart


def get_config() -> ConfigDict:
    return quickstart.get_config()


def sweep(add: Callable[[str, dict[str, Any]], None]) -> None:
    for ema_rate in (0.0, 0.003, 0.01, 0.03):
        add(f"ema_rate_{ema_rate:g}", {"warp.ema_rate": ema_rate})
