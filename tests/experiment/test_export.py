"""The comparison of an export with its stage: on the batches of the saved evaluations, or skipped with a reason."""

import json
import re
import types

import numpy as np
import pytest

from tests.settings_of import settings_of
from warp_jax.data import batches
from warp_jax.evaluation import measure
from warp_jax.experiment import export, preparation, workdir
from warp_jax.parallel import meshes
from warp_jax.types import RewardError, States

ROWS = [{"text": f"film number {i}", "label": i % 2} for i in range(900)]
CHANGES = {"data.reward_fraction": 0.3, "data.gold_fraction": 0.3, "data.prompts_fraction": 0.2}
EVALUATION = {"evaluation.num_prompts": 24, "evaluation.samples_per_prompt": 2, "evaluation.batch_size": 16}


INGREDIENTS = ("tokenizer.json", "sft/params", "gold/gold.json", "reward_model/params")


class _Examiner(types.SimpleNamespace):
    def _replace(self, **changes):
        return _Examiner(**vars(self) | changes)


@pytest.fixture
def compare(tmp_path, monkeypatch):
    """Compare an export of a claimed and evaluated workdir; the policies are evaluated by `evaluate`."""
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    settings = settings_of({**CHANGES, **EVALUATION, "data.source": str(source)})
    path = tmp_path / "run"
    workdir.claim(settings, path, preparation.load_corpora(settings))
    (path / "evaluations").mkdir()
    (path / "evaluations" / "sft.npz").touch()
    for name in INGREDIENTS:
        (path / name).mkdir(parents=True)
    prompts = batches.left_pad([np.array([i // 2]) for i in range(48)], 1, 0)
    examiner = _Examiner(eval_prompts=prompts, batch_size=settings.evaluation.batch_size, kl_to_sft=_kl_from_states)
    monkeypatch.setattr(preparation, "prepare", lambda *args: (None, None, examiner))

    def run(evaluate, *, prompts=8, changes=None):
        monkeypatch.setattr(measure, "evaluate", evaluate)
        mesh = meshes.make_mesh((1, -1, 1))
        job = types.SimpleNamespace(path=path, settings=settings.replace(changes or {}), mesh=mesh)
        return export._compared(job, {"stage": 1.0, "exported": 1.5}, {}, prompts)

    return run


def _kl_from_states(policy, sft, frozen, rollout, states):
    """The layers that SFT is computed from, and the policy's last states."""
    return "its own" if states.trunk is None else states.trunk, states.final


def _evaluate(examiner, policy):
    states = States("the policy's", "sampled")
    assert examiner.kl_to_sft(policy, {}, {}, "rollout", states) == ("its own", "sampled")
    ids = np.asarray(examiner.eval_prompts.prompt_ids)[:, 0]
    assert len(ids) % examiner.batch_size == 0
    return types.SimpleNamespace(reward=policy * ids, sft_kl=policy + ids, clusters=ids)


@pytest.mark.parametrize(("prompts", "completions"), [(1, 16), (8, 16), (9, 32), (24, 48), (64, 48)])
def test_an_export_is_compared_on_whole_batches_of_the_evaluation(compare, prompts, completions):
    """Mutation: all completions in one batch, which draws others than the saved evaluation; completions counted as
    prompts; SFT computed from the rounded frozen layers of the exported policy.
    """
    found = compare(_evaluate, prompts=prompts)
    assert (found["prompts"], found["completions"]) == (completions // 2, completions)
    assert found["reward"]["difference"] == pytest.approx(0.5 * (completions // 2 - 1) / 2)
    assert found["sft_kl"]["difference"] == pytest.approx(0.5)


def _fail(examiner, policy):
    raise RewardError("a reward fails")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards.sentiment.source": "nosuch.module:f"}, "nosuch"),
        ({"data.source": "nosuch/rows.jsonl"}, "nosuch/rows.jsonl"),
        ({"evaluation.batch_size": 12}, "evaluation.batch_size is 12, want a multiple of 8 devices"),
    ],
)
def test_what_cannot_be_compared_is_skipped_with_the_reason(compare, change, message):
    """Mutation: rewards, data or mesh are not checked, or end the export."""
    found = compare(_evaluate, changes=change)
    assert found.keys() == {"skipped"}
    assert re.search(message, found["skipped"]), found


def test_a_reward_that_fails_skips_the_comparison(compare):
    """Mutation: the export is lost, because a reward function fails while the policies are compared."""
    assert compare(_fail) == {"skipped": "a reward fails"}


@pytest.mark.parametrize("name", INGREDIENTS)
def test_what_was_deleted_skips_the_comparison(compare, tmp_path, name):
    """Mutation: an export trains again what the workdir lacks, and writes it there."""
    (tmp_path / "run" / name).rmdir()
    assert re.search(f"{name} is missing, and an evaluation needs it", compare(_evaluate)["skipped"])


def test_other_rows_skip_the_comparison(compare, tmp_path):
    """Mutation: the rows are not those of the workdir, and the policies are compared on others without a word."""
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(f"{line}\n" for line in source.read_text().splitlines()[:-1]))
    assert "was made with other rows" in compare(_evaluate)["skipped"]


@pytest.mark.parametrize(
    ("source", "sft_steps", "kind", "want"),
    [
        ("hf://org/policy@v1", 0, "LlamaForCausalLM", {"base_model_name_or_path": "org/policy", "revision": "v1"}),
        ("hf://org/policy@v1", 5, "LlamaForCausalLM", {"base_model_name_or_path": None}),
        ("hf://org/policy@v1", 0, "Gemma3ForConditionalGeneration", {"base_model_name_or_path": None}),
        ("models/mine", 0, "LlamaForCausalLM", {"base_model_name_or_path": "FOLDER"}),
    ],
)
def test_an_adapter_names_its_base_model(tmp_path, source, sft_steps, kind, want):
    """Fails when the base model is a folder in the cache of the Hub, has no revision, is not the SFT policy, or has
    other names of weights.
    """
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [kind]}))
    parts = {"model": types.SimpleNamespace(source=source), "sft": types.SimpleNamespace(num_steps=sft_steps)}
    job = types.SimpleNamespace(source=tmp_path, settings=types.SimpleNamespace(**parts))
    assert export._base_of_adapter(job) == {k: v and v.replace("FOLDER", str(tmp_path)) for k, v in want.items()}
