"""Results of lm-evaluation-harness: one JSON file for each model and task, and one table of them all.

Nothing here imports the harness: `make_record` takes what `lm_eval.simple_evaluate` returned.
"""

import csv
import dataclasses
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from warp_jax import files

# The paper's Table 2 in the harness's names. It does not say whether BBH was asked step by step; `bbh_zeroshot` is not.
TABLE_2 = ("mbpp", "mmlu", "gsm8k", "minerva_math", "humaneval", "bbh_cot_zeroshot")
RUN_CODE = ("mbpp", "humaneval")  # tasks whose name starts so run what the model wrote
CSV_COLUMNS = (
    *("task", "metric", "filter", "documents", "model", "value", "stderr"),
    *("difference", "difference_stderr"),  # from the first model
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a result depends on, beside the model and the task. num_fewshot: None is the task's own."""

    num_fewshot: int | None = 0
    limit: float | None = None
    dtype: str = "auto"
    apply_chat_template: bool = False


@dataclasses.dataclass(frozen=True)
class Score:
    """One metric of one model on one task.

    stderr: None if the harness gives none. values: of each document, by subtask; empty unless their mean is the value.
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
        """What makes scores of two models comparable."""
        return self.task, self.metric, self.filter


def parse_folders(items: Sequence[str]) -> dict[str, Path]:
    """NAME=FOLDER items to folders by name."""
    wrong = [item for item in items if "=" not in item]
    if wrong:
        raise ValueError(f"--folders: got {wrong[0]!r}, want NAME=FOLDER separated by commas")
    pairs = [item.split("=", 1) for item in items]
    check_names("--folders", [name for name, _ in pairs])
    for name, folder in pairs:
        if not (Path(folder) / "config.json").is_file():
            raise ValueError(f"--folders: {name}: no config.json in {folder}; want a Hugging Face folder")
    return {name: Path(folder) for name, folder in pairs}


def check_names(flag: str, names: Sequence[str]) -> None:
    """Names become those of files and columns: plain and each once."""
    for number, name in enumerate(names):
        if not re.fullmatch(r"[\w.+-]*\w[\w.+-]*", name):
            raise ValueError(f"{flag}: got the name {name!r}, want letters, digits, '_', '.', '+' and '-'")
        if name in names[:number]:
            raise ValueError(f"{flag}: the name {name} is given twice; every column needs its own")


def stage_name(stage: str) -> str:
    """The column of a stage: liti:0.3 -> liti_0.3, iteration_1/run_2 -> iteration_1_run_2."""
    return re.sub(r"[:/]", "_", stage)


def make_record(
    model: str, task: str, settings: Settings, model_hash: str, output: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of a result file. output: what the harness returned, with samples."""
    return {
        "model": model,
        "task": task,
        "settings": dataclasses.asdict(settings),
        "fingerprint": model_hash,
        "harness": {name: value for name, value in output.items() if name != "samples"},
        "values": _values(output["samples"]),
    }


def load_record(path: Path, settings: Settings, model_hash: str) -> dict[str, Any] | None:
    """A finished result, None if there is none, ValueError if it was measured otherwise."""
    if not path.is_file():
        return None
    record: dict[str, Any] = files.read_json(path)
    for name, want in (("settings", dataclasses.asdict(settings)), ("fingerprint", model_hash)):
        if record[name] != want:
            raise ValueError(f"{path}: has {name} {record[name]}, want {want}; delete it or choose another --out")
    return record


def scores(record: Mapping[str, Any]) -> list[Score]:
    """All metrics of a result: those of the task or group itself, or of each task of a tag."""
    results, task = record["harness"]["results"], record["task"]
    names = [task] if task in results else sorted(results)
    return [_score(record, name, key) for name in names for key in results[name] if _is_metric(key)]


def difference(score: Score, base: Score) -> tuple[float, float | None]:
    """Score minus base, and its standard error.

    Paired where the value of every document is known (subtasks are strata): both models answered the same documents,
    and neighbours on a front answer most of them alike. Otherwise as if the two were independent.
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
    """A row for each task and metric, a column for each model, then each model minus the first."""
    first, *others = columns
    head = ["task", "metric", "documents", *columns, *(f"{name} - {first}" for name in others)]
    lines = [head, ["---"] * len(head)]
    for row, by_model in _rows(columns):
        task, metric, filter_name = row
        label = metric if filter_name == "none" else f"{metric} ({filter_name})"
        cells = [_cell(by_model[m].value, by_model[m].stderr) if m in by_model else "" for m in columns]
        changes = [_change(by_model, m, first) for m in others]
        documents = str(next(iter(by_model.values())).documents)
        lines.append([task, label, documents, *cells, *(_cell(*c, sign="+") if c else "" for c in changes)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def csv_text(columns: Mapping[str, Sequence[Score]]) -> str:
    """A line for each task, metric and model, for plots."""
    first, text = next(iter(columns)), io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for row, by_model in _rows(columns):
        for model, score in by_model.items():
            change = _change(by_model, model, first) if model != first else None
            writer.writerow([*row, score.documents, model, score.value, score.stderr, *(change or (None, None))])
    return text.getvalue()


def _values(samples: Mapping[str, Iterable[Mapping[str, Any]]]) -> dict[str, dict[str, list[float]]]:
    """metric,filter -> subtask -> the value of each document, in the order of the documents."""
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
        *(name, metric, filter_name),
        documents=sum(sizes[part]["effective"] for part in parts),
        value=float(result[key]),
        stderr=float(stderr) if isinstance(stderr, int | float) else None,
        values=values if is_mean else {},
    )


def _is_metric(key: str) -> bool:
    return "," in key and not key.partition(",")[0].endswith("_stderr")


def _rows(columns: Mapping[str, Sequence[Score]]) -> list[tuple[tuple[str, str, str], dict[str, Score]]]:
    """Scores by row, then by model; rows in the order of their first appearance."""
    rows: dict[tuple[str, str, str], dict[str, Score]] = {}
    for model, column in columns.items():
        for score in column:
            rows.setdefault(score.row, {})[model] = score
    return list(rows.items())


def _change(by_model: Mapping[str, Score], model: str, first: str) -> tuple[float, float | None] | None:
    if model not in by_model or first not in by_model:
        return None
    return difference(by_model[model], by_model[first])


def _cell(value: float, stderr: float | None, sign: str = "") -> str:
    return f"{value:{sign}.4f}" + ("" if stderr is None else f" ± {stderr:.4f}")
