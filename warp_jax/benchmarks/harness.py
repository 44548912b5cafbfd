"""Results of lm-evaluation-harness: JSON records for each model and task, and tables that compare the models.

This file does not import the harness: `make_record` takes the output of `lm_eval.simple_evaluate`.
"""

import csv
import io
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from warp_jax import files

# The tasks of the paper's Table 2. The paper does not say if BBH used step-by-step prompts; `bbh_zeroshot` does not.
TABLE_2 = ("mbpp", "mmlu", "gsm8k", "minerva_math", "humaneval", "bbh_cot_zeroshot")
RUN_CODE = ("mbpp", "humaneval")  # prefixes of the tasks that execute code written by the model
CSV_COLUMNS = (
    *("task", "metric", "filter", "documents", "model", "value", "stderr"),
    *("difference", "difference_stderr"),  # to the first model
)


class Settings(NamedTuple):
    """Settings of an evaluation, saved with each result. num_fewshot None: the task's default."""

    num_fewshot: int | None = 0
    limit: float | None = None
    dtype: str = "auto"
    apply_chat_template: bool = False


class Score(NamedTuple):
    """One metric of one model on one task.

    stderr: standard error, None if the harness gives none. values: one value per document, by subtask; empty if their
    mean differs from `value`.
    """

    task: str
    metric: str
    filter: str
    documents: int
    value: float
    stderr: float | None
    values: Mapping[str, Sequence[float]]

    @property
    def row(self) -> tuple[str, str, str]:
        """Key of the table row: scores of different models with the same key are comparable."""
        return self.task, self.metric, self.filter


def parse_folders(items: Sequence[str]) -> dict[str, Path]:
    """Parse NAME=FOLDER items; raise ValueError for a bad name or a folder without config.json."""
    wrong = [item for item in items if "=" not in item]
    if wrong:
        raise ValueError(f"--folders: got {wrong[0]!r}, want NAME=FOLDER items separated by commas")
    pairs = [item.split("=", 1) for item in items]
    check_names("--folders", [name for name, _ in pairs])
    for name, folder in pairs:
        if not (Path(folder) / "config.json").is_file():
            raise ValueError(f"--folders: {name}: no config.json in {folder}; want a Hugging Face model folder")
    return {name: Path(folder) for name, folder in pairs}


def check_names(flag: str, names: Sequence[str]) -> None:
    """Raise ValueError unless the names are unique and usable as file names."""
    for number, name in enumerate(names):
        if not re.fullmatch(r"[\w.+-]*\w[\w.+-]*", name):
            raise ValueError(f"{flag}: got the name {name!r}, want only letters, digits, '_', '.', '+' and '-'")
        if name in names[:number]:
            raise ValueError(f"{flag}: the name {name} is given twice; want a different name for each column")


def stage_name(stage: str) -> str:
    """Column name of a stage: liti:0.3 -> liti_0.3, iteration_1/run_2 -> iteration_1_run_2."""
    return re.sub(r"[:/]", "_", stage)


def make_record(
    model: str, task: str, settings: Settings, model_hash: str, output: Mapping[str, Any]
) -> dict[str, Any]:
    """Content of a result file, from the output of the harness with its samples."""
    return {
        "model": model,
        "task": task,
        "settings": settings._asdict(),
        "fingerprint": model_hash,
        "harness": {name: value for name, value in output.items() if name != "samples"},
        "values": _values(output["samples"]),
    }


def load_record(path: Path, settings: Settings, model_hash: str) -> dict[str, Any] | None:
    """Read a saved result, None if missing; raise ValueError if it has other settings or other weights."""
    if not path.is_file():
        return None
    record: dict[str, Any] = files.read_json(path)
    for name, want in (("settings", settings._asdict()), ("fingerprint", model_hash)):
        if record[name] != want:
            raise ValueError(f"{path}: got {name} {record[name]}, want {want}; delete it or choose another --out")
    return record


def scores(record: Mapping[str, Any]) -> list[Score]:
    """All metrics of a result: of its task or group; if it was made for a tag, of every task with that tag."""
    results, task = record["harness"]["results"], record["task"]
    names = [task] if task in results else sorted(results)
    keys = [(name, key) for name in names for key in results[name] if "," in key and "_stderr," not in key]
    return [_score(record, name, key) for name, key in keys]  # a key is "metric,filter" or "metric_stderr,filter"


def difference(score: Score, base: Score) -> tuple[float, float | None]:
    """Score minus base, and its standard error.

    The error is paired over documents, with subtasks as strata, if both scores have the value of every document: models
    that are close on a front give mostly the same answers. Otherwise the two scores are treated as independent.
    """
    change = score.value - base.value
    shape, base_shape = ({name: len(v) for name, v in s.values.items()} for s in (score, base))
    if shape and shape == base_shape and min(shape.values()) > 1:
        strata = [np.subtract(score.values[name], base.values[name]) for name in shape]
        variance = sum(len(d) * float(np.var(d, ddof=1)) for d in strata) / sum(shape.values()) ** 2
        return change, math.sqrt(variance)
    if score.stderr is None or base.stderr is None:
        return change, None
    return change, math.hypot(score.stderr, base.stderr)


def markdown(columns: Mapping[str, Sequence[Score]]) -> str:
    """Markdown table: a row for each task and metric, a column for each model, then each model minus the first."""
    first, *others = columns
    head = ["task", "metric", "documents", *columns, *(f"{name} - {first}" for name in others)]
    lines = [head, ["---"] * len(head)]
    for by_model, changes in _rows(columns):
        task, metric, filter_name, documents = next(iter(by_model.values()))[:4]
        label = metric if filter_name == "none" else f"{metric} ({filter_name})"
        cells = [_cell(by_model[m].value, by_model[m].stderr) if m in by_model else "" for m in columns]
        cells += [_cell(*changes[m], sign="+") if m in changes else "" for m in others]
        lines.append([task, label, str(documents), *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def csv_text(columns: Mapping[str, Sequence[Score]]) -> str:
    """CSV table for plots: a line for each task, metric and model."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for by_model, changes in _rows(columns):
        for model, score in by_model.items():
            change = changes.get(model, (None, None))
            writer.writerow([*score.row, score.documents, model, score.value, score.stderr, *change])
    return text.getvalue()


def _values(samples: Mapping[str, Iterable[Mapping[str, Any]]]) -> dict[str, dict[str, list[float]]]:
    """Values of the documents, in order, by "metric,filter" and subtask."""
    values: dict[str, dict[str, list[float]]] = {}
    for name, documents in samples.items():
        for document in sorted(documents, key=lambda document: document["doc_id"]):
            for metric in document["metrics"]:
                if isinstance(document[metric], bool | int | float):
                    by_name = values.setdefault(f"{metric},{document['filter']}", {})
                    by_name.setdefault(name, []).append(float(document[metric]))
    return values


def _score(record: Mapping[str, Any], name: str, key: str) -> Score:
    result, sizes = record["harness"]["results"][name], record["harness"]["n-samples"]
    metric, _, filter_name = key.partition(",")
    stderr = result.get(f"{metric}_stderr,{filter_name}")
    values = record["values"].get(key, {})
    parts = list(sizes) if name not in sizes else [name]
    values = {part: values[part] for part in parts if part in values}
    every = [value for part in values.values() for value in part]
    is_mean = bool(every) and math.isclose(float(np.mean(every)), result[key], rel_tol=1e-9, abs_tol=1e-12)
    return Score(
        task=name,
        metric=metric,
        filter=filter_name,
        documents=sum(sizes[part]["effective"] for part in parts),
        value=float(result[key]),
        stderr=float(stderr) if isinstance(stderr, int | float) else None,
        values=values if is_mean else {},
    )


def _rows(
    columns: Mapping[str, Sequence[Score]],
) -> Iterator[tuple[dict[str, Score], dict[str, tuple[float, float | None]]]]:
    """Yield the scores of each table row by model, and the differences of the other models to the first.

    Rows keep the order in which they first appear.
    """
    rows: dict[tuple[str, str, str], dict[str, Score]] = {}
    for model, column in columns.items():
        for score in column:
            rows.setdefault(score.row, {})[model] = score
    first, *others = columns
    for by_model in rows.values():
        both = [model for model in others if {model, first} <= by_model.keys()]
        yield by_model, {model: difference(by_model[model], by_model[first]) for model in both}


def _cell(value: float, stderr: float | None, sign: str = "") -> str:
    return f"{value:{sign}.4f}" + ("" if stderr is None else f" ± {stderr:.4f}")
