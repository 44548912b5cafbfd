"""The points of the paper's figures that one run of configs/quickstart.py does not give; docs/paper_map.md lists them.

  python scripts/sweep.py --config=configs/sweep_figures.py --out=runs/figures --only=runs_1,runs_2,runs_3   # Figure 4b

Expected result: not measured.
"""

from ml_collections import ConfigDict

from warp_jax.configs import length_penalty_pair, quickstart
from warp_jax.configs.sweep_baselines import Add


def get_config() -> ConfigDict:
    return quickstart.get_config()


def sweep(add: Add) -> None:
    config = get_config()
    warp, steps = config.warp, config.warp.steps_per_iteration[0]
    once = {"warp.num_iterations": 1, "warp.steps_per_iteration": (steps,)}

    for share in (3, 5, 7, 9):  # of 9, as the paper's T of 3k, 5k, 7k and 9k [P Fig. 3c, 4a]
        add(f"steps_{share}_of_9", {**once, "warp.steps_per_iteration": (steps * share // 9,)})
    for number in range(1, 6):
        add(f"runs_{number}", {**once, "warp.num_runs": number})  # [P Fig. 4b, 9, 10a]
    lengths = tuple(steps * share // 9 for share in (9, 7, 7, 5, 5))
    add("iterations_5", {"warp.num_iterations": 5, "warp.steps_per_iteration": lengths})  # [P Fig. 1b, 4c, 12]

    kept = tuple(steps * share // 9 for share in (6, 7, 8, 9))
    add("averages_of_one_run", {**once, "warp.num_runs": 1, "keep.steps": kept})  # [P Fig. 13]
    add("ema_as_policy", {**once, "keep.anchor": True})  # [P Fig. 14]
    add("ema_rate_half", {**once, "warp.ema_rate": warp.ema_rate / 2})  # [P Fig. 15], and steps_9_of_9
    add("kl_coef_twice", {**once, "rl.kl_coef": 2 * config.rl.kl_coef})
    for rate in (0.3, 0.5):
        add(f"liti_rate_{rate:g}", {"warp.liti_rate": rate})  # [P Fig. 16]
    pair = length_penalty_pair.get_config().warp.runs
    add("length_penalty_pair", {"warp.runs": tuple(dict(run) for run in pair)})  # [P Fig. 18]
    add("two_samples_per_prompt", {"evaluation.samples_per_prompt": 2})  # [P Fig. 19]
