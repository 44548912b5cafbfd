"""Models and data of the Hugging Face Hub, from a local cache: a whole job, and what is refused."""

import json
import re
import subprocess
import sys

import huggingface_hub
import pytest
import yaml
from huggingface_hub import errors

from tests import hub_cache
from tests.commands import main_command, run
from tests.hub_cache import COMMITS
from tests.pretrained.test_sources import QUESTIONS, _save
from warp_jax.data import corpus
from warp_jax.data.tokenizer import Tokenizer
from warp_jax.exit_codes import BAD_INPUT, TRY_AGAIN
from warp_jax.experiment import inputs
from warp_jax.files import hub
from warp_jax.pretrained import sources
from warp_jax.settings.groups import Gold
from warp_jax.types import RewardError

ROWS = [{"text": f"{question} {i % 7}", "label": i % 2} for i, question in enumerate(QUESTIONS * 3)]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache that this process uses."""
    hub_cache.use(tmp_path / "hub", monkeypatch)
    yield tmp_path / "hub"
    hub_cache.forget()


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
    (root / "newer").mkdir()
    (root / "newer" / "config.json").write_text("{}")
    hub_cache.add(root / "hub", "model", "org/policy", root / "newer", commit=COMMITS[1], branch="newer")
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


PUSH = """
import runpy, sys, types
import huggingface_hub

class Api:
    def whoami(self): print("login checked")
    def create_repo(self, repo, **options): print("created", repo, options)
    def upload_folder(self, **options):
        print("uploaded", options["repo_id"], options["folder_path"])
        return "address of the commit"

huggingface_hub.HfApi = Api
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def _export_and_push(published, workdir, out):
    """The exported policy is that of the pinned commit, with a card, and is pushed when it is complete."""
    arguments = (f"--workdir={workdir}", "--stage=liti:0.3", f"--out={out}", "--push=me/aligned", "--prompts=8")
    done = run([sys.executable, "-c", PUSH, "scripts/export_hf.py", *arguments], **hub_cache.environment(published))
    assert done.returncode == 0, done.stderr
    steps = [line for line in done.stdout.splitlines() if re.match(r"(login|created|uploaded|pushed:) ", line)]
    assert steps == [
        "login checked",
        "created me/aligned {'private': True, 'exist_ok': True}",
        f"uploaded me/aligned {out}",
        "pushed: address of the commit",
    ]
    card = (out / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == "org/policy"
    assert f"hf://org/policy@{COMMITS[0]}" in card
    assert "| reward | " in card
    assert re.search(r"\npython -m warp_jax\.main --config=configs/pretrained\.py --workdir=\S+ ", card)
    assert re.search(r"\nwarp-jax export .*--stage=liti:0\.3", card)


def test_a_job_trains_on_the_hub_and_keeps_to_its_commits(published, tmp_path):
    """Fails when a source is not read from the Hub, config.json has no commits, a moved branch is used, or noticed
    only after its files are read, another revision is taken, the pinned commit is refused, or the export is not of it.
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
        _export_and_push(published, workdir, tmp_path / "exported")
    finally:
        hub_cache.point(published, "model", "org/policy", COMMITS[0])


def test_the_first_start_downloads_what_a_model_needs_and_later_ones_nothing(published, cache, monkeypatch, tmp_path):
    """Fails when pickled weights, or other libraries' weights, are downloaded, a file that is needed is not, a resumed
    job downloads again, or a branch is asked for twice in a process.
    """
    folder = tmp_path / "model"
    folder.mkdir()
    wanted = ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    for name in [*wanted, "pytorch_model.bin", "consolidated.safetensors", "training_args.bin", "README.md"]:
        (folder / name).write_text(name)
    hub_cache.add(tmp_path / "server", "model", "org/mine", folder, commit=COMMITS[1])
    with hub_cache.served(tmp_path / "server", monkeypatch) as requested:
        assert hub.pin("hf://org/mine", "model") == f"hf://org/mine@{COMMITS[1]}"
        found = sources.find("hf://org/mine")
        assert sorted(path.name for path in found.iterdir()) == sorted([*wanted, "README.md"])
        hub_cache.point(tmp_path / "server", "model", "org/mine", COMMITS[0])
        requested.clear()
        assert sources.find("hf://org/mine") == found
        hub_cache.forget()
        assert sources.find(f"hf://org/mine@{COMMITS[1]}") == found
        assert not [path for path in requested if "resolve" in path]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "hf://gated/model",
            "gated/model: is gated; accept its terms on its page on the Hugging Face Hub, then log in",
        ),
        (
            "hf://org/nosuch",
            "org/nosuch: the Hub has no such repository, or it is private; correct the name, or log in",
        ),
        ("hf://org/policy@nosuch", "org/policy: has no revision 'nosuch', want a branch, a tag or a commit"),
        ("hf://policy", "got 'hf://policy', want hf://ORG/NAME"),
        ("hf://org/../policy", "got 'hf://org/../policy', want hf://ORG/NAME"),
        ("hf://org/policy/part", "'hf://org/policy/part': a model is a whole repository, want hf://org/policy"),
    ],
)
def test_what_the_hub_refuses_is_said_in_one_line(published, cache, monkeypatch, source, message):
    """Fails when an error of huggingface_hub passes, or its line does not say what to do."""
    with hub_cache.served(published, monkeypatch), pytest.raises(ValueError, match="^" + re.escape(message)) as caught:
        sources.find(source)
    assert "\n" not in str(caught.value)


def test_without_network_the_cache_must_have_it(cache, monkeypatch):
    """Fails when HF_HUB_OFFLINE is not named, or a lost network counts as bad input, which nobody tries again."""
    with pytest.raises(
        ValueError, match=r"org/mine: revision 'main' is not wholly in the cache .* HF_HUB_OFFLINE is set"
    ):
        sources.find("hf://org/mine")
    with hub_cache.served(cache, monkeypatch):
        pass
    with pytest.raises(hub.HubError, match=r"org/mine: .* check the network") as caught:
        sources.find("hf://org/mine")
    assert caught.value.exit_code == TRY_AGAIN

    def lose_connection(*arguments, **options):
        raise errors.HTTPError("connection reset")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lose_connection)
    with pytest.raises(hub.HubError, match="org/mine: connection reset; check the network"):
        sources.find("hf://org/mine")


@pytest.mark.parametrize("failure", [429, 503])
def test_a_hub_that_fails_gives_no_older_commit(published, cache, monkeypatch, failure):
    """Fails when a cached commit is taken although the Hub answers with an error, or is not taken without network."""
    hub_cache.point(published, "model", "org/policy", COMMITS[0])
    hub_cache.use(published, monkeypatch)
    assert hub.pin("hf://org/policy", "model") == f"hf://org/policy@{COMMITS[0]}"
    hub_cache.forget()
    message = f"org/policy: .*{failure}.*; check the network, then try again"
    with hub_cache.served(published, monkeypatch, failure), pytest.raises(hub.HubError, match=message):
        hub.pin("hf://org/policy", "model")
    assert hub.pin("hf://org/policy", "model") == f"hf://org/policy@{COMMITS[0]}"  # no connection: nobody serves


def test_a_commit_that_is_not_the_newest_is_refused(cache, monkeypatch):
    """Fails when the Hub names a commit, and then fails, so that an older one from the cache is taken."""
    info = type("Info", (), {"sha": COMMITS[1]})
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda *arguments, **options: info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *arguments, **options: f"snapshots/{COMMITS[0]}")
    with pytest.raises(hub.HubError, match=f"revision 'main' is {COMMITS[1]}, but the Hub gave {COMMITS[0]}"):
        hub.pin("hf://org/policy", "model")


def test_a_missing_package_is_named(cache, monkeypatch):
    """Fails when the extra is not named."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"run: pip install 'warp_jax\[hub\]'"):
        sources.find("hf://org/mine")


def test_importing_the_package_does_not_import_the_hub():
    """Fails when huggingface_hub is imported before a source needs it."""
    code = "import sys, warp_jax.experiment.inputs; assert 'huggingface_hub' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == 0


@pytest.mark.parametrize("source", ["google/gemma-3-270m", "./models/mine", "models/mine.v2/x"])
def test_the_name_of_a_repository_gets_a_hint(source):
    """Fails when a repository's name as model, reward or data source is refused without the form that is read, or a
    path gets the hint.
    """
    hint = f"did you mean hf://{source}?"
    with pytest.raises(ValueError, match="no such folder") as caught:
        sources.find(source)
    assert (hint in str(caught.value)) == (source == "google/gemma-3-270m")
    with pytest.raises(RewardError) as caught:
        inputs._check_reward("gold.source", Gold(source=source, max_terms=1, fragments_per_text=1), (), False)
    assert (hint in str(caught.value)) == (source == "google/gemma-3-270m")


def test_a_dataset_without_the_prefix_gets_a_hint():
    """Fails when tensorflow-datasets alone answers, with its list of names."""
    with pytest.raises(ValueError, match=r"^[^\n]{,450}did you mean hf://openai/gsm8k\?$"):
        corpus.load_rows("openai/gsm8k", "train")


FILES = {
    "main/train-00000-of-00002.jsonl": 1,
    "main/train-00001-of-00002.jsonl": 2,
    "main/train-notes.jsonl": 3,
    "main/train_sft-00000-of-00001-0a1b.jsonl": 4,
    "main/test.jsonl": 5,
    "other/train.jsonl": 6,
    "other/valid/0000.jsonl": 7,
    "other/valid/0001.jsonl": 8,
    "half/train-00000-of-00002.jsonl": 9,
    "mixed/train.jsonl": 10,
    "mixed/train.csv": 11,
}


@pytest.fixture
def dataset(cache, tmp_path):
    for name, number in FILES.items():
        _jsonl(tmp_path / "data" / name, [{"number": number}])
    (tmp_path / "data" / "README.md").write_text("---\nlicense: mit\n---\n")
    hub_cache.add(cache, "dataset", "org/data", tmp_path / "data")


@pytest.mark.parametrize(
    ("source", "split", "numbers"),
    [
        ("hf://org/data/main", "train", [1, 2]),
        ("hf://org/data@main/main/", "train_sft", [4]),
        ("hf://org/data", "test", [5]),
        ("hf://org/data/other", "train", [6]),
        ("hf://org/data", "valid", [7, 8]),
        (f"hf://org/data@{COMMITS[0]}/main/train-notes.jsonl", "ignored", [3]),
    ],
)
def test_the_rows_of_a_split_are_read_in_order(dataset, source, split, numbers):
    """Fails when a file of another split or folder is read, a shard is left out, or the order is not the files'."""
    assert [row["number"] for _, row in corpus.load_rows(source, split)] == numbers


@pytest.mark.parametrize(
    ("source", "split", "message"),
    [
        ("hf://org/data", "train", "in 4 places; give one: hf://org/data/half, hf://org/data/main, "),
        ("hf://org/data", "validation", "no file named after the split 'validation', want validation.jsonl"),
        ("hf://org/data/main", "train[:20]", "got the split 'train[:20]', want its name"),
        ("hf://org/data/mixed", "train", "in several formats: .csv, .jsonl; give one file"),
        ("hf://org/data/half", "train", "has 1 files of the split 'train', want 2"),
        ("hf://org/data/main/none.jsonl", "train", "no such file in this repository"),
    ],
)
def test_files_that_are_not_one_split_are_refused(dataset, source, split, message):
    """Fails when files of two configurations or formats are joined, or a part of a split is taken for the whole."""
    with pytest.raises(ValueError, match=f"config.data.source: {re.escape(source)}: .*{re.escape(message)}"):
        corpus.check_source(source, split=split)


def test_a_file_and_a_folder_of_a_split_are_not_joined(cache, tmp_path):
    """Fails when train.jsonl and train/metadata.jsonl are read as one split, or the file is not among the choices."""
    for name in ("train.jsonl", "train/metadata.jsonl", "main/train.jsonl"):
        _jsonl(tmp_path / "data" / name, [{"number": 1}])
    hub_cache.add(cache, "dataset", "org/both", tmp_path / "data")
    want = "in 3 places; give one: hf://org/both/main, hf://org/both/train.jsonl, hf://org/both/train/metadata.jsonl"
    with pytest.raises(ValueError, match=re.escape(want)):
        corpus.load_rows("hf://org/both", "train")


@pytest.mark.parametrize("kind", ["datasets", "models"])
def test_the_kind_of_a_repository_is_not_part_of_its_name(kind):
    """Fails when hf://datasets/ORG/NAME, as pandas writes it, is looked up as the repository datasets/ORG."""
    with pytest.raises(ValueError, match=f"want hf://org/name/x.csv: without {kind}/"):
        hub.parse(f"hf://{kind}/org/name/x.csv")


def test_a_revision_with_slashes_is_kept_apart_from_the_path():
    """Fails when a pull request's or a converted branch is cut at its slash, or commits stay in a compared config."""
    assert hub.parse("hf://org/data@refs/convert/parquet/main/x.parquet") == (
        "org/data",
        "refs/convert/parquet",
        "main/x.parquet",
    )
    text = json.dumps([f"hf://org/data@{COMMITS[0]}/main", "hf://org/data@refs/pr/7", "me@home/x"])
    assert json.loads(hub.without_revisions(text)) == ["hf://org/data/main", "hf://org/data", "me@home/x"]
