"""Tables over lm-evaluation-harness: the arithmetic by hand, and the script on tiny models against transformers."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from warp_jax import cli, files
from warp_jax.benchmarks import harness
from warp_jax.storage import model_files

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "evaluate_harness.py"
WORDS = [f"w{i}" for i in range(30)]


def _record(model, harness_results, values, task="sums", size=4):
    leaves = {name: {"effective": size, "original": size} for name in (task,)}
    output = {"results": {task: harness_results}, "n-samples": leaves}
    record = {"model": model, "task": task, "harness": output, "values": values, "settings": {}, "fingerprint": ""}
    return record


def _score(value, stderr=None, values=None):
    return harness.Score("sums", "acc", "none", 4, value, stderr, values or {})


def test_difference_is_paired_over_documents():
    """Fails when the documents' pairing is ignored, the variance is not of a sample, or the sign is turned round."""
    base, other = _score(0.5, 0.3, {"sums": [1, 1, 0, 0]}), _score(0.75, 0.25, {"sums": [1, 1, 1, 0]})
    change, stderr = harness.difference(other, base)
    assert change == 0.25
    np.testing.assert_allclose(stderr, 0.25)  # changes 0 0 1 0: variance 1/4, over 4 documents


def test_difference_takes_subtasks_as_strata():
    """Fails when a difference between subtasks counts as noise."""
    base = _score(0.5, 0.3, {"a": [0.0, 0.0], "b": [1.0, 1.0]})
    other = _score(0.5, 0.3, {"a": [1.0, 1.0], "b": [0.0, 0.0]})
    assert harness.difference(other, base) == (0.0, 0.0)


@pytest.mark.parametrize("values", [None, {"sums": [1, 1]}, {"other": [1, 1, 1, 0]}])
def test_difference_without_pairs_takes_both_errors(values):
    """Fails when unmatched documents are paired, errors are added without squares, or a missing one is zero."""
    base = _score(0.5, 0.3, {"sums": [1, 1, 0, 0]})
    np.testing.assert_allclose(harness.difference(_score(0.6, 0.4, values), base), (0.1, 0.5))
    assert harness.difference(_score(0.6, None, values), base)[1] is None


def test_scores_are_metrics_with_their_own_errors():
    """Fails when a standard error becomes a row, filters mix, 'N/A' is a number, or unexplained values are paired."""
    result = {
        "alias": "sums",
        "sample_len": 4,
        "exact_match,strict": 0.25,
        "exact_match_stderr,strict": 0.2,
        "exact_match,flexible": 0.5,
        "exact_match_stderr,flexible": "N/A",
    }
    values = {"exact_match,strict": {"sums": [0, 0, 1, 0]}, "exact_match,flexible": {"sums": [0, 0, 1, 0]}}
    strict, flexible = harness.scores(_record("sft", result, values))
    assert (strict.row, strict.value, strict.stderr) == (("sums", "exact_match", "strict"), 0.25, 0.2)
    assert strict.values == {"sums": [0, 0, 1, 0]}
    assert (flexible.value, flexible.stderr, flexible.values) == (0.5, None, {})


def test_scores_of_a_tag_are_those_of_its_tasks():
    """Fails when a tag's tasks get the values or the number of documents of all of them."""
    record = _record("sft", {"acc,none": 0.5}, {"acc,none": {"sums": [0, 1], "words": [1, 1, 1]}}, size=2)
    record["task"] = "tag"
    record["harness"]["results"]["words"] = {"acc,none": 1.0}
    record["harness"]["n-samples"]["words"] = {"effective": 3, "original": 9}
    found = {score.task: score for score in harness.scores(record)}
    assert {name: (score.documents, score.values) for name, score in found.items()} == {
        "sums": (2, {"sums": [0, 1]}),
        "words": (3, {"words": [1, 1, 1]}),
    }


def test_table_leaves_gaps_where_results_are_missing():
    """Fails when a missing result moves the cells of others, or the difference is not from the first column."""
    columns = {"sft": [_score(0.5, 0.25)], "failed": [], "eta_1": [_score(0.25, 0.0)]}
    assert harness.markdown(columns) == (
        "| task | metric | documents | sft | failed | eta_1 | failed - sft | eta_1 - sft |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- |\n"
        "| sums | acc | 4 | 0.5000 ± 0.2500 |  | 0.2500 ± 0.0000 |  | -0.2500 ± 0.2500 |\n"
    )
    assert harness.csv_text(columns).splitlines()[1:] == [
        "sums,acc,none,4,sft,0.5,0.25,,",
        "sums,acc,none,4,eta_1,0.25,0.0,-0.25,0.25",
    ]


# The script


def _model_folder(path, seed):
    """A random Llama whose words are w0 .. w29."""
    import tokenizers
    import torch
    import transformers

    vocabulary = {word: i for i, word in enumerate(["<s>", "</s>", "<unk>", *WORDS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(path)
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,
        bos_token_id=0,
        eos_token_id=1,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


def _load(path):
    import transformers

    return (
        transformers.AutoModelForCausalLM.from_pretrained(path),
        transformers.AutoTokenizer.from_pretrained(path),
    )


def _continuation(path, text):
    """Three greedy words, fewer if the text ends."""
    import torch

    model, tokenizer = _load(path)
    ids = tokenizer(text, return_tensors="pt").input_ids
    for _ in range(3):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return tokenizer.decode(ids[0, -3:]).partition("</s>")[0].strip()


def _choices_right(path, documents):
    """1 where the likeliest of the one-word choices is the answer."""
    model, tokenizer = _load(path)
    right = []
    for document in documents:
        logits = model(tokenizer(document["question"], return_tensors="pt").input_ids).logits[0, -1]
        ids = tokenizer.convert_tokens_to_ids(document["choices"])
        right.append(float(logits[ids].argmax() == document["answer"]))
    return np.array(right)


def _write_task(folder, name, documents, lines):
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    source = (
        f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: '{folder}/{name}.jsonl'}}}}\ntest_split: test\n"
    )
    (folder / f"{name}.yaml").write_text(f"task: {name}\n{source}doc_to_text: '{{{{question}}}}'\n{lines}")


GENERATE = """output_type: generate_until
doc_to_target: "{{answer}}"
generation_kwargs: {max_gen_toks: 3, do_sample: false, until: ["</s>"]}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
CHOOSE = """output_type: multiple_choice
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
GROUP = """group: choices
task: [choices_few, choices_many]
aggregate_metric_list: [{metric: acc, aggregation: mean, weight_by_size: true}]
"""


def _questions(rng, count):
    for _ in range(count):
        choices = [str(word) for word in rng.choice(WORDS, 4, replace=False)]
        yield {"question": " ".join(rng.choice(WORDS, 4)), "choices": choices, "answer": int(rng.integers(4))}


def _write_tasks(folder, sft, other):
    """Words: 3 of 8 answers are sft's own, one is the other's. Choices: 6 and 11 questions at random."""
    folder.mkdir()
    rng = np.random.default_rng(3)
    words = [{"question": " ".join(rng.choice(WORDS, 5)), "answer": "none of them"} for _ in range(8)]
    for document, path in zip(words, [sft, sft, sft, other], strict=False):
        document["answer"] = _continuation(path, document["question"])
    _write_task(folder, "words", words, GENERATE)
    few, many = list(_questions(rng, 6)), list(_questions(rng, 11))
    _write_task(folder, "choices_few", few, CHOOSE)
    _write_task(folder, "choices_many", many, CHOOSE)
    (folder / "choices.yaml").write_text(GROUP)
    return few, many


def _run(*arguments, before="", home=None):
    """The script, offline, after a line of Python that changes what it finds."""
    start = [f"sys.argv[0] = {str(SCRIPT)!r}", "runpy.run_path(sys.argv[0], run_name='__main__')"]
    code = "\n".join(["import runpy, sys", before, *start])
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment = os.environ | offline | ({"HF_HOME": str(home)} if home else {})
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)


def _table(out):
    with (out / "table.csv").open() as file:
        return {(row["task"], row["metric"], row["model"]): row for row in csv.DictReader(file)}


@pytest.mark.slow
def test_models_are_evaluated_once_and_compared(tmp_path):
    """Fails when the table is not the harness's, a start repeats what is done, or one failure ends the rest."""
    pytest.importorskip("lm_eval")
    pytest.importorskip("accelerate")
    sft, other = _model_folder(tmp_path / "sft", 1), _model_folder(tmp_path / "other", 2)
    few, many = _write_tasks(tmp_path / "tasks", sft, other)
    out = tmp_path / "out"
    flags = [f"--include_path={tmp_path}/tasks", "--tasks=words,choices", f"--out={out}", "--device=cpu"]
    folders = f"--folders=sft={sft},other={other}"
    first = _run(*flags, folders, home=tmp_path / "home")
    assert first.returncode == 0, first.stderr
    _check_against_harness(out)
    _check_against_transformers(out, sft, other, (few, many))
    table, results = (out / "table.md").read_text(), sorted(out.rglob("results/*/*.json"))
    assert first.stdout == table + f"{out / 'table.md'}\n"
    assert "sft, words (1 of 2): done" in first.stderr

    again = _run(*flags, folders, before="sys.modules['lm_eval'] = None")
    assert (again.returncode, again.stdout) == (0, first.stdout), again.stderr
    assert again.stderr.count("already evaluated, skipped") == 4
    times = [path.stat().st_mtime_ns for path in results]

    _model_folder(tmp_path / "model_of_stage", 3)
    broken = shutil.copytree(other, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"no weights")
    export = "lambda workdir, stage, out, dtype: {'warnings': [], 'at': shutil.copytree(f'{workdir}_{stage[5:]}', out)}"
    module = "sys.modules['warp_jax.experiment.export']"
    fake = f"import shutil, types; {module} = types.SimpleNamespace(export_stage={export})"
    stages = [f"--workdir={tmp_path / 'model_of'}", "--stages=liti:stage"]
    files.write_json(tmp_path / "model_of" / "config.json", {"seed": 1})
    third = _run(*flags, f"{folders},broken={broken}", *stages, before=fake, home=tmp_path / "home")
    assert third.returncode == 1, third.stderr
    assert "2 evaluations failed" in third.stderr
    assert "Traceback" in (out / "results" / "broken" / "words.error.txt").read_text()
    assert third.stderr.count("already evaluated, skipped") == 4
    assert [path.stat().st_mtime_ns for path in results] == times
    models = {model for _, _, model in _table(out)}
    assert models == {"sft", "other", "liti_stage"}
    assert model_files.fingerprint(out / "models" / "liti_stage") == model_files.fingerprint(
        tmp_path / "model_of_stage"
    )

    files.write_json(tmp_path / "model_of" / "config.json", {"seed": 2})
    stale = _run(*flags, folders, *stages, before=fake, home=tmp_path / "home")
    assert (stale.returncode, stale.stderr.count("\n")) == (2, 1), stale.stderr
    assert "holds exports of another workdir or config" in stale.stderr


def _check_against_harness(out):
    """Value and standard error of each cell are the harness's own numbers."""
    table = _table(out)
    for model in ("sft", "other"):
        for task, metric, size in (("words", "exact_match", 8), ("choices", "acc", 17)):
            own = json.loads((out / "results" / model / f"{task}.json").read_text())["harness"]["results"][task]
            row = table[task, metric, model]
            assert float(row["value"]) == own[f"{metric},none"]
            assert float(row["stderr"]) == own[f"{metric}_stderr,none"]
            assert int(row["documents"]) == size
    assert len(table) == 4


def _check_against_transformers(out, sft, other, parts):
    """Values, differences and their errors from the models' own outputs."""
    table = _table(out)
    words = table["words", "exact_match", "other"]
    assert (float(table["words", "exact_match", "sft"]["value"]), float(words["value"])) == (3 / 8, 1 / 8)
    np.testing.assert_allclose(float(words["difference"]), -2 / 8)
    np.testing.assert_allclose(float(words["difference_stderr"]), 0.25)  # changes -1 -1 -1 1 0 0 0 0: variance 1/2
    right = [(_choices_right(sft, part), _choices_right(other, part)) for part in parts]
    changes = [after - before for before, after in right]
    row = table["choices", "acc", "other"]
    np.testing.assert_allclose(float(row["value"]), np.concatenate([after for _, after in right]).mean())
    np.testing.assert_allclose(float(row["difference"]), np.concatenate(changes).mean())
    stderr = np.sqrt(sum(len(change) * np.var(change, ddof=1) for change in changes)) / 17
    np.testing.assert_allclose(float(row["difference_stderr"]), stderr)
    assert 0 < stderr < 0.3


def _folder(path):
    path.mkdir()
    (path / "config.json").write_text("{}")
    return path


@pytest.mark.parametrize(
    ("arguments", "before", "message"),
    [
        (["--folders=a={a},a={a}", "--tasks=gsm8k"], "", "the name a is given twice"),
        (["--folders=a={a},b={empty}", "--tasks=gsm8k"], "", "b: no config.json in"),
        (["--folders={a}", "--tasks=gsm8k"], "", "want NAME=FOLDER"),
        (["--folders=../a={a}", "--tasks=gsm8k"], "", "got the name '../a'"),
        (["--folders=a={a}", "--workdir={a}", "--tasks=gsm8k"], "", "or --workdir and --stages"),
        (["--folders=a={a}"], "", "mbpp and humaneval run code written by the model: add --trust_code"),
        (["--folders=a={a}", "--tasks=gsm8k", "--batch_size=many"], "", "--batch_size: got 'many'"),
        (["--folders=a={a}", "--tasks=gsm8k"], "sys.modules['lm_eval'] = None", "pip install 'warp_jax[evaluation]'"),
        (
            ["--folders=a={a}", "--tasks=trial,trail", "--include_path={tasks}"],
            "import lm_eval.tasks.manager as manager; manager.__file__ = '/nowhere/manager.py'",  # not its 13,000 files
            "the harness has no 'trail'; try trial",
        ),
    ],
)
def test_bad_input_is_one_line(tmp_path, arguments, before, message):
    """Fails when bad input is found late, with a traceback, or leaves something behind."""
    if "lm_eval" in before:
        pytest.importorskip("lm_eval")
    places = {"a": _folder(tmp_path / "a"), "empty": tmp_path, "tasks": tmp_path / "tasks"}
    places["tasks"].mkdir()
    (places["tasks"] / "trial.yaml").write_text("task: trial\n")
    done = _run(*[item.format(**places) for item in arguments], f"--out={tmp_path}/out", before=before)
    assert done.returncode == cli.BAD_INPUT, done.stderr
    assert message in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("what", "message"), [("settings", "got settings"), ("weights", "got fingerprint"), ("nothing", "")]
)
def test_results_measured_otherwise_are_not_mixed(tmp_path, what, message):
    """Fails when a result of other weights or settings counts as finished, or one of the same does not."""
    folder, settings = _folder(tmp_path / "a"), harness.Settings(limit=3.0)
    (folder / "model.safetensors").write_bytes(b"weights")
    output = {"results": {"sums": {"acc,none": 0.5}}, "n-samples": {"sums": {"effective": 2}}, "samples": {}}
    record = harness.make_record("a", "sums", settings, model_files.fingerprint(folder), output)
    path = tmp_path / "out" / "results" / "a" / "sums.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(record))
    if what == "weights":
        (folder / "model.safetensors").write_bytes(b"more training")
    limit = 4 if what == "settings" else 3
    done = _run(f"--folders=a={folder}", "--tasks=sums", f"--limit={limit}", f"--out={tmp_path}/out")
    assert done.returncode == (cli.BAD_INPUT if message else 0), done.stderr
    assert message in done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("exported", "wanted", "message"),
    [
        ("bfloat16", "float32", "was exported as bfloat16, want float32; choose another --out"),
        ("bfloat16", "auto", "was exported as bfloat16, want float32; choose another --out"),
        ("float32", "bfloat16", "was exported as float32, want bfloat16; choose another --out"),
        (None, "float32", "was exported as an unknown dtype (no warp_export.json), want float32"),
        ("bfloat16", "bfloat16", "sft: warning: bfloat16: rounding delivers 10%"),
    ],
)
def test_an_earlier_export_is_used_in_its_dtype_only(tmp_path, exported, wanted, message):
    """Mutation: an existing folder is evaluated whatever its dtype, or its warnings are printed only once."""
    workdir, out = _folder(tmp_path / "run"), tmp_path / "out"
    (out / "models").mkdir(parents=True)
    folder = _folder(out / "models" / "sft")
    if exported:
        report = {"dtype": exported, "warnings": [f"{exported}: rounding delivers 10%"]}
        files.write_json(folder / "warp_export.json", report)
    (out / "results" / "sft").mkdir(parents=True)
    files.write_json(out / "results" / "sft" / "sums.json", {})
    stages = [f"--workdir={workdir}", "--stages=sft", "--tasks=sums"]
    done = _run(*stages, f"--dtype={wanted}", f"--out={out}")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == cli.BAD_INPUT  # of the dtype, or of the folder without weights
