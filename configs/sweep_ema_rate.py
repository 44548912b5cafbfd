"""A sweep over mu, the rate of the EMA anchor, on the quickstart: frozen at init (0), slow, the paper's 0.01 and fast.

python scripts/sweep.py --config=configs/sweep_ema_rate.py --out=runs/sweep_ema_rate

Four times the quickstart, one after another: each makes the same SFT policy and reward model in a workdir of its own.
After the 300 steps of a run, init still has the weight (1 - mu)^300 in the anchor: 1, 0.41, 0.05 and 0.0001. Expect
(not measured yet) the runs' reward and KL to SFT to rise with mu, as the penalty lets go of init; compare the fronts at
equal KL. The paper has the rates 0.01 and 0.005 [P Fig. 15]: the slower anchor climbs slower, to a marginally better
front.
"""

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from configs import quickstart


def get_config() -> ConfigDict:
    return quickstart.get_config()


def sweep(add: Callable[[str, dict[str, Any]], None]) -> None:
    for ema_rate in (0.0, 0.003, 0.01, 0.03):
        add(f"ema_rate_{ema_rate:g}", {"warp.ema_rate": ema_rate})
