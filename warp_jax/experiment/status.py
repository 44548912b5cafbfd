"""Content of a workdir: each part of its job in order, and what a start of the same command would do next.

Reads only, and imports no Orbax and no data libraries, so that it starts fast.
"""

import csv
import dataclasses
import datetime
import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from warp_jax import files
from warp_jax.evaluation import measure, points
from warp_jax.settings import Settings, from_saved
from warp_jax.storage import manifest
from warp_jax.training import metric_writer
from warp_jax.types import StorageError

DONE, RUNNING, SAVED, NOT_BEGUN, DAMAGED = "done", "running", "saved", "not begun", "damaged"
UNFINISHED, BROKEN = 3, 2  # exit codes; 0 = all parts are done
DELETE = "delete it to make it again"
REPORT = ("front.csv", "summary.json", "front.png", "report.html")


class Part(NamedTuple):
    """A part of a job, as its workdir shows it."""

    name: str
    state: str  # DONE, RUNNING, SAVED, NOT_BEGUN or DAMAGED
    done: int = 0  # steps or evaluations
    total: int = 0  # 0: the part has no steps
    unit: str = "step"
    note: str = ""  # time left, a state that is skipped; for DAMAGED: which file, and what to delete


def read(workdir: Path, *, verify: bool = False) -> list[Part]:
    """The parts of a whole job, in the order in which it makes them.

    verify: read every file and compare it with its checksum; else only existence is looked at.
    Raises ValueError if the folder has no config.json, or one that is damaged.
    """
    path = workdir / "config.json"
    if not path.is_file():
        raise ValueError(f"{workdir} has no config.json, want a folder that warp-jax run made")
    content = files.read_json(path)
    try:
        settings = from_saved(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; correct it in that file, or restore it") from error
    return _Reader(settings, workdir, verify).parts()


def describe(part: Part) -> str:
    """The state of a part in one phrase."""
    if part.state == DAMAGED:
        return DAMAGED
    count = f"{part.unit} {part.done} of {part.total}" if part.total else ""
    state = f"saved at {count}" if part.state == SAVED else part.state
    return ", ".join(filter(None, [state, count if part.state == RUNNING else "", part.note]))


def next_lines(parts: Sequence[Part]) -> list[str]:
    """Say what a start of the same command would do next; or give a line for each damage."""
    if damaged := [f"{DAMAGED}: {part.note}" for part in parts if part.state == DAMAGED]:
        return damaged
    part = next((part for part in parts if part.state != DONE), None)
    if part is None:
        return ["next: nothing is left; a start writes the report again"]
    if part.state == RUNNING:
        return [f"next: {part.name} is being made by another process; wait for it, or stop it"]
    if part.state == SAVED:
        return [f"next: a start continues {part.name} from {part.unit} {part.done} of {part.total}"]
    return [f"next: a start begins {part.name}"]


def progress(workdir: Path, left: str = "") -> dict[str, Any]:
    """The state of all parts of a job, for the report. left: the time left, which a running job knows itself."""
    parts = [part for part in read(workdir) if part.name != "report"]
    trained = [part for part in parts if part.unit == "step" and part.total]
    return {
        "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "finished": exit_code(parts) == 0,
        "steps": [sum(part.done for part in trained), sum(part.total for part in trained)],
        "left": left,
        "parts": [{"part": part.name, "state": describe(part)} for part in parts],
    }


def exit_code(parts: Iterable[Part]) -> int:
    """0 if all parts are done, BROKEN if one is damaged, else UNFINISHED."""
    states = {part.state for part in parts}
    return BROKEN if DAMAGED in states else UNFINISHED if states - {DONE} else 0


def minutes_left(folder: Path, done: int, total: int) -> str:
    """Time left of a running training, from its steps since a save, or since the process began to write its log."""
    started = max((float(path.name.split(".")[3]) for path in folder.glob("events.out.tfevents.[0-9]*")), default=0.0)
    times = {step: _time(folder / "state" / str(step)) for step in _saved_steps(folder)}
    saves = [(time, step) for step, time in times.items() if time > started]
    since, before = min(saves, default=(started, max(times, default=0)))
    seconds = _time(folder / metric_writer.FILE) - since
    if not started or done <= before or seconds <= 0:
        return ""
    return f"about {(total - done) * seconds / (done - before) / 60:.1f} min left"


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Reads the parts of one workdir."""

    settings: Settings
    workdir: Path
    verify: bool

    def parts(self) -> list[Part]:
        settings, warp = self.settings, self.settings.warp
        shared = self.workdir / "lock"  # of inputs, SFT and reward model: the first unfinished one is running
        parts = [self.inputs(shared)]
        for name, steps in (
            ("sft", settings.sft.num_steps),
            ("reward_model", settings.needs_reward_model * settings.reward_model.num_steps),
        ):
            if steps:
                is_next = all(part.state == DONE for part in parts)
                parts.append(self.trained(name, steps, shared if is_next else None, {}))
        parts.append(self.evaluated("evaluation of sft", {"sft"}))
        for i in range(1, warp.num_iterations + 1):
            for run in range(1, warp.num_runs + 1):
                name = f"iteration_{i}/run_{run}"
                last, lock = points.last_step(settings, self.workdir, i, run), self.workdir / name / "lock"
                evaluations = points.trajectory(settings, i, run, last)
                parts.append(self.trained(name, last, lock, evaluations, points.saved_weights(settings, last)))
                fronts = points.run_names(settings, i, run, last) - {*evaluations.values(), "sft"}
                parts += [self.evaluated(f"fronts of {name}", fronts)] if fronts else []
            parts.append(self.merged(f"iteration_{i}/merged"))
            parts.append(self.evaluated(f"front of iteration_{i}", points.front_names(settings, i) - {"sft"}))
        return [*parts, self.report()]

    def inputs(self, lock: Path) -> Part:
        """Tokenizer and gold reward, if they are made here; the fingerprints of models and rows are only checked."""
        made = {
            "tokenizer.json": not self.settings.model.source,
            "gold/gold.json": self.settings.gold.source == "tfidf",
        }
        fingerprints = [self.workdir / name for name in ("models.json", "data.json", "rewards.json")]
        needed = [self.workdir / name for name, is_made in made.items() if is_made]
        damage = self.json_damage(fingerprints, "restore it, or delete it if models and rows are those of before")
        damage = damage or self.json_damage([*needed, self.workdir / "gold" / "summary.json"])
        if self.verify and not damage and (changed := manifest.changed(self.workdir)):
            damage = f"{changed}; {DELETE}"
        if damage:
            return Part("inputs", DAMAGED, note=damage)
        if all(path.exists() for path in needed):
            return Part("inputs", DONE)
        return _running_or_not("inputs", lock)

    def trained(
        self,
        name: str,
        steps: int,
        lock: Path | None,
        evaluations: Mapping[int, str],
        saved: Sequence[str] = ("params",),
    ) -> Part:
        """SFT, the reward model or a run. evaluations: made on the way, by step; saved: its folders of weights."""
        folder = self.workdir / name
        if not all(manifest.is_complete(folder / kind) for kind in saved):
            if lock and (owner := files.owner(lock)):
                return _running(name, folder, lock, steps, owner)
            part = self.saved(name, folder / "state", steps)
        elif damage := self.first_damage(folder, saved) or self.json_damage(folder.glob("*.json")):
            part = Part(name, DAMAGED, note=damage)
        else:
            part = Part(name, DONE, steps, steps)
        if part.state != DAMAGED and (damage := self.trajectory_damage(folder, evaluations, part.done)):
            return Part(name, DAMAGED, note=damage)
        if part.state == DONE and not all(self.evaluation(x).exists() for x in evaluations.values()):
            return part._replace(state=SAVED)  # the last evaluation is made from the weights
        return part

    def saved(self, name: str, state: Path, steps: int) -> Part:
        """Unfinished training: it continues from the newest state that is not damaged."""
        saved = _saved_steps(state.parent)
        if not saved:
            return Part(name, NOT_BEGUN, 0, steps)
        damage = {step: manifest.damage(state / str(step)) if self.verify else "" for step in saved}
        newest = damage[saved[0]]
        whole = [step for step in saved if not damage[step]]
        if not whole:
            return Part(name, DAMAGED, note=f"{newest}; delete {state} to train this part from its start")
        return Part(name, SAVED, whole[0], steps, note=f"{newest}: it is left out" if newest else "")

    def merged(self, name: str) -> Part:
        """The merge of an iteration, and the angles between its runs, which are written before it."""
        merged, geometry = self.workdir / name, (self.workdir / name).with_name("geometry.json")
        if not manifest.is_complete(merged):
            return _running_or_not(name, merged.with_name("lock"))
        damage = self.weights_damage(merged)
        if not damage and not geometry.exists():
            damage = f"{geometry} is missing; delete {merged} to make both again"
        damage = damage or self.json_damage([geometry], f"delete it and {merged} to make both again")
        return Part(name, DAMAGED, note=damage) if damage else Part(name, DONE)

    def evaluated(self, name: str, evaluations: Iterable[str]) -> Part:
        """Evaluations of policies that can be made from saved weights."""
        paths = [self.evaluation(x) for x in sorted(evaluations)]
        found = [path for path in paths if path.exists()]
        for path in found:
            if self.is_broken(path):
                return Part(name, DAMAGED, note=f"{path} is not what was written; {DELETE}")
        state = DONE if len(found) == len(paths) else SAVED if found else NOT_BEGUN
        return Part(name, state, len(found), len(paths), "evaluation")

    def report(self) -> Part:
        """The report is done if front.csv has the points of the config, which front.etas may have changed since."""
        paths = [self.workdir / name for name in REPORT]
        if not all(path.exists() for path in paths):
            return Part("report", NOT_BEGUN)
        if damage := self.json_damage([self.workdir / "summary.json"]):
            return Part("report", DAMAGED, note=damage)
        last_step = functools.partial(points.last_step, self.settings, self.workdir)
        is_current = _evaluations_in(paths[0]) == points.evaluation_names(self.settings, last_step)
        return Part("report", DONE if is_current else NOT_BEGUN)

    def evaluation(self, name: str) -> Path:
        return self.workdir / "evaluations" / f"{name}.npz"

    def is_broken(self, evaluation: Path) -> bool:
        try:
            if self.verify:
                measure.load_evaluation(evaluation)
        except StorageError:
            return True
        return False

    def trajectory_damage(self, folder: Path, evaluations: Mapping[int, str], done: int) -> str:
        """Name the damage of a run's evaluations. Policies before step `done` are not saved: they are trained again."""
        for step, name in evaluations.items():
            path = self.evaluation(name)
            if not path.exists():
                if step < done and step not in self.settings.keep.steps:
                    return f"{path} is missing, and its policy is not saved; delete {folder} to make both again"
            elif self.is_broken(path):
                lost = step < done and step not in self.settings.keep.steps
                also = f" and {folder}, whose policy of that step is not saved," if lost else ""
                return f"{path} is not what was written; delete it{also} to make it again"
        return ""

    def first_damage(self, folder: Path, saved: Iterable[str]) -> str:
        return next(filter(None, (self.weights_damage(folder / kind) for kind in saved)), "")

    def weights_damage(self, folder: Path) -> str:
        damage = manifest.damage(folder) if self.verify else ""
        return f"{damage}; delete {folder} to make it again" if damage else ""

    def json_damage(self, paths: Iterable[Path], advice: str = DELETE) -> str:
        for path in paths if self.verify else ():
            try:
                if path.exists():
                    files.read_json(path)
            except ValueError:
                return f"{path} is not what was written; {advice}"
        return ""


def _running_or_not(name: str, lock: Path) -> Part:
    owner = files.owner(lock)
    return Part(name, RUNNING if owner else NOT_BEGUN, note=_named(owner))


def _named(owner: str) -> str:
    """Note with the owner of a lock, "" if its name is unknown."""
    return "" if owner in ("", files.ANOTHER) else f"by {owner}"


def _running(name: str, folder: Path, lock: Path, steps: int, owner: str) -> Part:
    log = folder / metric_writer.FILE
    if files.is_remote(folder):  # a bucket gets the rows with each save only
        return Part(name, RUNNING, max(_saved_steps(folder), default=0), steps, note=_named(owner))
    if _time(log) < _time(lock):  # the rows are of an earlier process; those after its last save are made again
        return Part(name, RUNNING, max(_saved_steps(folder), default=0), steps)
    done = len(metric_writer.read_rows(log))
    return Part(name, RUNNING, done, steps, note=minutes_left(folder, done, steps))


def _saved_steps(folder: Path) -> list[int]:
    """Steps of the saved states of a training, newest first."""
    return manifest.complete_steps(folder / "state")


def _time(path: Path) -> float:
    """When a file was last written; 0 if it is missing."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _evaluations_in(front: Path) -> set[str]:
    """Names of the evaluations that front.csv shows; empty if it is broken."""
    try:
        return {
            points.evaluation_name(
                row["stage"], int(row["iteration"]), int(row["run"]), float(row["eta"]), int(row["step"])
            )
            for row in csv.DictReader(front.read_text().splitlines())
        }
    except (ValueError, TypeError, KeyError, csv.Error):
        return set()
