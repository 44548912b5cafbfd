"""Model cards: front matter that the Hub reads, and the numbers and commands of the job."""

import pytest
import yaml

from configs import pretrained
from tests.settings_of import settings_of, typed
from warp_jax.evaluation import model_card, points

REPORT = {
    "stage": "liti:0.3",
    "dtype": "bfloat16",
    "warnings": ["bfloat16: rounding delivers 71%; use --dtype=float32"],
    "delivered": {"share": 0.71, "relative_error": 0.4},
    "compared": {
        "completions": 64,
        "reward": {"exported": 1.25, "stage": 1.5},
        "sft_kl": {"exported": 2.25, "stage": 2.5},
    },
}
MEASURED = {
    "this model": {"reward": 0.75, "reward_se": 0.01, "gold_reward": 0.5, "gold_reward_se": 0.02, "sft_kl": 3.5}
    | {"sft_kl_se": 0.125},
    "SFT": {"reward": 0.25, "reward_se": 0.01, "gold_reward": 0.125, "gold_reward_se": 0.02, "sft_kl": 0.0}
    | {"sft_kl_se": 0.0},
}
SOURCE = "hf://org/base-model@" + "a" * 40


def _make(source=SOURCE, measured=MEASURED, sft_steps=0, chosen=None, **changes):
    config = pretrained.get_config()
    config.update_from_flattened_dict(chosen or {})
    config.model.source, config.sft.num_steps = source, sft_steps
    settings = typed(config)
    return model_card.make(settings, REPORT | changes, measured=measured, commands=("python train", "python export"))


def _front_matter(card):
    start, matter, _ = card.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(matter)


def test_the_front_matter_is_what_the_hub_reads():
    """Fails when the YAML is broken, names a revision or a local folder as the base model, or chooses a licence."""
    found = _front_matter(_make())
    assert found["base_model"] == "org/base-model"
    assert found["library_name"] == "transformers"
    assert found["pipeline_tag"] == "text-generation"
    assert "warp" in found["tags"]
    assert "license" not in found
    assert "base_model" not in _front_matter(_make("models/mine"))
    assert _front_matter(_make(stage="reward_model"))["pipeline_tag"] == "text-classification"


def test_an_adapter_is_one_of_peft_and_says_what_it_lacks():
    """Fails when the card names transformers, or the base model of SFT as that of the adapter, or no loss."""
    lost = {"total": 0.0512, "largest": 0.1, "of": "layers/0/mlp/up/kernel"}
    card = _make(cut=lost, delivered={})
    assert _front_matter(card)["library_name"] == "peft"
    assert _front_matter(card)["base_model"] == "org/base-model"
    assert "base_model" not in _front_matter(_make(cut=lost, delivered={}, sft_steps=5))
    assert "lacks 0.0512 of the change from SFT" in card


def test_the_card_states_what_was_done_and_measured():
    """Fails when a measure, eta, the commands, the commit of the base model or the loss of rounding is left out."""
    card = _make()
    for text in (
        "| reward | 0.7500 +- 0.0100 | 0.2500 +- 0.0100 |",
        "| gold reward | 0.5000 +- 0.0200 | 0.1250 +- 0.0200 |",
        "| KL to SFT, nats per completion | 3.5000 +- 0.1250 | 0.0000 +- 0.0000 |",
        "with eta = 0.3.",
        f"`{SOURCE}`",
        "merge `slerp` by layer",
        "these weights are bfloat16. They keep the share 0.71 of the change from SFT, with a relative error of 0.4.",
        "Warning: bfloat16: rounding delivers 71%",
        "on 64 completions: reward 1.2500 (before rounding 1.5000)",
        "```sh\npython train\npython export\n```",
    ):
        assert text in card
    assert "(eta = 1)" in _make(stage="iteration_1/merged")
    assert "(eta = 1)" not in _make(stage="sft")


def test_the_card_names_what_differs_from_the_method_of_the_paper():
    """Fails when a setting of LoRA, sampling, RL or the anchor is left out, or a default or an unread rate is named."""
    chosen = {"model.lora.rank": 4, "sampling.top_p": 0.8, "rl.updates_per_rollout": 2, "evaluation.temperature": 0.7}
    card = _make(chosen=chosen | {"warp.anchor": "bema", "warp.bema.lag": 5.0, "warp.runs": ({"seed": 7}, {})})
    others = "`model.lora.rank = 4`, `sampling.top_p = 0.8`, `rl.updates_per_rollout = 2`"
    assert f"Other settings: {others}, `warp.runs = ({{'seed': 7}}, {{}})`, `warp.bema.lag = 5.0`." in card
    assert "to an anchor (bema)" in card
    assert "on held-out prompts, at temperature 0.7:" in card
    assert "Other settings" not in _make()


def test_what_was_not_measured_is_not_stated():
    """Fails when a missing gold reward or evaluation, or the rounding of SFT itself, is shown as a number."""
    measured = {name: {**row, "gold_reward": float("nan")} for name, row in MEASURED.items()}
    assert "| gold reward | - | - |" in _make(measured=measured)
    card = _make(measured={"SFT": MEASURED["SFT"]})
    assert "no evaluation of this stage" in card
    assert "0.2500" not in card
    assert "They keep" not in _make(stage="sft", delivered={"share": None, "relative_error": None})


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        ("sft", "sft"),
        ("reward_model", ""),
        ("liti:0.3", "liti_i2_e0.3"),
        ("liti:0", "sft"),
        ("liti:1.0", "merged_i2"),
        ("iteration_1/merged", "merged_i1"),
        ("iteration_1/run_2", "policy_i1_r2_s77"),
        ("iteration_1/run_2/step_4", "policy_i1_r2_s4"),
        ("iteration_2/run_1/anchor", "anchor_i2_r1_e1"),
        ("iteration_2/run_1/average", "average_i2_r1_e1"),
    ],
)
def test_each_stage_has_the_evaluation_of_its_own_policy(stage, name):
    """Fails when a card shows the numbers of another policy."""
    assert points.name_of_stage(settings_of(), stage, lambda iteration, run: 77) == name
