"""Problems whose answers a program can check: the tasks of the PyPI package `reasoning-gym` (Stojanovski et al. 2025).

A problem is given by the name of its task, the task's own options and an index. For example, the options
{"size": 2000, "max_terms": 2} of the task chain_sum give 2,000 sums of at most two terms.
"""

import copy
import dataclasses
import difflib
import functools
import importlib
import json
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pydantic

PREFIX = "reasoning_gym:"  # of data.source
# tasks of version 0.1.25 that are refused, and why; found by making and scoring problems of all 106 tasks
_UNSTABLE = ("codeio", "isomorphic_strings", "knight_swap", "list_functions", "ransom_note", "word_ladder")
_UNSAFE = (
    *("binary_matrix", "countdown", "intermediate_integration", "n_queens", "polynomial_multiplication"),
    *("puzzle24", "simple_integration", "spiral_matrix", "string_insertion"),
)
REFUSED = {
    **dict.fromkeys(_UNSTABLE, "makes other problems in every process"),
    **dict.fromkeys(_UNSAFE, "runs the model's text as Python code to score it"),
    "game_of_life_halting": "scores every text as right",
}
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_HUGE = re.compile(r"[0-9]e[+-]?[0-9]{4}", re.IGNORECASE)  # exact arithmetic on 1e999999999 would never end
_LAX = pydantic.ConfigDict(coerce_numbers_to_str=True, allow_inf_nan=False, arbitrary_types_allowed=True)


def check_task(task: str, options: Mapping[str, Any]) -> None:
    """Raise ValueError if the package is missing, or the task or an option is wrong. Does not make any problem."""
    _make_dataset(task, _as_key(options))


def load_rows(task: str, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Make the problems of a task: the same ones in every process.

    Args:
        task: name of a reasoning-gym task.
        options: settings of the task by name; the seed is 0 unless it is set.

    Returns:
        One row per problem: 'text' is the question, 'answer' a right answer or None; 'task', 'options' and 'index' are
        what `score` needs to find the problem again.
    """
    key = _as_key(options)
    rows = []
    for index in range(len(_make_dataset(task, key))):
        problem = _make_problem(task, key, index)
        row = {"text": problem["question"], "answer": problem["answer"]}
        rows.append(row | {"source": PREFIX + task, "task": task, "options": json.loads(key), "index": index})
    return rows


def score(prompts: Sequence[str], completions: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Text reward: the task's own score of each extracted answer, in [0, 1]; 0 if the task cannot parse it.

    Most tasks give partial credit to a text that contains the answer ('12' for '2': 0.5); `solved` gives none.
    """
    return [_score_one(extract(text), row) for text, row in zip(completions, rows, strict=True)]


def solved(prompts: Sequence[str], completions: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Text reward: 1 if `score` is 1, else 0."""
    return [float(value == 1.0) for value in score(prompts, completions, rows)]


def extract(completion: str) -> str:
    """Return the text of the last <answer>...</answer>, or the first line that is not blank. Stripped.

    So text after the answer, such as a next question that the model invents, does not count.
    """
    tagged = _TAGGED.findall(completion)
    return tagged[-1].strip() if tagged else completion.strip().partition("\n")[0].strip()


def check_row(row: Mapping[str, Any]) -> None:
    """Raise ValueError if a row is not one that `load_rows` made with this version of reasoning-gym."""
    _problem_of(row)


def _problem_of(row: Mapping[str, Any]) -> dict[str, Any]:
    if not {"text", "task", "options", "index"} <= row.keys():
        raise ValueError(f"got a row with fields {sorted(row)}, want rows of a {PREFIX}TASK source")
    task, key, index = row["task"], _as_key(row["options"]), row["index"]
    problem = _make_problem(task, key, index)
    if problem["question"] != row["text"]:
        raise ValueError(
            f"problem {index} of {task} {key} differs from the text of its row; "
            "install the version of reasoning-gym that made the rows"
        )
    return problem


def _score_one(answer: str, row: Mapping[str, Any]) -> float:
    problem = _problem_of(row)
    if not answer or _HUGE.search(answer):
        return 0.0
    try:
        dataset = _make_dataset(row["task"], _as_key(row["options"]))
        value = dataset.score_answer(answer, copy.deepcopy(problem))
    except Exception:  # some scorers raise the errors of their parsers
        return 0.0
    return min(max(float(value), 0.0), 1.0)


def _as_key(options: Mapping[str, Any]) -> str:
    """Options as JSON text, which a cache can hash."""
    try:
        return json.dumps(dict(options), sort_keys=True)
    except TypeError as error:
        raise ValueError(f"config.data.task: got {dict(options)}, want numbers, texts and lists: {error}") from error


@functools.lru_cache(maxsize=8)
def _make_dataset(task: str, key: str) -> Any:
    try:
        datasets = importlib.import_module("reasoning_gym").factory.DATASETS
    except ImportError as error:
        raise ValueError(
            f"config.data.source: {PREFIX} needs the package reasoning-gym ({error}); "
            "run: pip install 'warp_jax[reasoning]'"
        ) from error
    if task not in datasets:
        raise ValueError(f"config.data.source: reasoning-gym has no task {task!r}; {_closest(task, datasets)}")
    if task in REFUSED:
        raise ValueError(f"config.data.source: reasoning-gym's {task} {REFUSED[task]}; choose another task")
    make, config_class = datasets[task]
    options = _validated(task, config_class, json.loads(key))
    try:
        return make(config_class(**{"seed": 0, **options}))
    except Exception as error:  # mostly assertions
        raise ValueError(f"config.data.task: reasoning-gym's {task} refuses {key}: {error}") from error


@functools.lru_cache(maxsize=2**16)
def _make_problem(task: str, key: str, index: int) -> dict[str, Any]:
    try:
        return _make_dataset(task, key)[index]
    except Exception as error:
        raise ValueError(f"config.data.task: {task} {key} cannot make problem {index}: {error}") from error


def _validated(task: str, config_class: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options converted to the types that the task declares; a single value may stand for a list of length 1."""
    hints = typing.get_type_hints(config_class)
    names = [field.name for field in dataclasses.fields(config_class)]
    for name in options:
        if name not in names:
            raise ValueError(f"config.data.task: {task} has no option {name!r}; {_closest(name, names)}")
    fields: dict[str, Any] = {name: (hints[name], ...) for name in options}
    given = {
        name: [value] if _is_list(hints[name]) and not isinstance(value, list | None) else value
        for name, value in options.items()
    }
    try:
        return vars(pydantic.create_model("Options", __config__=_LAX, **fields)(**given))
    except pydantic.ValidationError as error:
        name, reason = str(error.errors()[0]["loc"][0]), error.errors()[0]["msg"]
        raise ValueError(f"config.data.task.{name}: got {options[name]!r} for {task}: {reason}") from error


def _is_list(hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(map(_is_list, typing.get_args(hint)))
    return hint is tuple or origin in (list, tuple, Sequence)


def _closest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, names, n=5, cutoff=0.5)
    return f"did you mean {', '.join(close)}?" if close else f"want one of {', '.join(sorted(names))}"
