"""Which rows reach SFT, reward model, gold reward, RL and evaluation, on a corpus of marked texts.

The first letter of a text shows its split and label in any fragment of it, and the digits after it show its row. One
character is one token. Training is replaced by functions that record what they get.
"""

import collections
import functools
import hashlib
import json
import sys
import types

import jax
import numpy as np
import pytest

from tests.settings_of import settings_of
from warp_jax import trees
from warp_jax.data import batches as token_batches
from warp_jax.data import corpus
from warp_jax.data.tokenizer import Tokenizer
from warp_jax.evaluation import measure
from warp_jax.experiment import preparation
from warp_jax.generation import sampling
from warp_jax.models import apply, partitioning
from warp_jax.progress import JobProgress
from warp_jax.rewards import reward_functions, tfidf
from warp_jax.training import loop, optimizers, reinforce, supervised
from warp_jax.types import PromptBatch, RewardError, Rollout, TrainState

MARKS = {"reward": "AB", "gold": "CD", "prompts": "EF", "eval": "GH"}  # of the texts with label 0 and with label 1
PER_LABEL = 8  # texts of each label in each split
LONG = 3  # the prompt of every third row is too long for the template's limit
FRACTION = 0.25
BATCH_OF_3 = {"evaluation.num_prompts": 3, "evaluation.batch_size": 3}
STEP_OF = {"sft": 1.0, "reward_model": 2.0}  # what "training" adds to every trained weight
SETTINGS = {
    "seed": 5,
    "data.reward_fraction": FRACTION,
    "data.gold_fraction": FRACTION,
    "data.prompts_fraction": FRACTION,
    "tokenizer.vocab_size": 259,  # bytes and special tokens
    "model.trainable": "layers/1/",
    "model.dtype": "bfloat16",
    "model.logits_chunk": 64,
    "sft.num_steps": 11,
    "sft.sequence_tokens": 32,  # more than any text has
    "reward_model.batch_size": 16,
    "reward_model.loss": "bradley_terry",
    "reward_model.num_steps": 12,
    "reward_model.trainable": "layers/1/|score",
    "reward_model.sequence_tokens": 9,
    "sampling.prompt_tokens": 9,
    "sampling.max_new_tokens": 3,
    "sampling.temperature": 0.7,
    "gold.max_terms": 77,
    "rewards": {
        "learned": {"source": "reward_model", "weight": 0.25},
        "text": {"source": "marked:reward", "weight": 2.0},
        "length": {"source": "length", "weight": -0.5},
        "more": {"source": "marked:more", "weight": 0.0},
    },
    "warp.num_runs": 3,
    "warp.runs": ({}, {"rewards.learned.weight": 0.0, "rewards.more.weight": 3.0, "seed": 6}, {"rl.kl_coef": 0.7}),
    "rl.batch_size": 16,
    "rl.samples_per_prompt": 2,
    "evaluation.num_prompts": 8,
    "evaluation.samples_per_prompt": 2,
    "evaluation.batch_size": 8,
    "evaluation.dtype": "float32",
}


def _place(text):
    """Where the hash of a text falls between 0 and 1: four equal splits lie there side by side."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64


def _marked_rows():
    """Rows of all splits; each text falls into the split that its mark names."""
    rows = []
    for split, marks in MARKS.items():
        for label, mark in enumerate(marks):
            texts = [f"{mark}{i:03d}" * (4 + i % 3) for i in range(200)]
            fitting = [text for text in texts if corpus.SPLITS[int(4 * _place(text))] == split]
            rows += [{"text": text, "label": label} for text in fitting[:PER_LABEL]]
    return [{**row, "number": i, "question": row["text"][: 40 if i % LONG == 0 else 4]} for i, row in enumerate(rows)]


def _texts(rows, *splits):
    return sorted(row["text"] for row in rows if any(row["text"][0] in MARKS[split] for split in splits))


def _mark(text):
    """The letter that marks a fragment."""
    return next(letter for letter in text if letter.isalpha())


def _assert_equal(tree, wanted):
    jax.tree.map(np.testing.assert_array_equal, tree, wanted)


def _labels(texts):
    return [int(_mark(text) in "BDFH") for text in texts]


def _with_seed(function, record, *args, seed, **options):
    record(seed)
    return function(*args, seed=seed, **options)


class _Recorder:
    """Takes the place of everything that trains, samples or scores, and records its arguments."""

    def __init__(self):
        self.tasks, self.schedules, self.held_out, self.gold = {}, {}, {}, {}
        self.generator = np.random.default_rng(0)
        self.optimizers, self.samplers, self.tokenized = [], [], []
        self.learned, self.scored, self.drawn, self.dtypes = [], [], [], []
        self.broken = ""  # name of a reward that returns nan
        self.seeds = {"epoch_rows": set(), "random_windows": set()}

    def patch(self, monkeypatch):
        names = "reward", "more"
        module = types.SimpleNamespace(**{name: functools.partial(self._text_scores, name) for name in names})
        monkeypatch.setitem(sys.modules, "marked", module)
        monkeypatch.setattr(apply, "random_params", self._random_params)
        monkeypatch.setattr(supervised, "fit", self._fit)
        monkeypatch.setattr(supervised, "held_out", self._held_out)
        monkeypatch.setattr(supervised, "language_loss", lambda *args, logits_chunk: f"language {logits_chunk}")
        monkeypatch.setitem(supervised.REWARD_LOSSES, "bradley_terry", lambda *args: "bradley_terry")
        make = optimizers.make_optimizer
        record = self.optimizers.append
        monkeypatch.setattr(optimizers, "make_optimizer", lambda group, adam: record(group) or make(group, adam))
        for name, seeds in self.seeds.items():
            function = functools.partial(_with_seed, getattr(token_batches, name), seeds.add)
            monkeypatch.setattr(token_batches, name, function)
        monkeypatch.setattr(sampling, "make_sampler", self._make_sampler)
        monkeypatch.setattr(reward_functions, "make_learned", self._make_learned)
        monkeypatch.setattr(tfidf, "fit", lambda *args: self.gold.setdefault("fit", args))
        monkeypatch.setattr(tfidf, "auc", lambda _, *args: self.gold.setdefault("auc", args) and 0.5)
        monkeypatch.setattr(tfidf, "save", lambda fitted, path: path.write_text("{}"))
        gold = types.SimpleNamespace(score=lambda *args: self._text_scores("gold", *args))
        monkeypatch.setattr(tfidf, "load", lambda path: gold)
        train = Tokenizer.train
        monkeypatch.setattr(Tokenizer, "train", lambda texts, size: self.tokenized.extend(texts) or train(texts, size))

    def _random_params(self, config, mesh, seed):
        shapes = apply.param_shapes(config)
        values = jax.tree.map(lambda x: self.generator.normal(size=x.shape).astype(np.float32), shapes)
        return jax.device_put(values, partitioning.param_shardings(mesh, shapes))

    def _fit(self, task, optimizer, mesh, schedule):
        name = schedule.directory.name
        self.tasks[name], self.schedules[name] = task, schedule
        return jax.tree.map(lambda x: x + STEP_OF[name], task.params)

    def _held_out(self, task, params, num_batches, mesh):
        (name,) = [name for name, known in self.tasks.items() if known is task]
        self.held_out[name] = [task.held_out_batch(number) for number in range(num_batches)], params
        return {"loss": 0.5}

    def _make_learned(self, apply_fn, params):
        self.learned.append(params)
        return lambda rollout: np.full(
            len(rollout.completion_ids), np.nan if self.broken == "learned" else 4, np.float32
        )

    def _make_sampler(self, mesh, params, **options):
        config = options["config"]
        self.samplers.append(config)

        def generate(params, prompts, key, copies=1):
            """Complete every prompt by 'z' and a stop token, so many times."""
            prompts = jax.tree.map(lambda x: np.repeat(x, copies, axis=0), prompts)
            self.dtypes.append(options["dtype"])
            self.drawn.append((params, jax.tree.map(np.asarray, prompts), tuple(jax.random.key_data(key).tolist())))
            ids = np.tile(np.int32([ord("z"), config.stop_ids[0], config.pad_id]), (len(prompts.prompt_ids), 1))
            return Rollout(*prompts, ids, ids != config.pad_id, np.zeros(ids.shape, np.float32))

        def generate_with_states(params, prompts, key, first):
            """A batch after the other."""
            numbered = enumerate(zip(*prompts, strict=True), first)
            parts = [generate(params, PromptBatch(*part), jax.random.fold_in(key, n)) for n, part in numbered]
            return jax.tree.map(lambda *parts: np.stack(parts), *parts), None

        return sampling.Sampler(lambda params: params, generate, generate_with_states)

    def _text_scores(self, name, prompts, completions, rows):
        self.scored += [(name, prompt, row) for prompt, row in zip(prompts, rows, strict=True)]
        return np.array([np.nan if name == self.broken else row["number"] for row in rows], np.float32)


@pytest.fixture(scope="module", params=["", "{question}"], ids=["beginnings", "template"])
def job(request, tmp_path_factory):
    """Everything that runs share, prepared from marked texts; the recorder; and its settings, rows and texts."""
    folder = tmp_path_factory.mktemp("job")
    rows = _marked_rows()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"data.source": str(folder / "rows.jsonl"), "data.prompt_template": request.param}
    settings, recorder, progress = settings_of({**SETTINGS, **changes}), _Recorder(), JobProgress(0, quiet=True)
    with pytest.MonkeyPatch.context() as monkeypatch:
        recorder.patch(monkeypatch)
        corpora = preparation.load_corpora(settings)
        arguments = settings, corpora, folder / "run", progress
        tokenizer, trainers, examiner = preparation.prepare(*arguments)
        yield types.SimpleNamespace(
            rows=rows,
            settings=settings,
            corpora=corpora,
            recorder=recorder,
            arguments=arguments,
            tokenizer=tokenizer,
            trainer=trainers[0],
            trainers=trainers,
            examiner=examiner,
        )


def _decoded(job, batches):
    return [text for batch in batches for text in job.tokenizer.decode(batch["token_ids"], batch["mask"])]


def test_sft_reads_reward_and_gold_split_with_end_tokens(job):
    """Fails when SFT sees a text of another split, misses one in an epoch, or a text lacks its start or end token."""
    batches = [job.recorder.tasks["sft"].batch_fn(step) for step in range(4)]
    assert sorted(_decoded(job, batches)) == _texts(job.rows, "reward", "gold")
    for batch in [*batches, *job.recorder.held_out["sft"][0]]:
        assert (batch["token_ids"][:, -1] == job.tokenizer.eos_id).all()
        first = batch["mask"].argmax(1)
        assert (batch["token_ids"][np.arange(len(first)), first] == job.tokenizer.bos_id).all()


def test_sft_is_measured_on_the_eval_split(job):
    """Fails when the held-out loss is that of training rows, or leaves held-out rows out."""
    assert sorted(_decoded(job, job.recorder.held_out["sft"][0])) == _texts(job.rows, "eval")


def test_the_reward_model_reads_texts_and_labels_of_one_split(job):
    """Fails when it is trained on another split than `reward`, measured on another than `eval`, labels are those of
    other rows, or no fragment has an end token."""
    task, held_out = job.recorder.tasks["reward_model"], job.recorder.held_out["reward_model"][0]
    for split, batches in (("reward", [task.batch_fn(step) for step in range(8)]), ("eval", held_out)):
        texts = _decoded(job, batches)
        assert collections.Counter(map(_mark, texts)) == dict.fromkeys(MARKS[split], len(texts) // 2)
        assert np.concatenate([batch["labels"] for batch in batches]).tolist() == _labels(texts)
    last = np.concatenate([task.batch_fn(step)["token_ids"][:, -1] for step in range(8)])
    assert 0 < (last == job.tokenizer.eos_id).sum() < len(last)


def test_sft_and_reward_model_have_their_own_settings(job):
    """Fails when loss, length, steps or optimizer are those of another training."""
    settings, recorder = job.settings, job.recorder
    assert recorder.optimizers[:3] == [settings.sft, settings.reward_model, settings.rl]
    groups = {"sft": ("language 64", settings.sft), "reward_model": ("bradley_terry", settings.reward_model)}
    for name, (loss, group) in groups.items():
        task = recorder.tasks[name]
        assert task.loss_fn(None, None) == loss
        assert task.batch_fn(0)["token_ids"].shape == (group.batch_size, group.sequence_tokens)
        assert recorder.schedules[name].num_steps == group.num_steps


def test_the_gold_reward_is_fitted_on_fragments_of_the_gold_split(job):
    """Fails when it is fitted on another split, on whole texts, on the same fragment twice, on labels of other rows, or
    measured on training rows."""
    texts, labels, max_terms = job.recorder.gold["fit"]
    assert collections.Counter(map(_mark, texts)) == dict.fromkeys(MARKS["gold"], 2 * PER_LABEL)  # 2 of each text
    assert labels == _labels(texts)
    assert {len(text) for text in texts} <= {10, 11}  # prompt + completion, without start and end token
    assert texts[: 2 * PER_LABEL] != texts[2 * PER_LABEL :]
    assert max_terms == 77
    texts, labels = job.recorder.gold["auc"]
    assert collections.Counter(map(_mark, texts)) == dict.fromkeys(MARKS["eval"], PER_LABEL)
    assert labels == _labels(texts)


def test_the_tokenizer_is_trained_on_the_texts_of_sft(job):
    """Fails when it sees texts that are held out."""
    assert sorted(job.recorder.tokenized) == _texts(job.rows, "reward", "gold")


def test_the_weights_go_from_sft_to_reward_model_rl_and_evaluation(job):
    """Fails when the reward model starts from the start of SFT or its result is not what scores, the KL is not
    measured against SFT, or frozen weights are those of another model."""
    sft, reward_model = (job.recorder.tasks[name] for name in STEP_OF)
    trained = jax.tree.map(lambda x: x + STEP_OF["sft"], sft.params)
    _assert_equal(job.examiner.sft_params, trained)
    _assert_equal(job.examiner.frozen_params, sft.frozen_params)
    _assert_equal(job.trainer.frozen_params, sft.frozen_params)
    _assert_equal(reward_model.params, {**trained, "score": reward_model.params["score"]})
    _assert_equal(reward_model.frozen_params, sft.frozen_params)
    moved = jax.tree.map(lambda x: x + STEP_OF["reward_model"], reward_model.params)
    for params in (job.recorder.learned[0], job.recorder.held_out["reward_model"][1]):
        _assert_equal(params, trees.join(moved, reward_model.frozen_params))
    _assert_equal(job.recorder.held_out["sft"][1], trees.join(trained, sft.frozen_params))


def test_a_second_start_restores_the_weights(job, monkeypatch):
    """Fails when a finished training is repeated, or its result is not restored."""
    again = _Recorder()
    again.patch(monkeypatch)
    monkeypatch.setattr(supervised, "fit", pytest.fail)
    _, _, examiner = preparation.prepare(*job.arguments)
    _assert_equal(examiner.sft_params, job.examiner.sft_params)
    _assert_equal(examiner.frozen_params, job.examiner.frozen_params)
    _assert_equal(again.learned[0], job.recorder.learned[0])
    assert again.gold == {}
    assert again.tokenized == []


def test_the_sampler_knows_when_to_stop(job):
    """Fails when stop tokens, padding, length or temperature do not reach the sampler."""
    config = sampling.SamplingConfig(3, 0.7, job.tokenizer.stop_ids, job.tokenizer.pad_id)
    assert set(job.recorder.samplers) == {config}


def _train(job, directory, iteration=1, run=1, num_steps=4):
    """Run RL without updates; returns what was drawn, what was scored, and the rewards."""
    job.recorder.drawn, job.recorder.scored, job.recorder.dtypes, rewards = [], [], [], []

    def update(state, frozen, rollout, values):
        rewards.extend(values.tolist())
        return state, {"loss": 0.0}

    start = TrainState(0, {"policy": 1}, {"anchor": 2}, None)
    trainer = job.trainers[run - 1]._replace(programs=loop.Programs(lambda params, key: start, update))
    schedule = loop.Schedule(num_steps, directory, checkpoint_every=100, on_step=lambda *args: None)
    reinforce.run_policy(trainer, {}, iteration=iteration, run=run, schedule=schedule)
    return job.recorder.drawn, job.recorder.scored, rewards


def _evaluate(job, **changes):
    """Evaluate a policy; returns what was drawn, what was scored, and the evaluation."""
    job.recorder.drawn, job.recorder.scored, job.recorder.dtypes = [], [], []
    examiner = job.examiner._replace(kl_to_sft=lambda *args: np.zeros(job.settings.evaluation.batch_size), **changes)
    return job.recorder.drawn, job.recorder.scored, measure.evaluate(examiner, {"policy": 1})


def _prompt(job, row):
    return row["question"] if job.settings.data.prompt_template else row["text"][:8]


def _check_prompts(job, split, drawn):
    """Every prompt is that of the row whose number it carries, in this split; returns the rows."""
    numbers = np.concatenate([prompts.example_ids for _, prompts, _ in drawn])
    texts = [text for _, prompts, _ in drawn for text in job.tokenizer.decode(*prompts[:2])]
    rows = [job.corpora[split].rows[number] for number in numbers]
    assert texts == [_prompt(job, row) for row in rows]
    assert {_mark(text) for text in texts} == set(MARKS[split])
    for _, prompts, _ in drawn:
        first = prompts.prompt_mask.argmax(1)
        assert (prompts.prompt_ids[np.arange(len(first)), first] == job.tokenizer.bos_id).all()
    return rows


def _reward(row):
    """Learned reward, number of the row, and length, each with its weight."""
    return 0.25 * 4 + 2.0 * row["number"] - 0.5 * 2


def test_rl_reads_prompts_and_rows_of_the_prompts_split(job, tmp_path):
    """Fails when RL sees prompts of another split, its reward reads rows of another split or of other prompts, the gold
    reward is trained against, weights of parts are swapped, completions come from the anchor or the sampler of the
    evaluation, or those of one prompt are not neighbours."""
    drawn, scored, rewards = _train(job, tmp_path)
    rows = _check_prompts(job, "prompts", drawn)
    assert len(rows) == 4 * 16
    assert rows[::2] == rows[1::2]  # two completions of each prompt side by side, as leave-one-out needs them
    assert scored == [("reward", _prompt(job, row), row) for row in rows]
    assert rewards == [_reward(row) for row in rows]
    assert all(params == {"policy": 1, **job.trainer.frozen_params} for params, _, _ in drawn)
    assert set(job.recorder.dtypes) == {"bfloat16"}


def test_a_run_has_reward_and_seed_of_its_own(job, tmp_path):
    """Fails when a run is trained with the reward, the seed or the rl settings of the config or of another run, or a
    part that only one run uses is not made.
    """
    drawn, scored, rewards = _train(job, tmp_path, run=2)
    rows = _check_prompts(job, "prompts", drawn)
    assert collections.Counter(name for name, _, _ in scored) == {"reward": 64, "more": 64}
    assert rewards == [5.0 * row["number"] - 0.5 * 2 for row in rows]
    assert [trainer.seed for trainer in job.trainers] == [5, 6, 5]
    job.recorder.seeds["epoch_rows"].remove(6)  # it decided the order of the prompts
    assert [trainer.rl.kl_coef for trainer in job.trainers] == [0.1, 0.1, 0.7]
    assert job.trainers[0].programs is job.trainers[1].programs is not job.trainers[2].programs


def test_evaluation_reads_prompts_and_rows_of_the_eval_split(job):
    """Fails when evaluation sees prompts of another split, others than its first ones, or these in another order than
    earlier versions; its reward or the gold reward reads rows of another split; samples_per_prompt is ignored; or the
    completions come from the sampler of training."""
    drawn, scored, evaluation = _evaluate(job)
    rows = _check_prompts(job, "eval", drawn)
    numbers = [row["number"] for row in rows]
    fitting = [row for row in job.corpora["eval"].rows if len(_prompt(job, row)) <= 8]
    assert rows == [row for row in fitting[:8] for _ in range(2)]
    assert set(job.recorder.dtypes) == {"float32"}
    read = collections.Counter(name for name, _, _ in scored)
    assert read == {"reward": 16, "gold": 16}
    assert {row["text"][0] for _, _, row in scored} == set(MARKS["eval"])
    assert evaluation.reward.tolist() == [_reward(row) for row in rows]
    assert evaluation.gold_reward.tolist() == numbers
    assert len(set(evaluation.clusters.tolist())) == 8
    assert all(params == {"policy": 1, **job.examiner.frozen_params} for params, _, _ in drawn)


@pytest.mark.parametrize("name", ["learned", "reward", "gold"])
def test_a_reward_that_is_nan_names_row_and_split(job, tmp_path, monkeypatch, name):
    """Mutation: nan of a learned or gold reward reaches the evaluation, or the error names another split or no row."""
    monkeypatch.setattr(job.recorder, "broken", name)
    setting = {"learned": "rewards.learned", "reward": "rewards.text", "gold": "gold"}[name]
    with pytest.raises(RewardError, match=rf"^config\.{setting}.*: returned nan.*, row \d+ of split 'eval'$"):
        _evaluate(job)
    if name == "reward":
        with pytest.raises(RewardError, match=r"^iteration 1 run 1 step 0: config.*, row \d+ of split 'prompts'$"):
            _train(job, tmp_path)


def test_evaluation_has_noise_of_its_own(job, tmp_path):
    """Fails when evaluation draws with keys of training or of another seed, or all of its batches with one key."""
    keys = [key for _, _, key in _evaluate(job)[0]]
    for iteration, run in ((1, 1), (1, 3), (2, 1)):
        keys += [key for _, _, key in _train(job, tmp_path / f"{iteration}_{run}", iteration, run, num_steps=2)[0]]
    keys += [key for _, _, key in _evaluate(job, seed=SETTINGS["seed"] + 1)[0]]
    assert len(set(keys)) == len(keys) == 2 + 3 * 2 + 2
    assert job.trainer.seed == job.examiner.seed == SETTINGS["seed"]


def test_one_seed_decides_all_orders_and_windows(job, tmp_path):
    """Mutation: order or windows of SFT, reward model, gold or RL with seed 0, so that other seeds share them."""
    _train(job, tmp_path)
    for task in job.recorder.tasks.values():
        task.batch_fn(0)
    assert job.recorder.seeds == {"epoch_rows": {SETTINGS["seed"]}, "random_windows": {SETTINGS["seed"]}}


def test_too_few_short_prompts_are_refused_for_evaluation_only(job):
    """Fails when the evaluation runs short of prompts, or RL is refused because it has fewer than the evaluation."""
    settings = job.settings.replace({"evaluation.num_prompts": 16})
    if not settings.data.prompt_template:  # the beginning of a text is never too long
        for split in ("prompts", "eval"):
            batch = preparation.make_prompts(settings, job.tokenizer, job.corpora[split], split)
            assert len(batch.example_ids) == len(job.corpora[split].texts) == 16
        return
    assert len(preparation.make_prompts(settings, job.tokenizer, job.corpora["prompts"], "prompts").example_ids) < 16
    with pytest.raises(ValueError, match=r"of 16 prompts of split 'eval' have at most 9 tokens, want 16"):
        preparation.make_prompts(settings, job.tokenizer, job.corpora["eval"], "eval")


def test_held_out_texts_are_the_beginnings_of_the_first_rows(job, tmp_path):
    """Fails when other rows or ends are taken, the start token is missing, or a text that is too long is left out."""
    texts = ["abcdefgh", " b<br />c ", "ccc", "d"]
    path = tmp_path / "held_out.jsonl"
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    names = {"text": str(path), "text_field": "body", "text_rows": 3, "text_tokens": 6}
    settings = job.settings.replace({f"evaluation.{name}": value for name, value in names.items()} | BATCH_OF_3)
    split = preparation.load_corpora(settings)["text"]
    found = preparation.held_out_texts(settings, job.tokenizer, split)
    assert job.tokenizer.decode(found.prompt_ids, found.prompt_mask) == ["abcde", "b\nc", "ccc"]
    assert found.prompt_mask.sum(1).tolist() == [6, 4, 4]
    assert corpus.fingerprint(job.corpora) != corpus.fingerprint({**job.corpora, "text": split})
    assert len(job.corpora["text"].texts) == len(job.examiner.texts.rows.prompt_ids) == 0
    for change, message in (
        ({"evaluation.text_rows": 6}, "has 4 rows, want evaluation.text_rows = 6"),
        ({"evaluation.text_field": "txt"}, "line 1: has no field 'txt', but body; set evaluation.text_field"),
    ):
        with pytest.raises(ValueError, match=message):
            preparation.load_corpora(settings.replace(change))
