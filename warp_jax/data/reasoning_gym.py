"""Problems that check their own answers: the tasks of the PyPI package `reasoning-gym` (Stojanovski et al. 2025).

A source is 'reasoning_gym:TASK', or with the task's own settings 'reasoning_gym:chain_sum?size=2000&max_terms=2'.
"""

import copy
import dataclasses
import difflib
import functools
import importlib
import inspect
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

PREFIX = "reasoning_gym:"
# tasks of version 0.1.25 that cannot serve, and why; found by making and scoring problems of all 106
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
_HUGE = re.compile(r"[0-9]e[+-]?[0-9]{4}", re.IGNORECASE)  # 1e999999999 would keep an exact scorer busy for ever


def check_source(source: str) -> None:
    """Raise ValueError if the package, the task or one of its settings cannot be had; makes no problem."""
    _make_dataset(source)


def load_rows(source: str) -> list[dict[str, Any]]:
    """The problems of a source: 'text' is the question, 'answer' a right answer (None where the task keeps none);
    'source' and 'index' name the problem for score. The same in every process; the seed is 0 unless it is set.
    """
    rows = []
    for index in range(len(_make_dataset(source))):
        problem = _make_problem(source, index)
        rows.append({"text": problem["question"], "answer": problem["answer"], "source": source, "index": index})
    return rows


def score(prompts: Sequence[str], completions: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Text reward: the task's own score of each extracted answer, in [0, 1]; an answer it cannot read gets 0.

    Most tasks give a part of 1 to a text that only contains the answer ('12' for '2': 0.5); `solved` does not.
    """
    del prompts
    return [_score_one(extract(text), row) for text, row in zip(completions, rows, strict=True)]


def solved(prompts: Sequence[str], completions: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Text reward: 1 where score is 1, else 0."""
    return [float(value == 1.0) for value in score(prompts, completions, rows)]


def extract(completion: str) -> str:
    """What is inside the last <answer>...</answer>; without such a pair the first line that is not blank. Stripped.

    A model that goes on to a next question after its answer is thus judged by its answer alone.
    """
    tagged = _TAGGED.findall(completion)
    return tagged[-1].strip() if tagged else completion.strip().partition("\n")[0].strip()


def _score_one(answer: str, row: Mapping[str, Any]) -> float:
    if not {"text", "source", "index"} <= row.keys():
        raise ValueError(f"warp_jax.reasoning: a row has fields {sorted(row)}, want those of a reasoning_gym source")
    problem = _make_problem(row["source"], row["index"])
    if problem["question"] != row["text"]:
        raise ValueError(
            f"warp_jax.reasoning: problem {row['index']} of {row['source']!r} is not the one in the row; "
            "install the version of reasoning-gym that made the rows"
        )
    if not answer or _HUGE.search(answer):
        return 0.0
    try:
        value = _make_dataset(row["source"]).score_answer(answer, copy.deepcopy(problem))
    except Exception:  # some scorers raise whatever parsing the text raised
        return 0.0
    return min(max(float(value), 0.0), 1.0)


@functools.lru_cache(maxsize=8)
def _make_dataset(source: str) -> Any:
    task, settings = _parse(source)
    datasets = _import_factory().DATASETS
    if task not in datasets:
        raise ValueError(f"data.source: no reasoning-gym task {task!r}; {_close(task, datasets)}")
    if task in REFUSED:
        raise ValueError(f"data.source: reasoning-gym's {task} {REFUSED[task]}; choose another task")
    make, config_class = datasets[task]
    typed = _typed_settings(task, config_class, settings)
    try:
        return make(config_class(**{"seed": 0, **typed}))
    except Exception as error:  # asserts, mostly
        raise ValueError(f"data.source: reasoning-gym refuses {source!r}: {error}") from error


@functools.lru_cache(maxsize=2**16)
def _make_problem(source: str, index: int) -> dict[str, Any]:
    try:
        return _make_dataset(source)[index]
    except Exception as error:
        raise ValueError(f"data.source: reasoning-gym cannot make problem {index} of {source!r}: {error}") from error


def _import_factory() -> Any:
    try:
        importlib.import_module("reasoning_gym")  # registers the tasks
        return importlib.import_module("reasoning_gym.factory")
    except ImportError as error:
        raise ValueError(
            f"data.source: {PREFIX} needs the package reasoning-gym ({error}); run: pip install reasoning-gym==0.1.25"
        ) from error


def _parse(source: str) -> tuple[str, dict[str, str]]:
    """'reasoning_gym:TASK?name=value&...' as the task and its settings, which are not percent-decoded: + is a plus."""
    task, _, query = source.removeprefix(PREFIX).partition("?")
    settings: dict[str, str] = {}
    for part in query.split("&") if query else []:
        name, equals, value = part.partition("=")
        if not equals or name in settings:
            raise ValueError(f"data.source: got {part!r} in {source!r}, want name=value, each name once")
        settings[name] = value
    return task, settings


def _typed_settings(task: str, config_class: type, settings: Mapping[str, str]) -> dict[str, Any]:
    hints = typing.get_type_hints(config_class)
    names = [field.name for field in dataclasses.fields(config_class)]
    typed = {}
    for name, text in settings.items():
        if name not in names:
            raise ValueError(f"data.source: {task} has no setting {name!r}; {_close(name, names)}")
        try:
            typed[name] = _convert(hints[name], text)
        except (ValueError, KeyError) as error:
            wanted = inspect.formatannotation(hints[name])
            raise ValueError(f"data.source: {task} setting {name} is {text!r}, want {wanted}") from error
    return typed


def _convert(hint: Any, text: str) -> Any:
    """A setting's text as the type it is declared with; the items of a list are separated by commas."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _convert(next(arg for arg in args if arg is not types.NoneType), text)
    if hint is bool:
        return {"true": True, "false": False}[text.lower()]
    if hint in (int, float, str):
        return hint(text)
    if origin is typing.Literal:
        return {str(arg): arg for arg in args}[text]
    if hint is tuple or origin in (list, tuple, Sequence):
        make = list if origin is list else tuple
        return make(_convert(args[0] if args else str, item) for item in text.split(","))
    raise ValueError("not a type that text can be turned into")


def _close(name: str, names: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(name, names, n=5, cutoff=0.5)
    return f"did you mean {', '.join(close)}?" if close else f"want one of {', '.join(sorted(names))}"
