"""WARP on a model from outside, whole: a tiny chat model in a Hugging Face folder, trained in part, exported, asked."""

import csv
import json
import shutil

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from configs import (
    default,
    gemma3_270m,
    gemma_7b,
    pretrained,
    smollm2_135m,
    smollm2_135m_sft_anchor,
    smollm2_arithmetic,
    tiny,
)
from tests.commands import main_command, run, script_command
from tests.settings_of import typed
from tests.test_main import _leaves
from warp_jax import main, trees
from warp_jax.data import fields
from warp_jax.data.tokenizer import Tokenizer
from warp_jax.experiment import architecture, export, ingredients, jobs, preparation, stages
from warp_jax.models.apply import make_apply_fn
from warp_jax.parallel import meshes
from warp_jax.rewards import from_folder
from warp_jax.settings.groups import RewardPart

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QUESTIONS = [f"what is {a} and {b}?" for a in range(20) for b in range(10)]


@pytest.fixture(autouse=True)
def _strict_promotion():
    """Overrides the strict one of conftest.py: optax raises a float to an integer power."""


def _save(folder, architecture_name, tokenizer, **settings):
    torch.manual_seed(3)
    kind = getattr(transformers, architecture_name)
    config = kind.config_class(vocab_size=tokenizer.vocab_size, **SIZES, **settings)
    kind(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tokenizer.to_json())
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**names, "chat_template": TEMPLATE}))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A policy with a sliding window, a reward model, and conversations."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = Tokenizer.train([*QUESTIONS, "<user><assistant>"], 290)
    _save(root / "policy", "MistralForCausalLM", tokenizer, sliding_window=5)
    _save(root / "reward", "LlamaForSequenceClassification", tokenizer, num_labels=1)
    rows = [{"messages": [{"role": "user", "content": question}]} for question in QUESTIONS]
    (root / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def _config(models):
    config, small = pretrained.get_config(), tiny.get_config()
    for group in ("rl", "evaluation", "report", "warp"):
        config[group] = small[group]
    config.checkpoint_every = 4
    config.model.source = str(models / "policy")
    config.model.trainable = "layers/2/"
    config.data.source = str(models / "asked.jsonl")
    config.data.text_field = "messages"
    config.data.label_field = ""
    config.data.chat = True
    config.data.reward_fraction = config.data.gold_fraction = 0.01
    config.data.prompts_fraction = 0.5
    config.gold.source = ""
    with config.unlocked():
        del config.rewards.sentiment
        config.rewards.preference = {"source": str(models / "reward"), "weight": 1.0}
    config.sampling.prompt_tokens = 40
    config.sampling.max_new_tokens = 6
    config.mesh = (-1, 1, 1)
    return config


@pytest.fixture(scope="module")
def job(models, tmp_path_factory):
    """A finished workdir."""
    settings, workdir = typed(_config(models)), tmp_path_factory.mktemp("job") / "run"
    line = jobs.run_part(settings, main.check(settings, workdir), workdir)
    return settings, workdir, line


def test_only_the_trained_layer_is_stored_and_measured(job):
    """Fails when frozen weights have task vectors, angles, or a place in the checkpoints; or gold is invented."""
    _, workdir, line = job
    geometry = json.loads((workdir / "iteration_1" / "geometry.json").read_text())
    assert geometry["units"] == ["layers/2"]
    assert 0 < geometry["angles_degrees"][0][0][1] < 180
    assert "gold" not in line
    with (workdir / "front.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[-1]["sft_kl"]) > 0
    metadata = json.loads((workdir / "iteration_1" / "run_1" / "params" / "_METADATA").read_text())
    stored = {entry["key_metadata"][0]["key"] for entry in metadata["tree_metadata"].values()}
    assert stored == {"layers_from_2"}


def _transformers_logits(folder, ids):
    kind = transformers.AutoModelForCausalLM
    model, report = kind.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.numpy()


@pytest.mark.parametrize("stage", ["sft", "iteration_2/run_1", "iteration_1/merged", "liti:0.3"])
def test_every_stage_loads_in_transformers(job, models, tmp_path, monkeypatch, stage):
    """Fails when a stage exports other weights than its own, or without its tokenizer and chat template, or SFT is
    loaded twice.
    """
    _, workdir, _ = job
    load, loaded = architecture.start_params, []
    monkeypatch.setattr(architecture, "start_params", lambda *arguments: loaded.append(1) or load(*arguments))
    export.export_stage(workdir, stage, tmp_path / "out")
    assert len(loaded) == 1
    ids = np.array([[1, 5, 40, 77, 100, 6, 9, 200]])
    got = _transformers_logits(tmp_path / "out", ids)
    opened = stages.Workdir(workdir)
    params, model = opened.load(stage)
    want, _ = make_apply_fn(model)(params, ids.astype(np.int32), np.ones_like(ids, bool))
    assert np.abs(got - np.asarray(want)).max() < 1e-4 * np.abs(got).max()
    tokenizer = Tokenizer.from_folder(tmp_path / "out")
    assert tokenizer.chat_template == TEMPLATE
    source = _transformers_logits(models / "policy", ids)
    assert (np.abs(got - source).max() < 1e-6) == (stage == "sft")


def test_liti_lies_between_sft_and_the_last_merge(job):
    """Fails when eta is reversed, or the merge of another iteration is taken."""
    _, workdir, _ = job
    opened = stages.Workdir(workdir)
    sft, merged, mixed = (
        {trees.path_name(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(opened.load(s)[0])}
        for s in ("sft", "iteration_2/merged", "liti:0.2")
    )
    for name in sft:
        np.testing.assert_allclose(mixed[name], 0.8 * sft[name] + 0.2 * merged[name], atol=1e-6)
    assert np.abs(merged["layers_from_2/mlp/up/kernel"] - sft["layers_from_2/mlp/up/kernel"]).max() > 1e-4


def test_the_reward_is_that_of_transformers(models):
    """Fails when the completion is not the assistant's turn, or the score is read at another token."""
    reward = from_folder.load(models / "reward", meshes.make_mesh((-1, 1, 1)), "float32", lambda row: row["messages"])
    asked = [[{"role": "user", "content": text}] for text in QUESTIONS[:3]]
    answers = ["four", "", "what is 3"]
    got = reward(["ignored"] * 3, answers, [{"messages": messages} for messages in asked])
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(models / "reward")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(models / "reward")
    for value, messages, answer in zip(got, asked, answers, strict=True):
        whole = [*messages, {"role": "assistant", "content": answer}]
        ids = tokenizer.apply_chat_template(whole, return_tensors="pt", return_dict=False)
        with torch.no_grad():
            assert value == pytest.approx(model(ids).logits.item(), rel=1e-4, abs=1e-6)


def _run(script, *arguments):
    return run(script_command(script, *arguments))


@pytest.mark.parametrize("pad_id", [None, 2])
def test_padding_of_a_reward_model_is_what_its_config_says(models, tmp_path, pad_id):
    """Fails when the tokenizer's pad, here its end of text, is not counted as the last token of a conversation."""
    shutil.copytree(models / "reward", tmp_path / "reward")
    settings = json.loads((tmp_path / "reward" / "tokenizer_config.json").read_text())
    settings["pad_token"] = "<eos>"
    (tmp_path / "reward" / "tokenizer_config.json").write_text(json.dumps(settings))
    config = json.loads((tmp_path / "reward" / "config.json").read_text())
    (tmp_path / "reward" / "config.json").write_text(json.dumps({**config, "pad_token_id": pad_id}))
    reward = from_folder.load(tmp_path / "reward", meshes.make_mesh((-1, 1, 1)), "float32", lambda row: row["asked"])
    (got,) = reward(["-"], ["four"], [{"asked": "what is 3 and 4?"}])
    text = "<bos><user>what is 3 and 4?<eos><assistant>four<eos>"
    ids = Tokenizer.from_folder(tmp_path / "reward").encode_with_special([text])[0][None].astype(np.int64)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    with torch.no_grad():
        assert got == pytest.approx(model(torch.from_numpy(ids)).logits.item(), rel=1e-4)


def test_a_reward_model_reads_the_filled_template(models):
    """Fails when the policy's prompt uses the template and the reward model gets the bare field."""
    config = _config(models)
    config.data.prompt_template = "Answer in one word: {messages}"
    row = {"messages": "what is 3 and 4?"}
    assert fields.asked(row, "messages", config.data.prompt_template) == "Answer in one word: what is 3 and 4?"
    maker = ingredients.Maker(typed(config), models, None, meshes.make_mesh((-1, 1, 1)), None, {})
    part = RewardPart(source=str(models / "reward"), weight=1.0)
    found = maker.text_fn("rewards.folder", part)
    plain = from_folder.load(models / "reward", meshes.make_mesh((-1, 1, 1)), "float32", lambda row: row["whole"])
    want = plain(["-"], ["7"], [{"whole": "Answer in one word: what is 3 and 4?"}])
    np.testing.assert_allclose(found(["-"], ["7"], [row]), want, rtol=1e-6)


def test_other_files_of_the_model_are_refused(models, tmp_path):
    """Fails when a resumed job or an export mixes task vectors with another theta_sft."""
    shutil.copytree(models / "policy", tmp_path / "policy")
    config = _config(models)
    config.model.source = str(tmp_path / "policy")
    settings = typed(config)
    main.check(settings, tmp_path / "run")
    main.check(settings, tmp_path / "run")
    _damage_weights(lambda w: w[QUERY].add_(1.0))(tmp_path / "policy")
    for again in (lambda: main.check(settings, tmp_path / "run"), lambda: stages.Workdir(tmp_path / "run")):
        with pytest.raises(ValueError, match=r"other files of .*policy"):
            again()


def test_a_reward_model_judges_answers(models, tmp_path):
    """Fails when a model folder cannot be a judge, or texts beyond the first batch are scored with other rows."""
    rows = [{"prompt": text, "completion": text[-5:]} for text in QUESTIONS[:70]]
    other = [{**row, "completion": "four"} for row in rows]
    for name, content in (("ours", rows), ("theirs", other)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    files = [f"--{name}={tmp_path / name}.jsonl" for name in ("ours", "theirs")]
    result = _run("side_by_side.py", *files, f"--judge={models / 'reward'}", f"--out={tmp_path / 'result.json'}")
    assert result.returncode == 0, result.stderr
    reward = from_folder.load(models / "reward", meshes.make_mesh((-1, 1, 1)), "float32")
    prompts = [row["prompt"] for row in rows]
    want = [np.mean(reward(prompts, [row["completion"] for row in side], side)) for side in (rows, other)]
    found = json.loads((tmp_path / "result.json").read_text())["mean_judge_score"]
    assert [found["ours"], found["theirs"]] == pytest.approx(want, rel=1e-5)


@pytest.mark.slow
def test_stages_are_asked_side_by_side(job, tmp_path):
    """Fails when a stage is missing, or its answers are not written."""
    _, workdir, _ = job
    stages = "--stages=sft,liti:1.0"
    result = _run(
        "sample.py", f"--workdir={workdir}", stages, "--prompt=what is [/b] and 4?", f"--out={tmp_path / 'out'}"
    )
    assert result.returncode == 0, result.stderr
    for name in ("sft", "liti_1.0"):
        (row,) = (json.loads(line) for line in (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines())
        assert row["prompt"] == "what is [/b] and 4?"
        assert row["completion"]


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("export_hf.py", ["--stage=iteration_9/merged"], "iteration_9/merged"),
        ("export_hf.py", ["--stage=liti:half"], "liti:half"),
        ("export_hf.py", ["--stage=sft", "--workdir=nowhere"], "no config.json"),
        ("export_hf.py", ["--stage=liti:nan"], "liti:nan"),
        ("sample.py", [], "no prompt"),
        ("sample.py", ["--prompt=x", "--no_chat_template"], "no_chat_template"),
        ("sample.py", ["--prompts=asked.json"], "want a .jsonl file"),
    ],
    ids=["no stage", "no number", "no workdir", "nan", "no prompt", "no flag", "no jsonl"],
)
def test_bad_input_is_one_line(job, tmp_path, script, arguments, message):
    """Fails when any of these ends in a traceback, or leaves a folder."""
    _, workdir, _ = job
    result = _run(script, f"--workdir={workdir}", f"--out={tmp_path / 'out'}", *arguments)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


MODULES = [smollm2_135m, smollm2_135m_sft_anchor, smollm2_arithmetic, gemma3_270m, gemma_7b]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_configs_of_pretrained_models(module):
    """Fails when a config is not locked, or has a knob that the default has not, but rewards and options of a task."""
    config = module.get_config()
    with pytest.raises(AttributeError, match="ema_rat"):
        config.warp.ema_rat = 0.5
    extra = set(_leaves(config)) - set(_leaves(default.get_config()))
    assert all(name.startswith(("rewards.", "data.task.")) for name in extra)
    typed(config)


BAD = [
    ({"model.source": "nowhere/model"}, "nowhere/model"),
    ({"model.trainable": "layers/9/"}, "no weight matches 'layers/9/'"),
    ({"model.trainable": "layers/("}, "not a regular expression"),
    ({"sampling.prompt_tokens": 6}, "allow longer prompts"),
    ({"rewards.preference.source": "{models}/policy"}, "want a reward model"),
    ({"rewards.preference.source": "nowhere"}, "cannot load"),
    ({"data.prompt_template": "{nothing}"}, "asked.jsonl line .*nothing"),
    ({"sampling.stop_tokens": ("<eoss>",)}, "'<eoss>' is not a single token of the model; did you mean '<eos>'"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=str)
def test_bad_values_leave_nothing(models, tmp_path, changes, message):
    """Fails when the check of this value is removed."""
    config = _config(models)
    config.update_from_flattened_dict(
        {path: value.format(models=models) if "{models}" in str(value) else value for path, value in changes.items()}
    )
    with pytest.raises(ValueError, match=message.replace("(", "\\(")):
        main.check(typed(config), tmp_path / "run")
    assert not (tmp_path / "run").exists()


USER = {"role": "user", "content": "hi"}
BAD_ROWS = [
    ({"messages": None}, "field 'messages' holds None"),
    ({"messages": [USER, {"role": "narrator", "content": "a"}]}, "message 1 is from 'narrator'"),
    ({"messages": [USER, {"role": "user", "content": 3}]}, "message 1 has a int as content"),
    ({"messages": [USER, {"role": "assistant", "content": "a"}]}, "ends with the assistant's turn"),
    ({"messages": [{"role": "tool", "content": "a"}]}, "chat template: no tools here"),
    ({"messages": "  "}, "field 'messages' is empty"),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS, ids=[message for _, message in BAD_ROWS])
def test_a_bad_conversation_is_named_by_its_row(models, tmp_path, row, message):
    """Fails when one bad row among many is refused without its place."""
    shutil.copytree(models / "policy", tmp_path / "policy")
    refuse = "{% if messages[0].role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    (tmp_path / "policy" / "chat_template.jinja").write_text(refuse + TEMPLATE)
    lines = (models / "asked.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "asked.jsonl").write_text("".join([*lines[:120], json.dumps(row) + "\n", *lines[120:]]))
    config = _config(models)
    config.data.prompts_fraction = 0.3
    config.evaluation.num_prompts = 16
    config.data.source = str(tmp_path / "asked.jsonl")
    config.model.source = str(tmp_path / "policy")
    with pytest.raises(ValueError, match=rf"asked\.jsonl line 121: .*{message}"):
        preparation.load_corpora(typed(config))


@pytest.mark.parametrize(
    "change",
    [{"sft.num_steps": 5}, {"gold.source": "tfidf"}, {"rewards.preference.source": "reward_model"}],
    ids=lambda change: next(iter(change)),
)
def test_nothing_learns_from_chats(models, change):
    """Fails when SFT or a learned reward trains on texts, while RL and evaluation use the chat template."""
    settings = typed(_config(models))
    labelled = {"data.text_field": "text", "data.label_field": "label"}
    settings.replace({**labelled, **change, "data.chat": False})
    with pytest.raises(ValueError, match=r"config\.data\.chat: got True, want False, or sft\.num_steps = 0 and no"):
        settings.replace({**labelled, **change})


@pytest.mark.slow
def test_a_chat_model_learns_from_responses_and_pairs(models, tmp_path):
    """Fails when data.chat refuses SFT on responses or a reward model of pairs, a conversation with its response is
    refused, the reward model cannot score RL's completions, or the end of the turn is not learned.
    """
    answers = {"answer": "5", "good": "fine", "bad": "no"}
    rows = []
    for line in (models / "asked.jsonl").read_text().splitlines():
        messages = json.loads(line)["messages"]
        turns = {name: {"role": "assistant", "content": text} for name, text in answers.items()}
        pair = {"good": [*messages, turns["good"]], "bad": [turns["bad"]]}
        rows.append({"messages": messages, "answer": "5", **pair})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = _config(models)
    config.data.source = str(tmp_path / "rows.jsonl")
    config.data.reward_fraction = config.data.gold_fraction = 0.25
    config.data.prompts_fraction = 0.25
    config.data.response_field, config.data.chosen_field, config.data.rejected_field = answers.keys()
    config.model.trainable = ""
    config.sft.update(num_steps=30, batch_size=8, sequence_tokens=44, learning_rate=1e-2, warmup_steps=2)
    config.reward_model.update(num_steps=10, batch_size=16, sequence_tokens=46, warmup_steps=2, learning_rate=1e-2)
    config.reward_model.loss = "bradley_terry"
    config.rewards.preference.source = "reward_model"
    config.warp.update(num_iterations=1, steps_per_iteration=(2,))
    config.evaluation.every = 2
    settings, workdir = typed(config), tmp_path / "run"
    assert jobs.run_part(settings, main.check(settings, workdir), workdir).startswith("reward ")
    assert json.loads((workdir / "sft" / "summary.json").read_text())["loss"] < 0.1
    assert json.loads((workdir / "reward_model" / "summary.json").read_text())["accuracy"] == 1.0
    with (workdir / "front.csv").open() as file:
        assert float(next(csv.DictReader(file))["length"]) < 3  # SFT: "5" and the end of the turn
    config.data.response_field = ""
    with pytest.raises(ValueError, match=r"config\.data\.chat: .* except SFT with data\.response_field"):
        typed(config)


def test_stop_tokens_of_the_config_and_of_the_template_end_completions(models, tmp_path):
    """Fails when sampling.stop_tokens, or the end of a turn, does not reach the tokenizer that sampling uses, or the
    files from which transformers and vLLM read where to stop.
    """
    shutil.copytree(models / "policy", tmp_path / "policy")
    (tmp_path / "policy" / "chat_template.jinja").write_text(TEMPLATE.replace("<eos>", "<pad>"))
    (tmp_path / "policy" / "generation_config.json").write_text('{"eos_token_id": 2, "temperature": 0.6}')
    config = _config(models)
    config.model.source = str(tmp_path / "policy")
    config.sampling.stop_tokens = ("?",)
    settings = typed(config)
    tokenizer = preparation.load_tokenizer(settings, {}, tmp_path)
    assert [tokenizer.backend.id_to_token(i) for i in tokenizer.stop_ids] == ["<eos>", "<pad>", "?"]
    main.check(settings, tmp_path / "run")
    assert stages.Workdir(tmp_path / "run").tokenizer.stop_ids == tokenizer.stop_ids
    export.export_stage(tmp_path / "run", "sft", tmp_path / "out")
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("policy", "out"))
    assert after == before | {"eos_token_id": list(tokenizer.stop_ids)}
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert (generation.eos_token_id, generation.temperature) == (list(tokenizer.stop_ids), 0.6)
    config.data.chat = False
    tokenizer = preparation.load_tokenizer(typed(config), {}, tmp_path)
    assert [tokenizer.backend.id_to_token(i) for i in tokenizer.stop_ids] == ["<eos>", "?"]


def _damage_weights(change):
    def damage(folder):
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    return damage


def _truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-50])


def _lose_a_shard(folder):
    names = load_file(folder / "model.safetensors").keys()
    (folder / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _rename_architecture(folder):
    config = json.loads((folder / "config.json").read_text())
    config.update(architectures=["MambaForCausalLM"], model_type="mamba")
    (folder / "config.json").write_text(json.dumps(config))


def _outgrow_the_embedding(folder):
    other = Tokenizer.train([*QUESTIONS, "many other words that make it larger"], 320)
    (folder / "tokenizer.json").write_text(other.to_json())


QUERY = "model.layers.1.self_attn.q_proj.weight"
DAMAGES = {
    "missing shard": (_lose_a_shard, "model-00001-of-00001.safetensors"),
    "missing tensor": (_damage_weights(lambda w: w.pop(QUERY)), QUERY),
    "wrong shape": (
        _damage_weights(lambda w: w.update({QUERY: w[QUERY][:, :8].clone()})),
        f"model.safetensors.*{QUERY}",
    ),
    "extra tensor": (_damage_weights(lambda w: w.update(extra=torch.ones(2))), "model.safetensors.*'extra'"),
    "unknown architecture": (_rename_architecture, "MambaForCausalLM"),
    "truncated file": (_truncate, "model.safetensors"),
    "tokenizer too large": (_outgrow_the_embedding, "tokenizer.json.*model.embed_tokens.weight"),
}


@pytest.mark.parametrize("kind", ["policy", "reward"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_malformed_checkpoint_leaves_nothing(models, tmp_path, damage, kind):
    """Fails when weights are checked only in the run, after the workdir was claimed."""
    change, message = DAMAGES[damage]
    shutil.copytree(models / kind, tmp_path / kind)
    change(tmp_path / kind)
    config = _config(models)
    path = {"policy": "model.source", "reward": "rewards.preference.source"}[kind]
    config.update_from_flattened_dict({path: str(tmp_path / kind)})
    with pytest.raises(ValueError, match=message) as caught:
        main.check(typed(config), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert str(tmp_path / kind) in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_malformed_checkpoint_is_one_line(models, tmp_path):
    """Fails when this ends in a traceback or another exit code."""
    shutil.copytree(models / "policy", tmp_path / "policy")
    _truncate(tmp_path / "policy")
    command = [f"--config.model.source={tmp_path / 'policy'}", f"--workdir={tmp_path / 'run'}"]
    result = run(main_command("--config=configs/pretrained.py", *command))
    assert result.returncode == 2, result.stderr
    assert "model.safetensors" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_settings_that_would_be_ignored_are_refused(models):
    """Fails when model.architecture is silently ignored beside a source."""
    config = tiny.get_config()
    config.model.source = str(models / "policy")
    with pytest.raises(ValueError, match="would be ignored"):
        typed(config)
