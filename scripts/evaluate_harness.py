"""Evaluate stages of a workdir, or Hugging Face model folders, with lm-evaluation-harness.

  python scripts/evaluate_harness.py --workdir=runs/x --stages=sft,liti:0.3,liti:1.0 --trust_code --out=runs/x/harness
  python scripts/evaluate_harness.py --folders=sft=exports/sft,other=exports/other --tasks=gsm8k,mmlu --out=comparison

Writes OUT/results/MODEL/TASK.json after each task, and a comparison of all models as OUT/table.md and OUT/table.csv.
Start it again to evaluate only the missing results. Needs `pip install 'warp_jax[evaluation]'`. See docs/evaluation.md.

The script calls `lm_eval.simple_evaluate` once per model and task instead of running `python -m lm_eval`, which saves
its results only after the last task of a model and reads 13,000 task files at every start. If a task fails, its
traceback is saved next to the results and the other tasks continue.
"""

import difflib
import functools
import gc
import json
import logging
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from warp_jax import cli, files
from warp_jax.benchmarks import harness
from warp_jax.settings.legacy import upgrade
from warp_jax.storage import model_files

INSTALL = "lm-evaluation-harness is not installed: pip install 'warp_jax[evaluation]' (or 'lm_eval[hf,math]')"
FOLDERS = flags.DEFINE_list("folders", [], "Model folders to evaluate, as NAME=FOLDER separated by commas.")
WORKDIR = flags.DEFINE_string("workdir", None, "Workdir with the --stages.")
STAGES = flags.DEFINE_list("stages", [], "Stages to export and evaluate, such as sft,iteration_1/merged,liti:0.3.")
OUT = flags.DEFINE_string("out", None, "Folder to write: results, exported models and tables.")
TASKS = flags.DEFINE_list("tasks", list(harness.TABLE_2), "Tasks of the harness; the default is the paper's Table 2.")
INCLUDE_PATH = flags.DEFINE_string("include_path", None, "Folder with YAML files of your own tasks.")
NUM_FEWSHOT = flags.DEFINE_integer("num_fewshot", 0, "Examples before each question; -1 = default of the task.", -1)
LIMIT = flags.DEFINE_float("limit", None, "Documents per (sub)task, or a fraction if below 1; default: all.", 0)
BATCH_SIZE = flags.DEFINE_string("batch_size", "1", "Documents per batch, or auto.")
DEVICE = flags.DEFINE_string("device", "", "Device of torch, such as cuda:1 or mps; default: cuda, else cpu.")
DTYPE = flags.DEFINE_enum(
    "dtype", "auto", ["auto", "bfloat16", "float16", "float32"], "Dtype of weights; auto: as saved (stages: float32)."
)
CHAT = flags.DEFINE_bool("apply_chat_template", False, "Apply the chat template of the tokenizer to questions.")
TRUST_CODE = flags.DEFINE_bool("trust_code", False, "Let mbpp and humaneval run code written by the model.")


class Model(NamedTuple):
    """A column of the table; `records` holds the result of each task, None if it is missing."""

    name: str
    folder: Path
    fingerprint: str
    records: dict[str, dict[str, Any] | None]


def main(argv: list[str]) -> None:
    """Export the stages, evaluate what is missing, write the tables."""
    del argv
    out = Path(OUT.value)
    try:
        _check_flags()
        folders = _folders(out)
        pending = any(not _path(out, name, task).is_file() for name in folders for task in TASKS.value)
        manager = _task_manager() if pending else None
        _export(out, folders)
        models = [_model(out, name, folder) for name, folder in folders.items()]
    except (ValueError, OSError) as error:
        cli.fail(error)
    for model in models:
        _evaluate(out, model, manager)
    _write_tables(out, models)
    failed = sum(record is None for model in models for record in model.records.values())
    if failed:
        print(f"{failed} evaluations failed: see *.error.txt in {out / 'results'}", file=sys.stderr)
        sys.exit(1)


def _check_flags() -> None:
    harness.check_names("--tasks", TASKS.value)
    coded = [task for task in TASKS.value if task.startswith(harness.RUN_CODE)]
    if coded and not TRUST_CODE.value:
        raise ValueError(
            f"--tasks: {' and '.join(coded)} run code written by the model: add --trust_code, or choose other --tasks"
        )
    if bool(WORKDIR.value) != bool(STAGES.value) or not (FOLDERS.value or STAGES.value):
        raise ValueError("got no models, want --folders=NAME=FOLDER,..., or --workdir and --stages")
    if not BATCH_SIZE.value.isdecimal() and BATCH_SIZE.value.split(":")[0] != "auto":
        raise ValueError(f"--batch_size: got {BATCH_SIZE.value!r}, want a number or auto")
    if LIMIT.value == 0:
        raise ValueError("--limit: got 0, want a number of documents, or a fraction below 1")
    if INCLUDE_PATH.value and not Path(INCLUDE_PATH.value).is_dir():
        raise ValueError(f"--include_path: got {INCLUDE_PATH.value}, want an existing folder")


def _folders(out: Path) -> dict[str, Path]:
    """Model folders by name, first --folders, then the exports of --stages, which may be missing."""
    folders = harness.parse_folders(FOLDERS.value)
    names = [harness.stage_name(stage) for stage in STAGES.value]
    harness.check_names("--folders and --stages", [*folders, *names])
    return folders | {name: out / "models" / name for name in names}


def _check_origin(out: Path) -> None:
    """Raise ValueError if the exports in `out` are of another workdir or another config."""
    workdir = files.as_path(WORKDIR.value)
    config = workdir / "config.json"
    if not config.is_file():
        raise ValueError(f"--workdir: no config.json in {WORKDIR.value}; want the workdir of a run of warp_jax.main")
    path = out / "origin.json"
    origin = {
        "workdir": str(workdir if files.is_remote(workdir) else workdir.resolve()),
        "config": upgrade(files.read_json(config)),
    }
    before = files.read_json(path) if path.exists() else origin
    if {**before, "config": upgrade(before["config"])} != origin:
        raise ValueError(f"--out: {out} holds exports of another workdir or config; choose another folder")
    files.write_json(path, origin)


def _export(out: Path, folders: dict[str, Path]) -> None:
    if STAGES.value:
        _check_origin(out)
    dtype = "float32" if DTYPE.value == "auto" else DTYPE.value
    stages = {stage: folders[harness.stage_name(stage)] for stage in STAGES.value}
    earlier = {stage: _read_report(folder, dtype) for stage, folder in stages.items()}
    for stage, folder in stages.items():
        report = earlier[stage] or _export_stage(stage, folder, dtype)
        for line in report["warnings"]:
            _progress(f"{stage}: warning: {line}")


def _export_stage(stage: str, folder: Path, dtype: str) -> dict[str, Any]:
    _progress(f"{stage}: exporting to {folder}")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # leaves the memory of the accelerator to torch
    from warp_jax.experiment import export  # noqa: PLC0415

    return export.export_stage(files.as_path(WORKDIR.value), stage, folder, dtype=dtype)


def _read_report(folder: Path, dtype: str) -> dict[str, Any] | None:
    """Report of an earlier export, None if there was none. Raises ValueError if it has another dtype."""
    if not (folder / "config.json").is_file():
        return None
    path = folder / model_files.EXPORT_REPORT
    report = files.read_json(path) if path.is_file() else {}
    if report.get("dtype") != dtype:
        found = report.get("dtype", f"an unknown dtype (no {path.name})")
        raise ValueError(f"--dtype: {folder} was exported as {found}, want {dtype}; choose another --out")
    return report


def _settings() -> harness.Settings:
    num_fewshot = NUM_FEWSHOT.value if NUM_FEWSHOT.value >= 0 else None
    return harness.Settings(num_fewshot, LIMIT.value, DTYPE.value, CHAT.value)


def _path(out: Path, name: str, task: str) -> Path:
    return out / "results" / name / f"{task}.json"


def _model(out: Path, name: str, folder: Path) -> Model:
    fingerprint = model_files.fingerprint(folder)
    records = {task: harness.load_record(_path(out, name, task), _settings(), fingerprint) for task in TASKS.value}
    return Model(name, folder, fingerprint, records)


def _task_manager() -> Any:
    """Index of the tasks in --include_path if it has all --tasks (saves 15 s); else with the harness's tasks too."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    if TRUST_CODE.value:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    try:
        from lm_eval.models.huggingface import HFLM  # noqa: F401, PLC0415
        from lm_eval.tasks import TaskManager  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise ValueError(f"{INSTALL}; {error}") from None
    if INCLUDE_PATH.value:
        manager = TaskManager(include_path=INCLUDE_PATH.value, include_defaults=False)
        if _all_known(manager.task_index, TASKS.value):
            return manager
    _progress("reading the harness's list of tasks")
    manager = TaskManager(include_path=INCLUDE_PATH.value)
    for task in TASKS.value:
        if task not in manager.task_index:
            near = ", ".join(difflib.get_close_matches(task, manager.all_tasks)) or "python -m lm_eval ls tasks"
            raise ValueError(
                f"--tasks: the harness has no {task!r}; try {near}, or --include_path for tasks of your own"
            )
    return manager


def _all_known(index: Any, tasks: list[Any]) -> bool:
    """Return True if the index has all tasks and all members of groups."""
    entries = [index.get(task) if isinstance(task, str) else None for task in tasks]
    if None in entries:
        return False
    return all(_all_known(index, entry.cfg["task"]) for entry in entries if entry.kind.name == "GROUP")


def _evaluate(out: Path, model: Model, manager: Any) -> None:
    """Evaluate the missing tasks of one model; the record of a task that fails stays None."""
    load = functools.cache(lambda: _load_model(model.folder))
    for number, task in enumerate(TASKS.value, 1):
        label = f"{model.name}, {task} ({number} of {len(TASKS.value)})"
        if model.records[task]:
            _progress(f"{label}: already evaluated, skipped")
            continue
        _progress(f"{label}: started")
        started, path = time.monotonic(), _path(out, model.name, task)
        try:
            model.records[task] = _run_task(model, load(), task, manager)
        except Exception as error:  # any library may raise; the other tasks continue
            files.write_text(path.with_suffix(".error.txt"), traceback.format_exc())
            _progress(f"{label}: failed: {type(error).__name__}: {error}"[:400])
            continue
        files.write_json(path, model.records[task])
        path.with_suffix(".error.txt").unlink(missing_ok=True)
        _progress(f"{label}: done in {time.monotonic() - started:.0f} s")
    load.cache_clear()
    gc.collect()


def _progress(text: str) -> None:
    print(" ".join(text.split()), file=sys.stderr, flush=True)


def _load_model(folder: Path) -> Any:
    from lm_eval.models.huggingface import HFLM  # noqa: PLC0415

    # device "": cuda if there is one, else cpu
    return HFLM(pretrained=str(folder), device=DEVICE.value, dtype=DTYPE.value, batch_size=BATCH_SIZE.value)


def _run_task(model: Model, loaded: Any, task: str, manager: Any) -> dict[str, Any]:
    """Evaluate one task; return its record as JSON values."""
    import lm_eval  # noqa: PLC0415
    from lm_eval.utils import handle_non_serializable  # noqa: PLC0415

    settings = _settings()
    output = lm_eval.simple_evaluate(
        model=loaded,
        tasks=[task],
        task_manager=manager,
        num_fewshot=settings.num_fewshot,
        limit=settings.limit,
        apply_chat_template=settings.apply_chat_template,
        fewshot_as_multiturn=settings.apply_chat_template,
        confirm_run_unsafe_code=TRUST_CODE.value,
    )
    record = harness.make_record(model.name, task, settings, model.fingerprint, output)
    plain: dict[str, Any] = json.loads(json.dumps(record, default=handle_non_serializable))
    return plain


def _write_tables(out: Path, models: list[Model]) -> None:
    columns = {
        model.name: [score for record in model.records.values() if record for score in harness.scores(record)]
        for model in models
    }
    table = harness.markdown(columns)
    files.write_text(out / "table.md", table)
    files.write_text(out / "table.csv", harness.csv_text(columns))
    print(f"{table}{out / 'table.md'}")


if __name__ == "__main__":
    cli.run(main, required=("out",), example="--folders=sft=exports/sft --tasks=gsm8k --out=results")
