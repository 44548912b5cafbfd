"""What a workdir holds, read from small folders that look like those of a job."""

import csv
import io
import os
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from configs import pretrained
from tests import commands
from tests.settings_of import settings_of, typed
from warp_jax import files
from warp_jax.evaluation import points
from warp_jax.evaluation.measure import Evaluation
from warp_jax.experiment import status
from warp_jax.storage import manifest

SETTINGS = settings_of({"front.etas": [0.0, 0.3, 1.0], "warp.num_iterations": 1, "warp.steps_per_iteration": [6]})
NAMES = (
    "inputs",
    "sft",
    "reward_model",
    "evaluation of sft",
    "iteration_1/run_1",
    "iteration_1/run_2",
    "iteration_1/merged",
    "front of iteration_1",
    "report",
)
NOTHING_LEFT = ["next: nothing is left; a start writes the report again"]
HOLD = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"


def weights(folder, *logs):
    folder.mkdir(parents=True)
    (folder / "array").write_bytes(bytes(range(200)))
    manifest.seal(folder, {os.path.relpath(log, folder): log.stat().st_size for log in logs})


def states(folder, *steps):
    for step in steps:
        weights(folder / "state" / str(step))


def unfinished(folder, *steps):
    """Training with saved states in place of its result."""
    shutil.rmtree(folder / "params")
    states(folder, *steps)


def metrics(folder, rows):
    files.write_text(folder / "metrics.jsonl", "".join(f'{{"step": {step}}}\n' for step in range(rows)))
    return folder / "metrics.jsonl"


def front_csv(settings):
    nan, iterations = "nan", range(1, settings.warp.num_iterations + 1)
    rows = [("stage", "iteration", "run", "eta", "step"), ("sft", 0, 0, 0.0, 0)]
    for i in iterations:
        for run in range(1, settings.warp.num_runs + 1):
            rows += [("policy", i, run, nan, step) for step in points.trajectory(settings, i, run, 6)]
        rows += [("merged", i, 0, nan, 0), *(("liti", i, 0, eta, 0) for eta in settings.front.etas)]
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue()


@pytest.fixture
def run(tmp_path):
    """A finished workdir."""
    workdir = tmp_path / "run"
    files.write_json(workdir / "config.json", SETTINGS.as_json())
    for name in ("tokenizer.json", "data.json", "summary.json", "gold/gold.json", "iteration_1/geometry.json"):
        files.write_json(workdir / name, {"kind": name})
    for name in ("front.png", "report.html"):
        files.write_text(workdir / name, name)
    files.write_text(workdir / "front.csv", front_csv(SETTINGS))
    for name, rows in {"sft": 10, "reward_model": 10, "iteration_1/run_1": 6, "iteration_1/run_2": 6}.items():
        weights(workdir / name / "params", metrics(workdir / name, rows))
        (workdir / name / "lock").touch()
    weights(workdir / "iteration_1" / "merged")
    content = io.BytesIO()
    np.savez_compressed(content, **{field: np.arange(3.0) for field in Evaluation._fields})
    for name in points.evaluation_names(SETTINGS, lambda iteration, run: 6):
        files.write_bytes(workdir / "evaluations" / f"{name}.npz", content.getvalue())
    return workdir


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 8
    path.write_bytes(content)


def part(workdir, name, **options):
    (found,) = (part for part in status.read(workdir, **options) if part.name == name)
    return found


@pytest.mark.parametrize("verify", [False, True])
def test_a_finished_workdir_is_done_and_stays_as_it_is(run, verify):
    """Fails when a part is left out or out of order, a whole file counts as damaged, or looking makes a lock file."""
    before = {path: path.stat().st_mtime_ns for path in run.parent.rglob("*")}
    parts = status.read(run, verify=verify)
    assert [(part.name, status.describe(part)) for part in parts] == [(name, "done") for name in NAMES]
    assert status.exit_code(parts) == 0
    assert status.next_lines(parts) == NOTHING_LEFT
    assert before == {path: path.stat().st_mtime_ns for path in run.parent.rglob("*")}


UNFINISHED = {  # what is done to a finished workdir: the part that is unfinished then, its state, and what comes next
    "no tokenizer": (lambda run: (run / "tokenizer.json").unlink(), "inputs", "not begun", "begins inputs"),
    "no gold": (lambda run: (run / "gold/gold.json").unlink(), "inputs", "not begun", "begins inputs"),
    "no sft": (lambda run: shutil.rmtree(run / "sft"), "sft", "not begun", "begins sft"),
    "sft has states": (
        lambda run: unfinished(run / "sft", 8, 4),
        "sft",
        "saved at step 8 of 10",
        "continues sft from step 8 of 10",
    ),
    "states of two lengths": (
        lambda run: unfinished(run / "reward_model", 9, 10),
        "reward_model",
        "saved at step 10 of 10",
        "continues reward_model from step 10 of 10",
    ),
    "a state is being saved": (
        lambda run: unfinished(run / "iteration_1/run_2") or weights(run / "iteration_1/run_2/state/.4.saving"),
        "iteration_1/run_2",
        "not begun",
        "begins iteration_1/run_2",
    ),
    "run has a state": (
        lambda run: unfinished(run / "iteration_1/run_2", 4),
        "iteration_1/run_2",
        "saved at step 4 of 6",
        "continues iteration_1/run_2 from step 4 of 6",
    ),
    "last evaluation of a run": (
        lambda run: (run / "evaluations/policy_i1_r1_s6.npz").unlink(),
        "iteration_1/run_1",
        "saved at step 6 of 6",
        "continues iteration_1/run_1 from step 6 of 6",
    ),
    "no merge": (
        lambda run: shutil.rmtree(run / "iteration_1/merged"),
        "iteration_1/merged",
        "not begun",
        "begins iteration_1/merged",
    ),
    "evaluation of sft": (
        lambda run: (run / "evaluations/sft.npz").unlink(),
        "evaluation of sft",
        "not begun",
        "begins evaluation of sft",
    ),
    "a point of the front": (
        lambda run: (run / "evaluations/liti_i1_e0.3.npz").unlink(),
        "front of iteration_1",
        "saved at evaluation 1 of 2",
        "continues front of iteration_1 from evaluation 1 of 2",
    ),
    "no report": (lambda run: (run / "report.html").unlink(), "report", "not begun", "begins report"),
    "report of another front": (
        lambda run: (run / "front.csv").write_text(front_csv(SETTINGS.replace({"front.etas": [0.0, 0.2, 1.0]}))),
        "report",
        "not begun",
        "begins report",
    ),
    "broken front.csv": (lambda run: (run / "front.csv").write_bytes(b"\xff\n1"), "report", "not begun", "begins repo"),
}


@pytest.mark.parametrize("case", UNFINISHED)
def test_an_unfinished_part_is_named(run, case):
    """Fails when the oldest state counts, states are sorted as text, a state that is being saved counts, a run without
    its last evaluation is done, or a report of other front.etas is.
    """
    harm, name, state, then = UNFINISHED[case]
    harm(run)
    parts = status.read(run)
    assert {part.name: status.describe(part) for part in parts} == {**dict.fromkeys(NAMES, "done"), name: state}
    assert status.exit_code(parts) == 3
    assert status.next_lines(parts)[0].startswith(f"next: a start {then}")


def test_the_first_unfinished_part_is_next(run):
    """Fails when the last one is named, or parts after an unfinished one count as begun."""
    shutil.rmtree(run / "iteration_1/merged")
    unfinished(run / "iteration_1/run_1")
    (run / "report.html").unlink()
    assert status.next_lines(status.read(run)) == ["next: a start begins iteration_1/run_1"]


DAMAGE = {  # what --verify finds: part, what is done to which file, what to delete
    "sft": ("sft", flip, "sft/params/array", "delete .*sft/params to make"),
    "reward model": ("reward_model", flip, "reward_model/params/array", "delete .*reward_model/params to"),
    "run": ("iteration_1/run_2", flip, "iteration_1/run_2/params/array", "delete .*/run_2/params to make"),
    "metrics": ("iteration_1/run_2", flip, "iteration_1/run_2/metrics.jsonl", "delete .*/run_2/params to make"),
    "merge": ("iteration_1/merged", flip, "iteration_1/merged/array", "delete .*/iteration_1/merged to make"),
    "angles": (
        "iteration_1/merged",
        lambda path: path.write_text('{"a":'),
        "iteration_1/geometry.json",
        "delete it and .*/iteration_1/merged to make",
    ),
    "sft evaluation": ("evaluation of sft", flip, "evaluations/sft.npz", "delete it to make"),
    "front": ("front of iteration_1", flip, "evaluations/liti_i1_e0.3.npz", "delete it to make"),
    "first evaluation": (
        "iteration_1/run_1",
        flip,
        "evaluations/policy_i1_r1_s3.npz",
        "delete it and .*/iteration_1/run_1, whose policy",
    ),
    "last evaluation": ("iteration_1/run_1", flip, "evaluations/policy_i1_r1_s6.npz", "delete it to make"),
    "tokenizer": ("inputs", lambda path: path.write_text(""), "tokenizer.json", "delete it to make"),
    "rows": ("inputs", lambda path: path.write_text("[]"), "data.json", "restore it, or delete it if"),
    "summary": ("report", lambda path: path.write_bytes(b"\xff"), "summary.json", "delete it to make"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_verify_finds_a_damaged_file_and_says_what_to_delete(run, case):
    """Fails when a kind of file is not read, the advice names the wrong folder, or files are read without --verify."""
    name, harm, file, advice = DAMAGE[case]
    harm(run / file)
    assert status.exit_code(status.read(run)) == 0
    parts = status.read(run, verify=True)
    assert [part.name for part in parts if part.state == status.DAMAGED] == [name]
    assert status.exit_code(parts) == 2
    (line,) = status.next_lines(parts)
    assert re.search(f"^damaged: .*/{file} is not what was written; {advice}", line), line


def test_verify_compares_single_files_with_their_checksums(run):
    """Fails when a tokenizer that is still JSON passes."""
    manifest.note(run, "tokenizer.json")
    assert status.exit_code(status.read(run, verify=True)) == 0
    (run / "tokenizer.json").write_text('{"another": "tokenizer"}')
    assert "tokenizer.json is not what was written; delete it" in status.next_lines(status.read(run, verify=True))[0]


@pytest.mark.parametrize(
    ("file", "name", "advice"),
    [
        ("evaluations/policy_i1_r2_s3.npz", "iteration_1/run_2", "delete .*/iteration_1/run_2 to make both"),
        ("iteration_1/geometry.json", "iteration_1/merged", "delete .*/iteration_1/merged to make both"),
    ],
)
def test_a_file_that_cannot_be_made_again_by_itself_is_damage(run, file, name, advice):
    """Fails when it counts as unfinished: a start would end with an error."""
    (run / file).unlink()
    assert part(run, name).state == status.DAMAGED
    (line,) = status.next_lines(status.read(run))
    assert re.search(f"{file} is missing.*{advice}", line), line


def test_each_damage_has_a_line(run):
    """Fails when only the first is shown: each start would find one more."""
    flip(run / "sft/params/array")
    flip(run / "evaluations/sft.npz")
    assert len(status.next_lines(status.read(run, verify=True))) == 2


def test_training_continues_from_the_newest_whole_state(run):
    """Fails when a damaged state counts, one whole state is not enough, or all damaged ones are not told."""
    folder = run / "iteration_1/run_1"
    unfinished(folder, 4, 5)
    flip(folder / "state/5/array")
    assert part(run, "iteration_1/run_1").done == 5
    found = part(run, "iteration_1/run_1", verify=True)
    assert re.fullmatch(
        "saved at step 4 of 6, .*/5/array is not what was written: it is left out", status.describe(found)
    )
    flip(folder / "state/4/array")
    found = part(run, "iteration_1/run_1", verify=True)
    assert found.state == status.DAMAGED
    assert re.search(r"5/array is not what was written; delete .*/run_1/state to train", found.note)


@pytest.mark.parametrize(
    ("result", "lock", "name"),
    [
        ("gold/gold.json", "lock", "inputs"),
        ("sft/params", "lock", "sft"),
        ("reward_model/params", "lock", "reward_model"),
        ("iteration_1/run_2/params", "iteration_1/run_2/lock", "iteration_1/run_2"),
        ("iteration_1/merged", "iteration_1/lock", "iteration_1/merged"),
    ],
)
def test_a_lock_that_another_process_holds_is_seen(run, result, lock, name):
    """Fails when the wrong lock is looked at, the lock file alone counts, or parts after the running one run too."""
    (run / result).rename(run.parent / "result")
    if name in ("inputs", "sft"):
        shutil.rmtree(run / "reward_model")
    (run / lock).touch()
    assert part(run, name).state == status.NOT_BEGUN
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, run / lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as it:
        it.stdout.readline()
        parts = status.read(run)
        it.communicate(b"\n")
    assert [part.name for part in parts if part.state == status.RUNNING] == [name]
    assert status.next_lines(parts) == [f"next: {name} is being made by another process; wait for it, or stop it"]
    assert status.exit_code(parts) == 3
    assert part(run, name).state == status.NOT_BEGUN


def test_looking_at_a_lock_does_not_disturb(tmp_path):
    """Fails when the lock is kept, a missing lock file is made, or two that look see each other."""
    path = tmp_path / "lock"
    assert files.owner(path) == ""
    assert not path.exists()
    with files.locked(path):
        assert files.owner(path) == "another process"
    with path.open() as other:
        files.fcntl.flock(other, files.fcntl.LOCK_SH)
        assert files.owner(path) == ""
    with files.locked(path):
        pass


def running(run, age):
    """A run of 6 steps that began again at step 3: the row of its step 5, `age` seconds after the process began."""
    folder = run / "iteration_1/run_1"
    shutil.rmtree(folder / "params")
    (folder / "events.out.tfevents.1000.host").touch()
    (folder / "events.out.tfevents.2000.host").touch()
    os.utime(metrics(folder, 5), (2000 + age, 2000 + age))
    os.utime(folder / "lock", (1990, 1990))
    states(folder, 3)
    os.utime(folder / "state/3", (1500, 1500))
    return folder


def test_a_running_part_shows_its_step_and_the_time_left(run):
    """Fails when the time is that of an earlier process, the steps before its start count, or a save is not used."""
    folder = running(run, 300)
    assert status.minutes_left(folder, 5, 6) == "about 2.5 min left"  # 2 steps in 300 s
    states(folder, 4)
    os.utime(folder / "state/4", (2270, 2270))
    assert status.minutes_left(folder, 5, 6) == "about 0.5 min left"  # 1 step in 30 s
    os.utime(folder / "state/4", (2300, 2300))
    assert status.minutes_left(folder, 5, 6) == ""
    shutil.rmtree(folder / "state")
    assert status.minutes_left(folder, 5, 6) == "about 1.0 min left"  # 5 steps in 300 s


def test_rows_of_an_earlier_process_do_not_count(run):
    """Fails when the steps of a killed process, which are made again, count as done."""
    folder = running(run, 300)
    with files.locked(folder / "lock"):
        os.utime(folder / "lock", (1990, 1990))
        assert status.describe(part(run, "iteration_1/run_1")).startswith("running, step 5 of 6, about ")
        os.utime(folder / "lock", (time.time(), time.time()))
        assert status.describe(part(run, "iteration_1/run_1")) == "running, step 3 of 6"


def test_parts_that_the_config_does_not_have_are_not_shown(tmp_path):
    """Fails when SFT of 0 steps, a reward model that no reward uses, or a pretrained tokenizer is waited for."""
    config = pretrained.get_config()
    config.model.source, config.gold.source = "some/model", ""
    for reward in config.rewards.values():
        reward.weight = 0.0
    config.rewards.length.weight = 1.0
    files.write_json(tmp_path / "config.json", typed(config).as_json())
    parts = status.read(tmp_path)
    assert [part.name for part in parts[:3]] == ["inputs", "evaluation of sft", "iteration_1/run_1"]
    assert parts[0].state == status.DONE


def test_a_reward_model_that_only_a_run_uses_is_waited_for(tmp_path):
    """Fails when it is left out because its weight in the config is 0."""
    changes = {"rewards.sentiment.weight": 0.0, "rewards.length.weight": -1.0}
    for runs, wanted in (((), 0), (({"rewards.sentiment.weight": 1.0}, {}), 1)):
        files.write_json(tmp_path / "config.json", settings_of({**changes, "warp.runs": runs}).as_json())
        assert sum(part.name == "reward_model" for part in status.read(tmp_path)) == wanted


def test_kept_weights_and_their_fronts_are_parts_of_a_run(run):
    """Fails when a run without its anchor is done, damage of a kept policy is not found, a run that ended at its limit
    is waited for, or the fronts of its kept stages are left out.
    """
    changes = {"keep.anchor": True, "keep.steps": (2, 5), "warp.stop_at_kl": 9.0}
    files.write_json(run / "config.json", SETTINGS.replace(changes).as_json())
    folder, content = run / "iteration_1/run_1", (run / "evaluations/sft.npz").read_bytes()
    files.write_json(folder / "end.json", {"step": 3})
    for name in ("policy_i1_r1_s2", "anchor_i1_r1_e0.3", "anchor_i1_r1_e1"):
        files.write_bytes(run / "evaluations" / f"{name}.npz", content)
    weights(folder / "step_2")
    assert part(run, "iteration_1/run_1").state == status.NOT_BEGUN
    weights(folder / "anchor")
    for name in ("iteration_1/run_1", "fronts of iteration_1/run_1"):
        assert status.describe(part(run, name)) == "done"
    assert part(run, "fronts of iteration_1/run_2").state == status.NOT_BEGUN
    flip(folder / "step_2/array")
    assert f"delete {folder}/step_2 to make it again" in part(run, "iteration_1/run_1", verify=True).note


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b"[]", b"{}"])
def test_a_damaged_config_is_one_line(run, text):
    """Fails when it is a traceback, or the line does not name the file."""
    (run / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"run/config\.json: ") as error:
        status.read(run)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("names", "code", "error"),
    [
        (["run"], 0, ""),
        (["run", "begun", "run"], 3, ""),
        (["begun", "missing", "run"], 2, r"error: .*/missing has no config\.json, want a folder .*\n"),
        (["--verify", "damaged", "begun"], 2, ""),
        ([], 2, "error: no workdir is given; .*\n"),
        (["--verfy"], 2, "error: .*verfy.*\n"),
    ],
)
def test_the_script_prints_a_table_of_each_workdir(run, names, code, error):
    """Fails when the first workdir ends the program, the best or the last one sets the exit code, or --verify is not
    handed on.
    """
    files.write_json(run.parent / "begun" / "config.json", SETTINGS.as_json())
    shutil.copytree(run, run.parent / "damaged")
    flip(run.parent / "damaged/sft/params/array")
    arguments = [name if name.startswith("--") else run.parent / name for name in names]
    result = commands.run(commands.script_command("status.py", *arguments))
    assert result.returncode == code, result.stdout
    assert re.fullmatch(error, result.stderr)
    for name in {"run", "begun", "damaged"} & set(names):
        assert f"{run.parent / name}\n  inputs  " in result.stdout


def test_progress_for_the_report(run):
    """Fails when steps of a part are not counted, or a part that is left is not named."""
    found = status.progress(run)
    assert (found["finished"], found["steps"], found["left"]) == (True, [32, 32], "")
    assert [row["part"] for row in found["parts"]] == [name for name in NAMES if name != "report"]
    unfinished(run / "iteration_1" / "run_2", 4)
    found = status.progress(run, "about 3.0 min left")
    assert (found["finished"], found["steps"], found["left"]) == (False, [30, 32], "about 3.0 min left")
    assert {"part": "iteration_1/run_2", "state": "saved at step 4 of 6"} in found["parts"]
