"""Problems of reasoning-gym: made from a source string, scored by their own task."""

import inspect
import os
import re
import subprocess
import sys

import pytest

from warp_jax.data import corpus, reasoning_gym

factory = pytest.importorskip("reasoning_gym.factory")

SUMS = (
    "reasoning_gym:basic_arithmetic?size=400&min_terms=2&max_terms=2&min_digits=1&max_digits=1"
    "&operators=+&allow_parentheses=false"
)


def test_rows_obey_the_settings():
    """Fails when a setting is dropped, '+' is read as a space, or a number stays a string."""
    rows = reasoning_gym.load_rows(SUMS)
    assert len(rows) == 400
    for row in rows:
        a, b = map(int, re.fullmatch(r"Calculate ([0-9]+) \+ ([0-9]+)\.", row["text"]).groups())
        assert int(row["answer"]) == a + b


def test_settings_are_typed_by_the_task():
    """Fails when lists are not split, their items or an Optional are not converted, or 'false' is true."""
    dataset = reasoning_gym._make_dataset("reasoning_gym:simple_equations?operators_weights=0.5,0.25,0.25&seed=3")
    assert (dataset.config.operators_weights, dataset.seed) == ([0.5, 0.25, 0.25], 3)
    dataset = reasoning_gym._make_dataset("reasoning_gym:polynomial_equations?operators=-")
    assert dataset.config.operators == ("-",)
    dataset = reasoning_gym._make_dataset("reasoning_gym:basic_arithmetic?format_style=natural&allow_negation=false")
    assert (dataset.config.format_style, dataset.config.allow_negation) == ("natural", False)


def test_seeds_differ_and_the_default_is_fixed():
    """Fails when the seed is left to chance or ignored."""
    texts = [
        [row["text"] for row in reasoning_gym.load_rows(f"reasoning_gym:chain_sum?size=5{seed}")]
        for seed in ("", "&seed=0", "&seed=100")
    ]
    assert texts[0] == texts[1] != texts[2]


def test_problems_are_the_same_in_every_process():
    """Fails when the seed is left to chance, or a task that depends on Python's hash seed is served."""
    source = "reasoning_gym:letter_counting?size=3"
    code = f"from warp_jax import reasoning; print([row['text'] for row in reasoning.load_rows({source!r})])"
    environment = {**os.environ, "PYTHONHASHSEED": "77"}
    there = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert there.stdout.strip() == str([row["text"] for row in reasoning_gym.load_rows(source)])
    assert {"ransom_note", "word_ladder"} < reasoning_gym.REFUSED.keys()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("reasoning_gym:chain_summ", "no reasoning-gym task 'chain_summ'; did you mean chain_sum"),
        ("reasoning_gym:", "no reasoning-gym task ''; want one of ab, acre"),
        ("reasoning_gym:chain_sum?min_term=2", "no setting 'min_term'; did you mean min_terms"),
        ("reasoning_gym:chain_sum?min_terms=two", "setting min_terms is 'two', want int"),
        ("reasoning_gym:chain_sum?allow_negation=yes", "setting allow_negation is 'yes', want bool"),
        ("reasoning_gym:basic_arithmetic?format_style=fancy", "want Literal"),
        ("reasoning_gym:arc_agi?board_format_opts=1", "setting board_format_opts is '1'"),
        ("reasoning_gym:chain_sum?min_terms=9&max_terms=2", "refuses .*max_terms must be >= min_terms"),
        ("reasoning_gym:chain_sum?size", "got 'size' in .*, want name=value"),
        ("reasoning_gym:chain_sum?size=2&size=3", "got 'size=3' in .*, each name once"),
        ("reasoning_gym:ransom_note", "makes other problems in every process"),
        ("reasoning_gym:countdown", "runs the model's text as Python code"),
        ("reasoning_gym:game_of_life_halting", "scores every text as right"),
    ],
)
def test_bad_sources_are_refused_before_anything_is_written(source, message):
    """Fails when a typo is ignored or gives a traceback, or the corpus does not ask."""
    with pytest.raises(ValueError, match=message) as error:
        corpus.check_source(source)
    assert "\n" not in str(error.value)


def test_missing_package_is_named(monkeypatch):
    """Fails when the package is imported with the module, or its absence is a traceback."""
    reasoning_gym._make_dataset.cache_clear()
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ValueError, match="run: pip install reasoning-gym"):
        reasoning_gym.check_source(SUMS)


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
    rows = reasoning_gym.load_rows("reasoning_gym:chain_sum?size=40&min_terms=2&max_terms=2&max_digits=1")
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
    row = reasoning_gym.load_rows(f"reasoning_gym:{task}?size=1")[0]
    assert reasoning_gym.score([""], [text], [row]) == [0.0]


def test_rows_of_other_problems_are_refused():
    """Fails when a row is scored by another problem than its own, as after an update of the package."""
    first, second = reasoning_gym.load_rows("reasoning_gym:chain_sum?size=2")
    with pytest.raises(ValueError, match="not the one in the row"):
        reasoning_gym.score([""], ["1"], [{**first, "index": second["index"]}])
    with pytest.raises(ValueError, match="want those of a reasoning_gym source"):
        reasoning_gym.score([""], ["1"], [{"text": "1 + 1", "answer": "2"}])


def test_corpus_deals_the_problems():
    """Fails when the corpus gives the source to TFDS, or equal problems fall into two splits."""
    rows = corpus.load_rows(SUMS, "train")
    splits = corpus.split_rows(rows, "text", "", {"reward": 0.2, "gold": 0.2, "prompts": 0.4})
    texts = [set(part.texts) for part in splits.values()]
    assert sum(map(len, texts)) == len({row["text"] for row in rows})
    assert sum(len(part.texts) for part in splits.values()) == 400
