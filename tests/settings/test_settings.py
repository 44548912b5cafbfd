"""Typed settings: what is accepted, what is refused in which words, and configs of earlier versions."""

import importlib
import json
import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from configs import default, pretrained, tiny
from tests.settings_of import settings_of, typed
from warp_jax import merging
from warp_jax.models.transformer import REMAT
from warp_jax.settings import check_devices, from_config, from_saved, groups, legacy
from warp_jax.training import objective, supervised

CONFIGS = sorted(path.stem for path in Path("configs").glob("*.py") if path.stem != "__init__")
NAN, INF = float("nan"), float("inf")


def _config(path, value, module=tiny):
    """A config as plain mappings, with a value that ml_collections itself might refuse."""
    config = module.get_config().to_dict()
    *parents, name = path.split(".")
    group = config
    for parent in parents:
        group = group[parent]
    group[name] = value
    return config


BAD = [  # path, value, what the message says
    ("front.etas", (0.1, NAN), "config.front.etas.1: got nan, want a finite number"),
    ("front.etas", ("x",), "config.front.etas.0: got 'x', want a valid number"),
    ("front.etas", (None,), "config.front.etas.0: got None"),
    ("front.etas", ((0.1,),), "config.front.etas.0: got (0.1,)"),
    ("front.etas", (1e999,), "config.front.etas.0: got inf"),
    ("front.etas", (1e308,), "config.front.etas.0: got 1e+308, want at most 100"),
    ("front.etas", (0.3, -0.1), "config.front.etas.1: got -0.1, want at least 0"),
    ("front.etas", (0.1, 0.3, 0.1), "want distinct numbers: 0.1 is given twice"),
    ("front.etas", (0.3, 0.3000000001), "want distinct numbers: 0.3 is given twice"),
    ("front.etas", (0.3, 1.0000001), "config.front.etas: got (0.3, 1.0000001), want 1.0 in place of 1.0000001"),
    ("front.etas", (0.0, -0.0), "want distinct numbers: 0 is given twice"),
    ("front.etas", (), "config.front.etas: got (), want at least 1 item"),
    ("front.etas", 0.3, "config.front.etas: got 0.3, want a valid tuple"),
    ("warp.steps_per_iteration", (6.5, 6), "config.warp.steps_per_iteration.0: got 6.5, want a valid integer"),
    ("warp.steps_per_iteration", ("6", "6"), "config.warp.steps_per_iteration.0: got '6'"),
    ("warp.steps_per_iteration", (None, 6), "config.warp.steps_per_iteration.0: got None"),
    ("warp.steps_per_iteration", (0, 6), "config.warp.steps_per_iteration.0: got 0, want at least 1"),
    ("warp.num_iterations", 3, "want warp.num_iterations = 3 numbers"),
    ("mesh", ("a", 1, 1), "config.mesh.0: got 'a', want a valid integer"),
    ("mesh", (1.0, 1, 1), "config.mesh.0: got 1.0, want a valid integer"),
    ("mesh", (1, 1), "config.mesh: got (1, 1), want three sizes"),
    ("mesh", (-1, -1, 1), "of which one may be -1"),
    ("mesh", (0, 1, 1), "want three sizes of at least 1"),
    ("seed", 10**23, "config.seed: got 100000000000000000000000, want less than 4294967296"),
    ("seed", -1, "config.seed: got -1, want at least 0"),
    ("seed", True, "config.seed: got True, want a valid integer"),
    ("rl.kl_coef", INF, "config.rl.kl_coef: got inf, want a finite number"),
    ("rl.kl_schedule", "cosine", "config.rl.kl_steps: got 0, want at least 1 for kl_schedule cosine"),
    ("rl.kl_schedule", "adaptive", "config.rl.kl_target: got 0.0, want more than 0 nats for kl_schedule adaptive"),
    ("rl.learning_rate_schedule", "linear", "config.rl.learning_rate_steps: got 0, want at least 1 for"),
    ("rl.kl_gain", 5.0, "config.rl.kl_gain: got 5.0, want less than 5"),
    ("rl.clip_low", 1.2, "config.rl.clip_low: got 1.2, want at most 1"),
    ("warp.anchor_every", 0, "config.warp.anchor_every: got 0, want at least 1"),
    ("warp.bema.lag", 0.5, "config.warp.bema.lag: got 0.5, want at least 1"),
    ("rl.kl_coef", -0.1, "config.rl.kl_coef: got -0.1, want at least 0"),
    ("rl.learning_rate", INF, "config.rl.learning_rate: got inf"),
    ("rl.learning_rate", 0.0, "config.rl.learning_rate: got 0.0, want greater than 0"),
    ("sft.learning_rate", 1e30, "config.sft.learning_rate: got 1e+30, want at most 100"),
    ("rl.batch_size", 2**40, "config.rl.batch_size: got 1099511627776, want at most 2147483647"),
    ("rl.whiten", 1, "config.rl.whiten: got 1, want a valid boolean"),
    ("rl.advantage", "mean", "want 'none', 'batch_mean', 'leave_one_out' or 'group_norm'"),
    ("rl.samples_per_prompt", 3, "config.rl.batch_size: got 8, want a multiple of samples_per_prompt = 3"),
    ("rl.samples_per_prompt", 1, "config.rl.samples_per_prompt: got 1, want at least 2 for advantage leave_one_out"),
    ("rl.importance_cap", 0.9, "config.rl.importance_cap: got 0.9, want 0 (off) or at least 1"),
    ("rl.importance_cap", 1e-30, "config.rl.importance_cap: got 1e-30, want 0"),
    ("sampling.temperature", INF, "config.sampling.temperature: got inf"),
    ("sampling.temperature", 1e-30, "config.sampling.temperature: got 1e-30, want at least 0.001"),
    ("sampling.top_k", 1, "config.sampling.top_k: got 1, want 0 (all tokens) or at least 2"),
    ("sampling.top_p", 0.0, "config.sampling.top_p: got 0.0, want greater than 0"),
    ("evaluation.temperature", 0.0, "config.evaluation.temperature: got 0.0, want at least 0.001"),
    ("sampling.prompt_tokens", 1, "config.sampling.prompt_tokens: got 1, want at least 2"),
    ("warp.ema_rate", 1.2, "config.warp.ema_rate: got 1.2, want at most 1"),
    ("warp.liti_rate", -0.1, "config.warp.liti_rate: got -0.1, want at least 0"),
    ("warp.num_runs", 0, "config.warp.num_runs: got 0, want at least 1"),
    ("warp.stop_at_kl", -1.0, "config.warp.stop_at_kl: got -1.0, want at least 0"),
    ("keep.steps", (4, 2), "config.keep.steps: got (4, 2), want rising numbers"),
    ("keep.steps", (2, 2), "config.keep.steps: got (2, 2), want rising numbers"),
    ("keep.steps", (2, 7), "config.keep.steps: got (2, 7), want at most 6"),
    ("warp.merge", "slrp", "config.warp.merge: got 'slrp', want 'slerp'"),
    ("adam.b1", 1.0, "config.adam.b1: got 1.0, want less than 1"),
    ("reward_model.batch_size", 7, "config.reward_model.batch_size: got 7, want a multiple of 2"),
    ("reward_model.trainable", "layers/", "config.reward_model.trainable: got 'layers/'"),
    ("model.trainable", "layers/(", "config.model.trainable: got 'layers/(', which is not a regular expression"),
    ("model.lora.rank", -1, "config.model.lora.rank: got -1, want at least 0"),
    ("model.lora.alpha", 0.0, "config.model.lora.alpha: got 0.0, want greater than 0"),
    ("model.lora.targets", "layers/(", "config.model.lora.targets: got 'layers/(', which is not a regular expression"),
    ("warp.runs", ({"model.lora.rank": 2}, {}), "config.warp.runs[0]: got 'model.lora.rank', want rewards"),
    ("model.architecture.rope_scaling.kind", "ntk", "config.model.architecture.rope_scaling.kind: got 'ntk'"),
    ("model.architecture.local_pattern", (0,), "config.model.architecture.local_pattern.0: got 0"),
    ("evaluation.num_prompts", 40, "config.evaluation.num_prompts: got 40 (times"),
    ("evaluation.pass_threshold", NAN, "config.evaluation.pass_threshold: got nan, want a finite number"),
    ("evaluation.text_tokens", 1, "config.evaluation.text_tokens: got 1, want at least 2"),
    ("data.gold_fraction", 0.6, "want less than 1: the rest is for evaluation"),
    ("data.source", None, "config.data.source: got None, want a valid string"),
    (
        "data.response_field",
        "answer",
        "config.data.response_field: got 'answer', want data.prompt_template (such as '{t",
    ),
    ("data.chosen_field", "a", "config.data.rejected_field: got '', want a field: a pair has"),
    ("data.rejected_field", "a", "config.data.chosen_field: got '', want a field"),
    ("data.chat", True, "config.data.chat: got True, want False"),
    ("sampling.stop_tokens", ("<end>",), "config.sampling.stop_tokens: got ('<end>',), want ()"),
    ("sampling.stop_tokens", "<end>", "config.sampling.stop_tokens: got '<end>', want a valid tuple"),
    ("sampling.stop_tokens", ("",), "config.sampling.stop_tokens.0: got ''"),
    ("data.label_field", "", "config.data.label_field: got ''"),
    ("tokenizer.vocab_size", 258, "config.tokenizer.vocab_size: got 258, want at least 259"),
    ("sft.num_steps", 0, "config.sft.num_steps: got 0, want at least 1"),
    ("model.source", "models/mine", "config.model.architecture and config.tokenizer would be ignored"),
    ("rewards", {}, "config.rewards: no part has a weight other than 0"),
    ("rewards", [1], "config.rewards: got [1]"),
    ("rewards.sentiment.weight", NAN, "config.rewards.sentiment.weight: got nan"),
    ("rl", 3, "config.rl: got 3, want a group of settings"),
    ("warp.ema_rat", 0.1, "config.warp.ema_rat: no such setting; did you mean ema_rate?"),
    ("modle", {}, "config.modle: no such setting; did you mean model?"),
    ("rewards.sentiment.timeout", 0.0, "config.rewards.sentiment.timeout: got 0.0, want greater than 0"),
    ("gold.timeout", INF, "config.gold.timeout: got inf"),
    ("rewards.sentiment.wieght", 1.0, "config.rewards.sentiment.wieght: no such setting; did you mean weight?"),
    ("model.architecture.widht", 8, "config.model.architecture.widht: no such setting; did you mean width?"),
    ("model.architecture.rope_scaling.factr", 8, "did you mean factor?"),
]


@pytest.mark.parametrize(("path", "value", "message"), BAD, ids=str)
def test_bad_values_are_refused_in_one_line(path, value, message):
    """Fails when the rule of this value is taken out, or its message loses the path, the value or what is wanted."""
    with pytest.raises(ValueError, match=r"^config") as error:
        from_config(_config(path, value))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_texts_fill_whole_batches():
    """Fails when rows that do not fill a batch are found out at the first evaluation, or count without a file."""
    changes = {"evaluation.batch_size": 24, "evaluation.num_prompts": 24}
    with pytest.raises(
        ValueError, match=r"config\.evaluation\.text_rows: got 256, want a multiple of .*batch_size = 24"
    ):
        settings_of({**changes, "evaluation.text": "held_out.jsonl"})
    assert settings_of(changes).evaluation.text_rows == 256


def test_a_merge_of_too_few_is_refused_before_they_are_trained():
    """Fails when model_stock of one run is found out at the merge."""
    with pytest.raises(ValueError, match=r"config\.warp\.num_runs: got 1, want at least 2 for warp\.merge model_stock"):
        settings_of({"warp.merge": "model_stock", "warp.num_runs": 1})


BAD_RUNS = [
    (({},), "config.warp.runs: got 1 entries, want warp.num_runs = 2 or none"),
    (({}, 3), "config.warp.runs.1: got 3, want a valid dictionary"),
    (
        ({"rewards.lenght.weight": -0.1}, {}),
        "config.warp.runs[0]: rewards.lenght: no such setting; did you mean length?",
    ),
    (({}, {"rl.kl_coeff": 0.1}), "config.warp.runs[1]: rl.kl_coeff: no such setting; did you mean kl_coef,"),
    (({}, {"rl.kl_coef": -1.0}), "config.warp.runs[1]: rl.kl_coef: got -1.0, want at least 0"),
    (({}, {"rl.importance_cap": 0.5}), "config.warp.runs[1]: rl.importance_cap: got 0.5, want 0 (off)"),
    (({}, {"rewards.sentiment.weight": 0.0}), "config.warp.runs[1]: rewards: no part has a weight other than 0"),
    (({"rl.batch_size": 16}, {}), "config.warp.runs[0]: got 'rl.batch_size', want rewards.NAME.weight, seed"),
    (({"warp.runs": ()}, {}), "config.warp.runs[0]: got 'warp.runs', want"),
    (({"sft.num_steps": 3}, {}), "runs share all others"),
    (({"rl.kl_coef.x": 3}, {}), "config.warp.runs[0]: rl.kl_coef: no such setting"),
]


@pytest.mark.parametrize(("runs", "message"), BAD_RUNS, ids=str)
def test_bad_settings_of_a_run_name_the_run(runs, message):
    """Fails when an entry is not validated as the config of its run, its number or its path is not named, or a setting
    that all runs share can differ.
    """
    with pytest.raises(ValueError, match=r"^config\.warp\.runs") as error:
        from_config(_config("warp.runs", runs))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_each_run_has_its_own_settings():
    """Fails when an entry reaches another run, is lost in config.json, or a reward that only a run uses is not made."""
    runs = ({"rewards.length.weight": -0.5, "seed": 7}, {"rl.kl_coef": 1, "warp.ema_rate": 0.5})
    settings = settings_of({"warp.runs": runs})
    settings = from_config(json.loads(json.dumps(settings.as_json())))
    first, second = settings.of_runs
    base = settings_of()
    assert first == base.replace(runs[0])
    assert second == base.replace(runs[1])
    assert list(settings.reward_parts) == ["sentiment"]
    assert list(settings.all_reward_parts) == ["length", "sentiment"]
    assert base.of_runs == (base, base)
    only = {"rewards.sentiment.weight": 0.0, "rewards.length.weight": 1.0}
    assert not settings_of(only).needs_reward_model
    assert settings_of({**only, "warp.runs": ({}, {"rewards.sentiment.weight": 2.0})}).needs_reward_model


UNREAD = [  # a setting, a value, and the choice with which it is read
    *(
        (f"{part}.learning_rate_{name}", value, {f"{part}.learning_rate_schedule": "linear"})
        for part in ("sft", "reward_model", "rl")
        for name, value in (("steps", 10), ("end", 0.5))
    ),
    ("model.lora.alpha", 32.0, {"model.lora.rank": 4}),
    ("model.lora.targets", "attention", {"model.lora.rank": 4}),
    ("rl.kl_steps", 10, {"rl.kl_schedule": "cosine"}),
    ("rl.kl_coef_end", 0.5, {"rl.kl_schedule": "linear"}),
    ("rl.kl_target", 2.0, {"rl.kl_schedule": "adaptive"}),
    ("rl.kl_gain", 0.5, {"rl.kl_schedule": "adaptive"}),
    ("rl.clip_ratio", "sequence", {"rl.updates_per_rollout": 2}),
    ("rl.clip_low", 0.1, {"rl.updates_per_rollout": 2}),
    ("rl.clip_high", 0.3, {"rl.updates_per_rollout": 2}),
    ("warp.bema.ema_power", 0.7, {"warp.anchor": "bema"}),
    ("warp.bema.bias_power", 0.7, {"warp.anchor": "bema"}),
    ("warp.bema.lag", 5.0, {"warp.anchor": "bema"}),
    ("evaluation.text_field", "body", {"evaluation.text": "held_out.jsonl"}),
    ("evaluation.text_rows", 16, {"evaluation.text": "held_out.jsonl"}),
    ("evaluation.text_tokens", 16, {"evaluation.text": "held_out.jsonl"}),
]
LENGTHS = {"linear": ("steps", 10), "cosine": ("steps", 10), "adaptive": ("target", 2.0)}  # what a schedule must have


def _with_length(choice):
    """The choice of a schedule with its length or target."""
    more = {}
    for path, kind in choice.items():
        if path.endswith("_schedule"):
            name, value = LENGTHS[kind]
            more[f"{path.removesuffix('schedule')}{name}"] = value
    return more | choice


@pytest.mark.parametrize(("path", "value", "choice"), UNREAD, ids=lambda item: str(item)[:40])
def test_a_setting_that_nothing_reads_is_refused(path, value, choice):
    """Fails when the rule of this setting is taken out, or holds where the setting is read."""
    other = next(iter(choice))
    with pytest.raises(
        ValueError,
        match=rf"^config\.{re.escape(path)}: got {value!r}, want .* the default: nothing reads it with {other} =",
    ):
        settings_of({path: value})
    changed = {**_with_length(choice), path: value}
    assert str(value) in str(settings_of(changed))
    if not path.startswith(("rl.", "warp.")):
        return
    settings = settings_of({path: value, "warp.runs": ({}, _with_length(choice) | {path: value})})  # one run reads it
    assert settings.of_runs[1] == settings_of(changed)
    with pytest.raises(ValueError, match=rf"^config\.warp\.runs\[0\]: {re.escape(path)}: got .* nothing reads it"):
        settings_of({"warp.runs": ({path: value}, {})})


def test_one_setting_chooses_another_anchor():
    """Fails when the rate of the EMA, which every config sets, must be put back for an anchor that does not read it."""
    assert settings_of({"warp.anchor": "bema", "warp.ema_rate": 0.2}).warp.anchor == "bema"


def test_an_older_workdir_may_have_settings_that_nothing_reads():
    """Fails when a workdir that an earlier version accepted cannot be read, or cannot be resumed with the defaults."""
    config = typed(tiny.get_config()).as_json()
    config["rl"] |= {"kl_steps": 7, "clip_low": 0.1}
    config["warp"] |= {"runs": [{"rl.kl_gain": 0.5, "seed": 3}, {"warp.anchor": "bema"}]}
    with pytest.raises(ValueError, match="nothing reads it"):
        from_config(config)
    assert from_saved(config) == settings_of({"warp.runs": ({"seed": 3}, {"warp.anchor": "bema"})})


PAIRS = {"data.chosen_field": "good", "data.rejected_field": "bad", "data.prompt_template": "{text}"}
RESPONSES = {"data.response_field": "answer", "data.prompt_template": "{text}"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (PAIRS, "config.reward_model.loss: got 'label', want 'bradley_terry' for data.chosen_field"),
        ({**PAIRS, "data.rejected_field": "good"}, "config.data.rejected_field: got 'good', want another field than"),
        ({**PAIRS, "data.prompt_template": ""}, "config.data.chosen_field: got 'good', want data.prompt_template"),
        (
            {"data.chat": True, "data.response_field": "text"},
            "config.data.response_field: got 'text', want another field than data.text_field, the prompt",
        ),
        ({**RESPONSES, "data.label_field": ""}, "config.data.label_field: got ''"),
    ],
)
def test_responses_that_cannot_be_learned_are_refused(changes, message):
    """Fails when the rule is taken out, or a reward model of labels or tfidf does without labels."""
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        settings_of(changes)


def test_what_learns_from_responses():
    """Fails when labels are needed for pairs, or a training that is off, or learns from texts, has response fields."""
    both = {**PAIRS, **RESPONSES, "data.label_field": "", "gold.source": "", "reward_model.loss": "bradley_terry"}
    settings = settings_of(both)
    assert settings.response_fields == {"sft": ("answer",), "reward_model": ("good", "bad")}
    assert not settings.learns_from_texts
    assert settings.learned_splits == ("reward", "gold", "eval")
    off = {"rewards.sentiment.weight": 0.0, "rewards.length.weight": 1.0}
    assert settings.replace(off).response_fields == {"sft": ("answer",)}
    assert settings_of({**RESPONSES, "data.response_field": ""}).response_fields == {}
    assert settings_of(RESPONSES).learns_from_texts  # reward model and tfidf


def test_options_in_the_source_replace_those_of_the_config_file():
    """Fails when --config.data.source=reasoning_gym:TASK?size=5 is refused because the config file has options."""
    config = tiny.get_config().to_dict()
    config["data"] |= {"source": "reasoning_gym:chain_sum?size=5", "task": {"min_terms": 3}}
    assert from_config(config).data.task == {"size": 5}
    with pytest.raises(ValueError, match="got a list, want groups of settings"):
        from_config([config])


def test_the_pattern_of_a_reward_model_matters_only_if_it_is_trained():
    """Fails when a setting that nothing uses makes an old workdir unreadable."""
    settings_of({"reward_model.trainable": "layers/", "rewards.length.weight": 1.0, "rewards.sentiment.weight": 0.0})


def test_a_missing_group_is_named():
    """Fails when a config file that forgot a group ends in a KeyError."""
    config = tiny.get_config().to_dict()
    del config["adam"]
    with pytest.raises(ValueError, match=r"config\.adam: missing"):
        from_config(config)
    with pytest.raises(ValueError, match=r"config\.model\.source: got '', want a model folder"):
        settings_of(module=pretrained)


def _holds(whole, part):
    """True if every setting of `part` is in `whole`, except those that are None.

    `whole` may also have defaults of settings that came later.
    """
    if isinstance(part, dict):
        return all(value is None or (name in whole and _holds(whole[name], value)) for name, value in part.items())
    return whole == part


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_file_is_accepted_and_kept(name):
    """Fails when a config file breaks a rule, or config.json does not hold all of it."""
    config = importlib.import_module(f"configs.{name}").get_config()
    if name == "pretrained":
        config.model.source = "models/mine"
    settings = typed(config)
    assert from_config(json.loads(json.dumps(settings.as_json()))) == settings
    assert _holds(settings.as_json(), legacy.upgrade(json.loads(config.to_json())))


def test_whole_numbers_are_accepted_for_decimal_ones():
    """Fails when --config.rl.kl_coef=1 is refused."""
    assert settings_of({"rl.kl_coef": 1}).rl.kl_coef == 1.0


def test_settings_cannot_be_changed():
    """Fails when a run could change the settings that the workdir was claimed with."""
    settings = typed(default.get_config())
    with pytest.raises(ValidationError, match="frozen"):
        settings.rl.kl_coef = 0.3


def test_a_ratio_of_lengths_is_above_one():
    """Fails when 0.5 is accepted: every run would exceed it."""
    with pytest.raises(
        ValueError, match=r"config\.health\.max_length_ratio: got 0\.5, want 0 \(no limit\) or more than 1"
    ):
        settings_of({"health.max_length_ratio": 0.5})
    assert settings_of({"health.max_length_ratio": 0.0}).health.max_length_ratio == 0


def test_choices_are_those_of_the_code():
    """Fails when a method, an advantage, a loss or a remat policy is added in one place only."""

    def choices(group, name):
        return set(group.model_fields[name].annotation.__args__)

    assert choices(groups.Warp, "merge") == set(merging.METHODS)
    assert choices(groups.Rl, "advantage") == set(objective.ADVANTAGES)
    assert choices(groups.RewardModel, "loss") == set(supervised.REWARD_LOSSES)
    assert choices(groups.Model, "remat") == set(REMAT)


def test_batches_are_multiples_of_the_devices():
    """Fails when a batch that the mesh cannot split is found out by the first step."""
    settings = settings_of()
    check_devices(settings, 8)
    with pytest.raises(ValueError, match=r"config\.evaluation\.batch_size: got 16, want a multiple of 32"):
        check_devices(settings.replace({"sft.batch_size": 32, "reward_model.batch_size": 32}), 32)
    with pytest.raises(ValueError, match=r"config\.rl\.batch_size: got 8, want a multiple of 16"):
        check_devices(settings.replace({"rl.num_microbatches": 2}), 8)
    with pytest.raises(ValueError, match=r"config\.sft\.batch_size: got 8, want a multiple of 16"):
        check_devices(settings.replace({"sft.num_microbatches": 2}), 8)


def test_an_old_config_is_brought_up_to_date():
    """Fails when a workdir made before the folders, or a config with a task in its source, is refused."""
    config = default.get_config().to_dict()
    del config["data"]["task"]
    query = "size=2000&seed=0&min_terms=2&ratio=0.5&b=true&word=007&operators=+,-"
    config["data"]["source"] = f"reasoning_gym:chain_sum?{query}"
    config["rewards"]["right"] = {"source": "warp_jax.reasoning:solved", "weight": 1.0}
    config["gold"]["source"] = "warp_jax.math_answers:score"
    settings = from_config(config)
    assert settings.data.source == "reasoning_gym:chain_sum"
    task = {"size": 2000, "seed": 0, "min_terms": 2, "ratio": 0.5, "b": True, "word": "007", "operators": ["+", "-"]}
    assert settings.data.task == task
    assert settings.rewards["right"].source == "warp_jax.data.reasoning_gym:solved"
    assert settings.gold.source == "warp_jax.rewards.math_answers:score"
    assert from_config(settings.as_json()) == settings
