"""Evaluate Hugging Face folders, or stages of a workdir, with lm-evaluation-harness.

  python scripts/evaluate_harness.py --workdir=runs/x --stages=sft,liti:0.3,liti:1.0 --trust_code --out=runs/x/harness
  python scripts/evaluate_harness.py --folders=sft=exports/sft,other=exports/other --tasks=gsm8k,mmlu --out=comparison

writes OUT/results/MODEL/TASK.json as each task is finished, and OUT/table.md and OUT/table.csv over all of them.
Started again, it evaluates only what is missing. Needs `pip install 'warp_jax[evaluation]'`. See docs/evaluation.md.

The harness runs in this process, through `lm_eval.simple_evaluate`, and not as `python -m lm_eval`. The program writes
results only when all tasks of a model are done, goes on with a warning when it cannot write them, and reads its 13,000
task files at each start: one start for each model loses finished tasks to a kill, one for each task reads these files
and the model every time. Here every error arrives with its type and is kept beside the results, and the rest goes on.
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

from absl import app, flags

from warp_jax import cli, files
from warp_jax.benchmarks import harness

INSTALL = "lm-evaluation-harness is not installed: pip install 'warp_jax[evaluation]' (or 'lm_eval[hf,math]')"
FOLDERS = flags.DEFINE_list("folders", [], "NAME=FOLDER of Hugging Face folders, separated by commas.")
WORKDIR = flags.DEFINE_string("workdir", None, "A finished workdir, for --stages.")
STAGES = flags.DEFINE_list(
    "stages", [], "sft, iteration_1/run_2, iteration_1/merged, liti:0.3: exported to OUT/models."
)
OUT = flags.DEFINE_string("out", None, "Folder for results, exports and the table.")
TASKS = flags.DEFINE_list("tasks", list(harness.TABLE_2), "Names of the harness; default: the paper's Table 2.")
INCLUDE_PATH = flags.DEFINE_string("include_path", None, "Folder with task YAMLs of your own.")
NUM_FEWSHOT = flags.DEFINE_integer("num_fewshot", 0, "Examples before each question; -1: each task's own.", -1)
LIMIT = flags.DEFINE_float("limit", None, "Documents of each (sub)task, a share if below 1; for a trial.", 0)
BATCH_SIZE = flags.DEFINE_string("batch_size", "1", "A number, or auto.")
DEVICE = flags.DEFINE_string("device", None, "cuda, cuda:1, mps, cpu; default: cuda if there is one.")
DTYPE = flags.DEFINE_enum(
    "dtype", "auto", ["auto", "bfloat16", "float16", "float32"], "Of the weights; auto: as saved."
)
CHAT = flags.DEFINE_bool("apply_chat_template", False, "Put questions into the tokenizer's chat template.")
TRUST_CODE = flags.DEFINE_bool("trust_code", False, "Let mbpp and humaneval run what the model wrote, on this machine.")


class Model(NamedTuple):
    """A column of the table: its folder, the folder's fingerprint and the finished results by task."""

    name: str
    folder: Path
    fingerprint: str
    records: dict[str, dict[str, Any]]


def main(argv: list[str]) -> None:
    """Entry point."""
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
        cli.fail(str(error))
    failed = sum(_evaluate(out, model, manager) for model in models)
    _write_tables(out, models)
    if failed:
        print(f"{failed} evaluations failed: see the lines above and *.error.txt in {out / 'results'}", file=sys.stderr)
        sys.exit(1)


def _check_flags() -> None:
    harness.check_names("--tasks", TASKS.value)
    coded = [task for task in TASKS.value if task.startswith(harness.RUN_CODE)]
    if coded and not TRUST_CODE.value:
        raise ValueError(
            f"{' and '.join(coded)} run code that the model wrote: add --trust_code, or choose other --tasks"
        )
    if bool(WORKDIR.value) != bool(STAGES.value) or not (FOLDERS.value or STAGES.value):
        raise ValueError("want --folders=NAME=FOLDER,..., or --workdir and --stages")
    if not BATCH_SIZE.value.isdecimal() and BATCH_SIZE.value.split(":")[0] != "auto":
        raise ValueError(f"--batch_size: got {BATCH_SIZE.value!r}, want a number or auto")
    if LIMIT.value == 0:
        raise ValueError("--limit: got 0, want a number of documents, or a share below 1")
    if INCLUDE_PATH.value and not Path(INCLUDE_PATH.value).is_dir():
        raise ValueError(f"--include_path: no folder {INCLUDE_PATH.value}")


def _folders(out: Path) -> dict[str, Path]:
    """Folders by name, first those of --folders; those of stages need not be there yet."""
    folders = harness.parse_folders(FOLDERS.value)
    names = [harness.stage_name(stage) for stage in STAGES.value]
    harness.check_names("--folders and --stages", [*folders, *names])
    return folders | {name: out / "models" / name for name in names}


def _check_origin(out: Path) -> None:
    """Exports of another workdir, or of one made anew with another config, are not taken for this one's."""
    config = Path(WORKDIR.value) / "config.json"
    if not config.is_file():
        raise ValueError(f"--workdir: {WORKDIR.value} has no config.json, want a folder that warp_jax.main made")
    origin, path = {"workdir": str(config.parent.resolve()), "config": files.read_json(config)}, out / "origin.json"
    if path.exists() and files.read_json(path) != origin:
        raise ValueError(f"--out: {out} holds exports of another workdir or config; choose another folder")
    files.write_json(path, origin)


def _export(out: Path, folders: dict[str, Path]) -> None:
    if STAGES.value:
        _check_origin(out)
    for stage in STAGES.value:
        folder = folders[harness.stage_name(stage)]
        if (folder / "config.json").is_file():
            continue
        _progress(f"{stage}: exporting to {folder}")
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # or JAX would take the accelerator's memory from torch
        from warp_jax.experiment import export  # noqa: PLC0415

        export.export_stage(Path(WORKDIR.value), stage, folder)


def _settings() -> harness.Settings:
    num_fewshot = NUM_FEWSHOT.value if NUM_FEWSHOT.value >= 0 else None
    return harness.Settings(num_fewshot, LIMIT.value, DTYPE.value, CHAT.value)


def _path(out: Path, name: str, task: str) -> Path:
    return out / "results" / name / f"{task}.json"


def _model(out: Path, name: str, folder: Path) -> Model:
    fingerprint = files.fingerprint(folder)
    found = ((task, harness.load_record(_path(out, name, task), _settings(), fingerprint)) for task in TASKS.value)
    return Model(name, folder, fingerprint, {task: record for task, record in found if record})


def _task_manager() -> Any:
    """The harness's index of tasks: of --include_path alone if that is enough, which saves a quarter of a minute."""
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
    """Whether the index holds the tasks and, of groups, all members."""
    entries = [index.get(task) if isinstance(task, str) else None for task in tasks]
    if None in entries:
        return False
    return all(_all_known(index, entry.cfg["task"]) for entry in entries if entry.kind.name == "GROUP")


def _evaluate(out: Path, model: Model, manager: Any) -> int:
    """Evaluate what is missing of one model; returns how many evaluations failed."""
    failed = 0
    load = functools.cache(lambda: _load_model(model.folder))
    for number, task in enumerate(TASKS.value, 1):
        label = f"{model.name}, {task} ({number} of {len(TASKS.value)})"
        if task in model.records:
            _progress(f"{label}: found, skipped")
            continue
        _progress(f"{label}: started")
        started, path = time.monotonic(), _path(out, model.name, task)
        try:
            model.records[task] = _run_task(model, load(), task, manager)
        except Exception as error:  # of any library below: the other tasks go on
            files.write_text(path.with_suffix(".error.txt"), traceback.format_exc())
            _progress(f"{label}: failed: {type(error).__name__}: {error}"[:400])
            failed += 1
            continue
        files.write_json(path, model.records[task])
        path.with_suffix(".error.txt").unlink(missing_ok=True)
        _progress(f"{label}: done in {time.monotonic() - started:.0f} s")
    load.cache_clear()
    gc.collect()
    return failed


def _progress(text: str) -> None:
    print(" ".join(text.split()), file=sys.stderr, flush=True)


def _load_model(folder: Path) -> Any:
    import torch  # noqa: PLC0415
    from lm_eval.models.huggingface import HFLM  # noqa: PLC0415

    device = DEVICE.value or ("cuda" if torch.cuda.is_available() else "cpu")
    batch_size = int(BATCH_SIZE.value) if BATCH_SIZE.value.isdecimal() else BATCH_SIZE.value
    return HFLM(pretrained=str(folder), device=device, dtype=DTYPE.value, batch_size=batch_size)


def _run_task(model: Model, loaded: Any, task: str, manager: Any) -> dict[str, Any]:
    """The record of one result, in plain JSON values."""
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
        model.name: [
            score for task in TASKS.value if task in model.records for score in harness.scores(model.records[task])
        ]
        for model in models
    }
    table = harness.markdown(columns)
    files.write_text(out / "table.md", table)
    files.write_text(out / "table.csv", harness.csv_text(columns))
    print(f"{table}{out / 'table.md'}")


if __name__ == "__main__":
    parse_flags = functools.partial(
        cli.parse_flags, required=("out",), example="--folders=sft=exports/sft --tasks=gsm8k --out=results"
    )
    app.run(main, flags_parser=parse_flags)
