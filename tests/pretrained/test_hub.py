"""Models and data of the Hugging Face Hub, from a local cache: a whole job, and what is refused."""

import json
import subprocess
import sys

import httpx2
import huggingface_hub
import pytest
from huggingface_hub import errors

from tests import hub_cache
from tests.commands import main_command, run
from tests.hub_cache import COMMITS
from tests.pretrained.test_sources import QUESTIONS, _save
from warp_jax.data.tokenizer import Tokenizer
from warp_jax.exit_codes import BAD_INPUT, TRY_AGAIN
from warp_jax.files import hub

ROWS = [{"text": f"{question} {i % 7}", "label": i % 2} for i, question in enumerate(QUESTIONS * 3)]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache that this process uses."""
    hub_cache.use(tmp_path / "hub", monkeypatch)
    yield tmp_path / "hub"
    hub._download.cache_clear()


def _jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A cache with a policy, a reward model and two commits of a dataset; `main` points to the first."""
    root = tmp_path_factory.mktemp("published")
    tokenizer = Tokenizer.train([row["text"] for row in ROWS], 290)
    _save(root / "policy", "LlamaForCausalLM", tokenizer)
    _save(root / "reward", "LlamaForSequenceClassification", tokenizer, num_labels=1)
    _jsonl(root / "data" / "main" / "train-00000-of-00002.jsonl", ROWS[:300])
    _jsonl(root / "data" / "main" / "train-00001-of-00002.jsonl", ROWS[300:])
    _jsonl(root / "data" / "main" / "test.jsonl", ROWS[:9])
    hub_cache.add(root / "hub", "model", "org/policy", root / "policy")
    hub_cache.add(root / "hub", "model", "org/policy", root / "policy", COMMITS[1], "newer")
    hub_cache.add(root / "hub", "model", "org/reward", root / "reward")
    hub_cache.add(root / "hub", "dataset", "org/questions", root / "data")
    return root / "hub"


def _main(published, workdir, **changes):
    values = {
        "data.source": "hf://org/questions/main",
        "model.source": "hf://org/policy",
        "evaluation.text": "hf://org/questions/main/test.jsonl",
        "evaluation.text_rows": 8,
        "evaluation.text_tokens": 8,
        "evaluation.num_prompts": 8,
        "evaluation.batch_size": 8,
        "evaluation.every": 2,
        "rewards.sentiment.source": "hf://org/reward",
        "gold.source": "",
        "data.label_field": "",
        "warp.steps_per_iteration": "(2,)",
        "warp.num_iterations": 1,
        "rl.batch_size": 4,
        "report.bootstrap_resamples": 10,
        "report.num_samples": 1,
        "sampling.max_new_tokens": 4,
        "data.prompts_fraction": 0.06,
        **changes,
    }
    arguments = [f"--config.{name}={value}" for name, value in values.items()]
    command = main_command("--config=configs/pretrained.py", f"--workdir={workdir}", *arguments)
    return run(command, **hub_cache.environment(published))


def test_a_job_trains_on_the_hub_and_keeps_to_its_commits(published, tmp_path):
    """Fails when a source is not read from the Hub, config.json has no commits, a moved branch is used or only noticed
    after the start, another revision is taken, or the pinned commit is refused.
    """
    workdir = tmp_path / "run"
    done = _main(published, workdir)
    assert done.returncode == 0, done.stderr
    config = json.loads((workdir / "config.json").read_text())
    pinned = f"hf://org/policy@{COMMITS[0]}"
    assert config["model"]["source"] == pinned
    assert config["data"]["source"] == f"hf://org/questions@{COMMITS[0]}/main"
    assert config["evaluation"]["text"] == f"hf://org/questions@{COMMITS[0]}/main/test.jsonl"
    assert config["rewards"]["sentiment"]["source"] == f"hf://org/reward@{COMMITS[0]}"
    assert set(json.loads((workdir / "models.json").read_text())) == {pinned, f"hf://org/reward@{COMMITS[0]}"}
    hub_cache.point(published, "model", "org/policy", COMMITS[1])
    try:
        for changes in ({}, {"model.source": "hf://org/policy@newer"}):
            moved = _main(published, workdir, **changes)
            assert moved.returncode == BAD_INPUT
            assert f"model.source was '{pinned}', now 'hf://org/policy@{COMMITS[1]}'" in moved.stderr
            assert f"give --config.model.source={pinned}, or choose another --workdir" in moved.stderr
        assert _main(published, workdir, **{"model.source": pinned}).returncode == 0
    finally:
        hub_cache.point(published, "model", "org/policy", COMMITS[0])
