"""A variant: of the two runs, one is trained with a length penalty and one without; they are merged [P Fig. 18].

  python -m warp_jax.main --config=configs/length_penalty_pair.py --workdir=runs/length_penalty_pair

Run time: as configs/quickstart.py, which has the same number of steps. Expected (not measured here): run 1 writes
shorter completions than run 2, and the merge lies between them; in the paper, it is shorter and its front is better.
"""

from ml_collections import ConfigDict

from warp_jax.configs import quickstart


def get_config() -> ConfigDict:
    config = quickstart.get_config()
    # reward units per token: -0.24 for the longest completion. The paper's -0.0005 is for about 300 tokens [P App. E]
    config.warp.runs = ({"rewards.length.weight": -0.01}, {})
    return config
