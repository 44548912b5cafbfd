"""SFT on responses to prompts, and a reward model of pairs, through the preparation of a real job.

Questions are random digits, which nobody can learn; responses are always the same, and easy.
"""

import hashlib
import json
import types

import jax
import numpy as np
import pytest

from tests.settings_of import settings_of
from warp_jax import main
from warp_jax.data import responses
from warp_jax.experiment import architecture, ingredients, preparation
from warp_jax.parallel import meshes, stopping
from warp_jax.progress import JobProgress
from warp_jax.training import supervised

LONG = 5  # every fifth question is too long for SFT, every seventh response for the reward model
SETTINGS = {
    "checkpoint_every": 100,
    "data.prompt_template": "{question}? ",
    "data.response_field": "answer",
    "data.chosen_field": "good",
    "data.rejected_field": "bad",
    "data.label_field": "",
    "data.reward_fraction": 0.25,
    "data.gold_fraction": 0.25,
    "data.prompts_fraction": 0.25,
    "tokenizer.vocab_size": 259,
    "gold.source": "",
    "sft.num_steps": 40,
    "sft.batch_size": 16,
    "sft.num_microbatches": 2,
    "sft.learning_rate": 2e-2,
    "sft.warmup_steps": 2,
    "sft.sequence_tokens": 26,
    "reward_model.loss": "bradley_terry",
    "reward_model.num_steps": 20,
    "reward_model.batch_size": 16,
    "reward_model.learning_rate": 1e-2,
    "reward_model.warmup_steps": 2,
    "reward_model.sequence_tokens": 52,
    "sampling.prompt_tokens": 52,
}


@pytest.fixture(autouse=True)
def _strict_promotion():
    """Overrides the strict one of conftest.py: optax raises a float to an integer power."""


def _rows():
    rows = []
    for i in range(240):
        digits = hashlib.md5(str(i).encode()).hexdigest()
        question = digits[: 30 if i % LONG == 0 else 4 + i % 14]
        answers = {"answer": "yes", "good": "fine", "bad": "no" * (30 if i % 7 == 0 else 1)}
        rows.append({"text": f"text {i}", "question": question, **answers})
    return rows


def _prepare(settings, workdir):
    """Claim the workdir and prepare the job; returns the corpora, the tokenizer and the notes."""
    notes, progress = [], JobProgress(0, quiet=True)
    progress.note = notes.append
    corpora = main.check(settings, workdir)
    tokenizer, _, examiner = preparation.prepare(settings, corpora, workdir, progress)
    return corpora, tokenizer, examiner, notes


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A job whose SFT and reward model are trained."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _rows()))
    settings = settings_of({**SETTINGS, "data.source": str(folder / "rows.jsonl")})
    corpora, tokenizer, examiner, notes = _prepare(settings, folder / "run")
    maker = ingredients.Maker(settings, folder / "run", JobProgress(0, quiet=True), examiner.mesh, tokenizer, corpora)
    policy = architecture.policy_config(settings.model, tokenizer.vocab_size)
    sft = maker.sft_task(policy)
    names = {"sft": sft, "reward_model": maker.reward_model_task(policy, maker.sft(policy))}
    return types.SimpleNamespace(
        settings=settings, workdir=folder / "run", corpora=corpora, tokenizer=tokenizer, notes=notes, tasks=names
    )


def _decoded(job, batch, mask):
    return job.tokenizer.decode(batch["token_ids"], mask)


def test_only_responses_are_learned(job):
    """Fails when SFT counts a token of the prompt, which is random, or its held-out loss does: 1.5 nats and more."""
    assert json.loads((job.workdir / "sft" / "summary.json").read_text())["loss"] < 0.2
    summary = json.loads((job.workdir / "reward_model" / "summary.json").read_text())
    assert summary["accuracy"] == 1.0
    assert summary["loss"] < 0.1


def test_sft_reads_rows_of_reward_and_gold_split(job):
    """Fails when SFT sees another split or misses a row that fits, a row has another number or response, the end token
    is not learned, or a batch is not cut into microbatches."""
    rows, seen = job.corpora["reward"].rows + job.corpora["gold"].rows, set()
    task = job.tasks["sft"]
    for step in range(20):
        batch = task.batch_fn(step)
        chosen = [rows[number] for number in batch[supervised.ROW]]
        assert _decoded(job, batch, batch["mask"]) == [f"{row['question']}? yes" for row in chosen]
        assert (batch[supervised.COUNTED].sum(1) == len("yes") + 1).all()
        assert batch[supervised.COUNTED][:, -1].all()
        assert (batch["token_ids"][:, -1] == job.tokenizer.eos_id).all()
        seen |= {row["text"] for row in chosen}
    fitting = [row for row in rows if len(row["question"]) <= 20]  # with start, "? ", "yes" and end: 26 tokens
    assert seen == {row["text"] for row in fitting}
    left_out = f"sft: {len(rows) - len(fitting)} of {len(rows)} rows of splits 'reward' and 'gold', joined"
    assert any(left_out in note for note in job.notes)
    assert task.num_microbatches == 2
    held_out = job.corpora["eval"].rows
    numbers = np.concatenate([task.held_out_batch(n)[supervised.ROW] for n in range(task.held_out_batches())])
    assert all(len(held_out[number]["question"]) <= 20 for number in numbers)
    assert len(set(numbers.tolist())) == len(numbers) == 16 * task.held_out_batches() > 0


def test_prompts_are_those_of_rl(job):
    """Fails when the prompt of a response has other token ids than RL gives it."""
    batch = job.tasks["sft"].held_out_batch(0)
    prompts = preparation.make_prompts(job.settings, job.tokenizer, job.corpora["eval"], "eval")
    by_row = {row: ids[mask] for ids, mask, row in zip(*prompts, strict=True)}
    for ids, mask, counted, row in zip(
        *(batch[k] for k in ("token_ids", "mask", "counted", supervised.ROW)), strict=True
    ):
        np.testing.assert_array_equal(ids[mask & ~counted], by_row[row])


def test_pairs_answer_one_prompt(job):
    """Fails when chosen and rejected are swapped, belong to two prompts or to another split, or a pair of which one
    response is too long is kept."""
    task = job.tasks["reward_model"]
    for split, batches in (("reward", map(task.batch_fn, range(6))), ("eval", [task.held_out_batch(0)])):
        for batch in batches:
            chosen = [job.corpora[split].rows[number] for number in batch[supervised.ROW]]
            assert chosen[:8] == chosen[8:]
            want = [f"{row['question']}? {row[name]}" for name in ("good", "bad") for row in chosen[:8]]
            assert _decoded(job, batch, batch["mask"]) == want
            assert {row["bad"] for row in chosen} == {"no"}
    assert any(note.startswith("reward_model: ") and "rows of split 'reward' left out" in note for note in job.notes)


def test_responses_are_encoded_once(job, monkeypatch):
    """Fails when a training encodes what the checks have encoded, or a finished training encodes anything."""
    calls, encode = [], responses.encode
    monkeypatch.setattr(responses, "encode", lambda *args, **options: calls.append(args) or encode(*args, **options))
    corpora = ingredients.Corpora(job.corpora, ingredients.check_responses(job.settings, job.corpora, job.tokenizer))
    assert len(calls) == 4  # learned and held out, of SFT and of the reward model
    mesh = meshes.make_mesh(job.settings.mesh)
    maker = ingredients.Maker(job.settings, job.workdir, JobProgress(0, quiet=True), mesh, job.tokenizer, corpora)
    task = maker.sft_task(architecture.policy_config(job.settings.model, job.tokenizer.vocab_size))
    for name in ("batch_fn", "held_out_batch"):
        found, wanted = (getattr(made, name)(3)["token_ids"] for made in (task, job.tasks["sft"]))
        np.testing.assert_array_equal(found, wanted)
    _prepare(job.settings, job.workdir)
    assert len(calls) == 4


@pytest.mark.slow
def test_a_stopped_training_ends_with_the_same_bits(job, tmp_path, monkeypatch):
    """Fails when a batch depends on the start of the job, or a state of accumulated gradients is not all of it."""
    stops = ["sft, saved after step 13", "reward_model, saved after step 7"]

    def stop(where):
        if stops and where == stops[0]:
            raise stopping.Stopped(stops.pop(0))

    monkeypatch.setattr(stopping, "stop_if_requested", stop)
    for _ in range(2):
        with pytest.raises(stopping.Stopped):
            _prepare(job.settings, tmp_path / "run")
    _, _, examiner, _ = _prepare(job.settings, tmp_path / "run")
    for name in ("sft", "reward_model"):
        for file in ("metrics.jsonl", "summary.json"):
            assert (tmp_path / "run" / name / file).read_bytes() == (job.workdir / name / file).read_bytes()
    _, _, unbroken, _ = _prepare(job.settings, job.workdir)
    jax.tree.map(np.testing.assert_array_equal, examiner.sft_params, unbroken.sft_params)


def test_the_tokenizer_learns_responses(tmp_path):
    """Fails when it is trained on texts only: responses of other words would be spelt byte by byte."""
    rows = [{**row, "answer": "zebra"} for row in _rows()]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = settings_of(
        {**SETTINGS, "tokenizer.vocab_size": 300, "data.source": str(tmp_path / "rows.jsonl"), "data.chosen_field": "",
         "data.rejected_field": "", "rewards.sentiment.weight": 0.0, "rewards.length.weight": 1.0}
    )  # fmt: skip
    corpora = preparation.load_corpora(settings)
    tokenizer = preparation.load_tokenizer(settings, corpora, tmp_path / "tokenizer.json")
    assert len(tokenizer.encode(["zebra"])[0]) == 1


def test_the_tokenizer_reads_pairs_where_the_reward_model_does(tmp_path):
    """Fails when a row that only SFT learns from needs a pair, or the words of a pair are not learned."""
    rows = [{**row, "good": "zebra"} for row in _rows()]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = settings_of({**SETTINGS, "tokenizer.vocab_size": 300, "data.source": str(tmp_path / "rows.jsonl")})
    corpora = preparation.load_corpora(settings)
    for row in corpora["gold"].rows:
        del row["good"], row["bad"]
    tokenizer = preparation.load_tokenizer(settings, corpora, tmp_path / "tokenizer.json")
    assert len(tokenizer.encode(["zebra"])[0]) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data.response_field": "answr"}, r"rows\.jsonl line \d+: has no field 'answr'"),
        ({"data.rejected_field": "worse"}, r"rows\.jsonl line \d+: has no field 'worse'"),
        ({"data.prompt_template": "{quest}"}, r"rows\.jsonl line \d+: config\.data\.prompt_template: got '\{quest\}'"),
    ],
)
def test_rows_are_checked_before_anything_is_written(job, tmp_path, change, message):
    """Fails when a wrong field is found out by the training, or the error loses the row."""
    with pytest.raises(ValueError, match=message):
        main.check(job.settings.replace(change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_no_row_that_fits_is_one_line(job):
    """Fails when a training of no rows begins."""
    settings = job.settings.replace({"reward_model.sequence_tokens": 8})
    with pytest.raises(ValueError, match=r"^config\.reward_model\.sequence_tokens: none of the \d+ rows of split 'rew"):
        ingredients.check_responses(settings, job.corpora, job.tokenizer)
