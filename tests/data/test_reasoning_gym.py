"""Problems of reasoning-gym: made from a task and its options, scored by the task itself."""

import inspect
import json
import os
import re
import subprocess
import sys

import pytest

from warp_jax.data import corpus, reasoning_gym

factory = pytest.importorskip("reasoning_gym.factory")

SUMS = {
    "size": 400,
    "min_terms": 2,
    "max_terms": 2,
    "min_digits": 1,
    "max_digits": 1,
    "operators": "+",
    "allow_parentheses": False,
}


def test_rows_obey_the_options():
    """Fails when an option is dropped."""
    rows = reasoning_gym.load_rows("basic_arithmetic", SUMS)
    assert len(rows) == 400
    for row in rows:
        a, b = map(int, re.fullmatch(r"Calculate ([0-9]+) \+ ([0-9]+)\.", row["text"]).groups())
        assert int(row["answer"]) == a + b


@pytest.mark.parametrize(
    ("task", "options", "converted"),
    [
        ("simple_equations", {"operators_weights": [1, 0.25, "0.5"]}, {"operators_weights": [1.0, 0.25, 0.5]}),
        ("simple_equations", {"seed": "3"}, {"seed": 3}),
        ("polynomial_equations", {"operators": "-"}, {"operators": ("-",)}),
        ("arc_agi", {"rotations": [90, 180]}, {"rotations": ["90", "180"]}),
        ("calendar_arithmetic", {"tasks": "x"}, {"tasks": ["x"]}),
        ("basic_arithmetic", {"allow_negation": "false", "size": "20"}, {"allow_negation": False, "size": 20}),
        (
            "basic_arithmetic",
            {"min_terms": 2.0, "format_style": "natural"},
            {"min_terms": 2, "format_style": "natural"},
        ),
    ],
)
def test_options_are_converted_to_the_types_of_the_task(task, options, converted):
    """Fails when a text or a whole number is refused for a number, one text for a list, or 'false' is true."""
    assert reasoning_gym._validated(task, factory.DATASETS[task][1], options) == converted


def test_seeds_differ_and_the_default_is_fixed():
    """Fails when the seed is left to chance or ignored."""
    texts = [
        [row["text"] for row in reasoning_gym.load_rows("chain_sum", {"size": 5, **seed})]
        for seed in ({}, {"seed": 0}, {"seed": 100})
    ]
    assert texts[0] == texts[1] != texts[2]


def test_problems_are_the_same_in_every_process():
    """Fails when the seed is left to chance, or a task that depends on Python's hash seed is served."""
    code = (
        "from warp_jax.data import reasoning_gym\n"
        "print([row['text'] for row in reasoning_gym.load_rows('letter_counting', {'size': 3})])"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "77"}
    there = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert there.stdout.strip() == str([row["text"] for row in reasoning_gym.load_rows("letter_counting", {"size": 3})])
    assert {"ransom_note", "word_ladder"} < reasoning_gym.REFUSED.keys()


def test_rows_survive_json():
    """Fails when a row holds what config.json or a file of rows cannot, or is not scored after it is read again."""
    (row,) = reasoning_gym.load_rows("basic_arithmetic", {"size": 1, "operators": ("+", "-")})
    again = json.loads(json.dumps(row))
    assert again == row
    assert reasoning_gym.solved([""], [row["answer"]], [again]) == [1.0]


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("chain_summ", {}, "config.data.source: .* no task 'chain_summ'; did you mean chain_sum"),
        ("", {}, "no task ''; want one of ab, acre"),
        ("chain_sum?size=3", {}, "no task 'chain_sum.size=3'; did you mean chain_sum"),
        ("chain_sum", {"min_term": 2}, "config.data.task: .* no option 'min_term'; did you mean min_terms"),
        ("chain_sum", {"min_terms": "two"}, "config.data.task.min_terms: got 'two' for chain_sum: .* valid integer"),
        ("chain_sum", {"min_terms": 2.5}, "config.data.task.min_terms: got 2.5 .* fractional part"),
        ("chain_sum", {"allow_negation": "perhaps"}, "config.data.task.allow_negation: got 'perhaps' .* valid boolean"),
        ("chain_sum", {"min_terms": object()}, "config.data.task: got .* want numbers, texts and lists"),
        ("basic_arithmetic", {"format_style": "fancy"}, "config.data.task.format_style: .* 'simple' or 'natural'"),
        ("arc_agi", {"board_format_opts": 1}, "config.data.task.board_format_opts: got 1"),
        ("simple_equations", {"operators_weights": [float("nan")] * 3}, "config.data.task.operators_weights: got"),
        (
            "chain_sum",
            {"min_terms": 9, "max_terms": 2},
            "config.data.task: .* refuses .*max_terms must be >= min_terms",
        ),
        ("ransom_note", {}, "makes other problems in every process"),
        ("countdown", {}, "runs the model's text as Python code"),
        ("game_of_life_halting", {}, "scores every text as right"),
    ],
)
def test_bad_tasks_are_refused_before_anything_is_written(task, options, message):
    """Fails when a typo is ignored or gives a traceback, or the corpus does not check."""
    with pytest.raises(ValueError, match=message) as error:
        corpus.check_source(f"reasoning_gym:{task}", options)
    assert "\n" not in str(error.value)


def test_missing_package_is_named(monkeypatch):
    """Fails when the package is imported with the module, or its absence is a traceback."""
    reasoning_gym._make_dataset.cache_clear()
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ValueError, match=r"run: pip install .warp_jax\[reasoning\]."):
        reasoning_gym.check_task("basic_arithmetic", SUMS)


def test_every_scorer_that_evaluates_the_answer_is_refused():
    """Fails when a task whose scorer calls eval or sympy's parser on the model's text leaves REFUSED."""
    evaluates = re.compile(r"\b(?:eval|parse_expr)\(answer")
    found = {n for n, (make, _) in factory.DATASETS.items() if evaluates.search(inspect.getsource(make.score_answer))}
    assert len(found) == 9
    assert found <= reasoning_gym.REFUSED.keys()


def test_extracted_answer():
    """Fails when the last line is taken, a blank first line is an answer, or the tags do not come first."""
    assert reasoning_gym.extract("\n 7 \nCalculate 3 + 4. 9") == "7"
    assert reasoning_gym.extract("first\n<answer>8</answer> or <answer>\n1 2\n3 4\n</answer> done") == "1 2\n3 4"
    assert reasoning_gym.extract(" \n ") == ""


def test_score_is_the_tasks_own():
    """Fails when rows and completions are mixed up, the text is not extracted, or partial credit is lost."""
    rows = reasoning_gym.load_rows("chain_sum", {"size": 40, "min_terms": 2, "max_terms": 2, "max_digits": 1})
    row = next(row for row in rows if row["answer"] == "7")
    other = next(row for row in rows if row["answer"] == "3")
    completions = [" 7\n9", "+7.0", "17", "8", "", "7"]
    assert reasoning_gym.score([""] * 6, completions, [*[row] * 5, other]) == [1.0, 1.0, 0.5, 0.0, 0.0, 0.0]
    assert reasoning_gym.solved([""] * 6, completions, [*[row] * 5, other]) == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("task", "text"), [("prime_factorization", "banana"), ("coin_flip", "1e999999999"), ("jugs", "[" * 5000)]
)
def test_unreadable_answers_score_zero(task, text):
    """Fails when a scorer's own error reaches the training loop, or a huge exponent keeps it busy for ever."""
    row = reasoning_gym.load_rows(task, {"size": 1})[0]
    assert reasoning_gym.score([""], [text], [row]) == [0.0]


def test_rows_of_other_problems_are_refused():
    """Fails when a row is scored by another problem than its own, as after an update of the package."""
    first, second = reasoning_gym.load_rows("chain_sum", {"size": 2})
    with pytest.raises(ValueError, match="differs from the text of its row"):
        reasoning_gym.score([""], ["1"], [{**first, "index": second["index"]}])
    with pytest.raises(ValueError, match="want rows of a reasoning_gym:TASK source"):
        reasoning_gym.score([""], ["1"], [{"text": "1 + 1", "answer": "2"}])
    reasoning_gym.check_row(first)
    with pytest.raises(ValueError, match="want rows of a reasoning_gym:TASK source"):
        reasoning_gym.check_row({"text": "1 + 1", "answer": "2"})


def test_corpus_deals_the_problems():
    """Fails when the corpus gives the source to TFDS, or equal problems fall into two splits."""
    rows = corpus.load_rows("reasoning_gym:basic_arithmetic", "train", task=SUMS)
    assert rows[3][0] == "reasoning_gym:basic_arithmetic row 3"
    splits = corpus.split_rows(rows, "text", "", {"reward": 0.2, "gold": 0.2, "prompts": 0.4})
    texts = [set(part.texts) for part in splits.values()]
    assert sum(map(len, texts)) == len({row["text"] for _, row in rows})
    assert sum(len(part.texts) for part in splits.values()) == 400
