"""WARP, each of its stages left out, and its rivals, on configs/quickstart.py: a few changed settings each.

  python scripts/sweep.py --config=configs/sweep_baselines.py --out=runs/baselines --print       # the commands
  python scripts/sweep.py --config=configs/sweep_baselines.py --out=runs/baselines
  python scripts/best_of_n.py --workdir=runs/baselines/warp                                      # needs no training
  python scripts/compare.py runs/baselines/warp runs/baselines/*                                 # one row for each

docs/methods.md has the equation and source of each. Every workdir has a front (LITI from SFT), so the front of a
single run is WiSE-FT of that run. Expected result: not measured; configs/sweep_baselines_tiny.py runs all of them in
minutes, without meaning (docs/results/baselines_tiny.md).
"""

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from warp_jax.configs import quickstart

Add = Callable[[str, dict[str, Any]], None]


def get_config() -> ConfigDict:
    return quickstart.get_config()


def sweep(add: Add) -> None:
    add_baselines(add, quickstart.get_config())


def add_baselines(add: Add, config: ConfigDict) -> None:
    """Add the points for a config of WARP."""
    warp, steps = config.warp, sum(config.warp.steps_per_iteration)
    one_run = {"warp.num_iterations": 1, "warp.num_runs": 1}
    add("warp", {})

    # one stage of WARP left out
    add("no_ema", {"warp.ema_rate": 0.0})  # the anchor of a run stays at its start
    add("no_slerp", {"warp.num_runs": 1})
    add("no_liti", {"warp.liti_rate": 1.0})  # the next iteration starts from the merge

    # one run, its KL to SFT [P s4.1] or to its EMA, of I x T or, with the same compute as WARP, of I x M x T steps
    as_long = {**one_run, "warp.steps_per_iteration": (steps * warp.num_runs,)}
    for beta in (0.0, 0.01, 0.03, 0.1, 0.3):
        anchored = {"warp.ema_rate": 0.0, "rl.kl_coef": beta}
        add(f"sft_anchor_{beta:g}", {**one_run, **anchored, "warp.steps_per_iteration": (steps,)})
    add("sft_anchor_as_long", {**as_long, "warp.ema_rate": 0.0})
    add("wise_ft", {**one_run, "warp.steps_per_iteration": (steps,)})
    add("one_run_as_long", as_long)
    batch = {"rl.batch_size": config.rl.batch_size * warp.num_runs}
    add("one_run_batch_as_large", {**one_run, **batch, "warp.steps_per_iteration": (steps,)})

    # other anchors
    length = warp.steps_per_iteration[0]
    every = max(min(10, length // 3), 1)  # a shorter run moves its anchor too
    add(f"ema_every_{every}", {"warp.anchor_every": every, "warp.ema_rate": min(every * warp.ema_rate, 1.0)})
    add("reset_anchor", {"warp.anchor_every": max(length // 4, 1), "warp.ema_rate": 1.0})
    add("bema", {"warp.anchor": "bema"})

    # other merges. At 90 degrees, SLERP is LERP times 1 / cos(45 degrees)
    add("lerp", {"warp.merge": "lerp"})
    reach = {
        "front.etas": tuple(round(1.41 * eta, 4) for eta in config.front.etas),
        "warp.liti_rate": round(1.41 * warp.liti_rate, 4),
    }
    add("lerp_as_far", {"warp.merge": "lerp", **reach})
    add("slerp_full_weights", {"warp.merge": "slerp_full_weights"})
    three = {"warp.num_runs": 3}  # of two runs, the Karcher mean is SLERP
    add("slerp_of_three", three)
    add("karcher_of_three", {**three, "warp.merge": "karcher"})

    # other updates of a run
    add("kl_per_token", {"rl.kl_in": "token_reward"})
    grpo = {"rl.advantage": "group_norm", "rl.kl_in": "loss", "rl.kl_estimator": "k3", "rl.updates_per_rollout": 2}
    add("grpo", {**one_run, **grpo, "warp.ema_rate": 0.0, "warp.steps_per_iteration": (steps,)})
