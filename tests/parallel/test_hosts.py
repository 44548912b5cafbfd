"""Multi-host jobs: real processes on this machine, compared with one process that has the same number of devices."""

import csv
import shutil
import socket
import sys

import numpy as np
import pytest

from tests.commands import ENV, FAST_COMPILE, TINY, finish, kill_when, main_command, run, start
from warp_jax import files

SETTINGS = (
    TINY,
    "--config.warp.num_iterations=1",
    "--config.warp.steps_per_iteration=(6,)",
    "--config.front.etas=(0.3, 1.0)",
)
DEVICES = 4


def _free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def _launch(workdir, processes, *more, mesh=(2, 2, 1), last=()):
    """Start the same command in each process; `last` are extra flags of the last one."""
    env = ENV | {"XLA_FLAGS": f"{FAST_COMPILE} --xla_force_host_platform_device_count={DEVICES // processes}"}
    multihost = ["--multihost", f"--coordinator=localhost:{_free_port()}", f"--num_processes={processes}"]
    multihost = multihost if processes > 1 else []
    arguments = (*SETTINGS, f"--config.mesh={mesh}", f"--workdir={workdir}", *multihost, *more)
    own = [[f"--process_id={number}"] for number in range(processes)]
    own[-1] += last
    return [start(main_command(*arguments, *flags), env) for flags in own]


def _numbers(workdir):
    with (workdir / "front.csv").open() as file:
        rows = [list(row.values()) for row in csv.DictReader(file)]
    return [row[0] for row in rows], np.array([[float(x) for x in row[1:]] for row in rows])


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A workdir made by one process with four devices."""
    workdir = tmp_path_factory.mktemp("one") / "run"
    code, _, error = finish(*_launch(workdir, 1))
    assert code == 0, error
    return workdir


def _assert_same_front(workdir, one, rows=None):
    """rows: number of the first rows whose values are compared; None = all."""
    stages, numbers = _numbers(workdir)
    want_stages, want = _numbers(one)
    assert stages == want_stages
    np.testing.assert_allclose(numbers[:rows], want[:rows], rtol=1e-5, atol=1e-6, equal_nan=True)


def test_two_processes_equal_one(one, tmp_path):
    """Fails when a process uses other prompts or keys than its share, or writes files that process 0 writes."""
    results = [finish(process) for process in _launch(tmp_path / "run", 2)]
    assert [code for code, *_ in results] == [0, 0], results
    _assert_same_front(tmp_path / "run", one)
    assert ["report:" in out for _, out, _ in results] == [True, False]
    rows = (tmp_path / "run" / "iteration_1" / "run_1" / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == 6


@pytest.mark.slow
def test_a_lost_process_stops_the_others_and_the_restart_goes_on(one, tmp_path):
    """Fails when the others hang or print a traceback, or a checkpoint needs the same processes or mesh.

    The restart uses another number of processes and another mesh, and gives the front of one process that resumes on
    that mesh. SFT and run 1, of which two steps are on that mesh, are those of the unbroken job too; over the six steps
    of run 2, the rounding of another mesh grows tenfold a step.
    """
    workdir = tmp_path / "run"
    processes = _launch(workdir, 2)
    state = workdir / "iteration_1" / "run_1" / "state" / "4"
    kill_when(state, processes[1])
    code, _, error = finish(processes[0])
    assert code == 75
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "start all processes again with the same command" in lines[0]
    assert "Traceback" not in error
    assert not (workdir / "front.csv").exists()
    alone = shutil.copytree(workdir, tmp_path / "alone")
    code, _, error = finish(*_launch(alone, 1, mesh=(1, 2, 2)))
    assert code == 0, error
    results = [finish(process) for process in _launch(workdir, 4, mesh=(1, 2, 2))]
    assert [code for code, *_ in results] == [0] * 4, results
    _assert_same_front(workdir, alone)
    _assert_same_front(workdir, one, rows=3)


@pytest.mark.slow
def test_a_run_that_another_job_trains_is_refused(one, tmp_path):
    """Fails when a held lock leaves the other process waiting, or the exit code does not mean "try again"."""
    workdir = tmp_path / "run"
    shutil.copytree(one, workdir)
    shutil.rmtree(workdir / "iteration_1" / "run_1" / "params")
    with files.locked(workdir / "iteration_1" / "run_1" / "lock", pytest.fail):
        results = [finish(process) for process in _launch(workdir, 2, "--run=1")]
    assert [code for code, *_ in results] == [75, 75], results
    assert "error: run 1 of iteration 1 is being made by another process" in results[0][2]
    assert "error: process 0 of 2 failed; its output has the reason" in results[1][2]


def test_bad_input_of_one_process_stops_all(tmp_path):
    """Fails when a process waits for one that rejected its input, such as a model that is missing on one host."""
    processes = _launch(tmp_path / "run", 2, last=["--config.warp.ema_rate=1.2"])
    results = [finish(process) for process in processes]
    assert [code for code, *_ in results] == [2, 2], results
    assert "error: process 1 of 2 failed; its output has the reason" in results[0][2]
    assert "error: config.warp.ema_rate: got 1.2" in results[1][2]
    assert not (tmp_path / "run").exists()


TWO = """
import pathlib, sys
from tests.settings_of import settings_of
from warp_jax.experiment import inputs
from warp_jax.files import hub
from warp_jax.parallel import hosts
from warp_jax.rewards.text_reward import TextReward
from warp_jax.types import RewardError
number, folder = int(sys.argv[2]), pathlib.Path(sys.argv[3])
hosts.initialize(f"localhost:{sys.argv[1]}", 2, number)
asked = []
judge = hosts.computed_on_first_process(lambda texts: asked.append(texts) or [number + 1.5] * len(texts))
assert judge(["a", "b"]).tolist() == [1.5, 1.5]
assert len(asked) == (number == 0)
try:
    TextReward(lambda *batch: [1.0], "f")(["a", "b"], ["c", "d"], [{}, {}])
except RewardError as error:
    assert ("process 0 of 2 failed" if number else "f: returned a list of shape (1,)") in str(error)
else:
    raise AssertionError
if number:
    pathlib.Path.exists = None
source = f"hf://org/model@{'ab'[number] * 40}"
hub.pin = lambda *arguments: source
print(inputs.pin(settings_of({"gold.source": "hf://org/model"})).gold.source)
assert hosts.exists(folder) and not hosts.exists(folder / "nowhere")
try:
    if number:
        raise KeyError("of one process")
    hosts.on_first_process(print)
except Exception as error:
    hosts.exit_if_multihost(error)
"""


def test_what_two_processes_do_together(tmp_path):
    """Fails when both processes call a host function or look for a path (NFS caches a failed look-up), each takes its
    own commit of a branch, or an error in one, such as that of a reward function, leaves the other waiting.
    """
    port = str(_free_port())
    processes = [start([sys.executable, "-c", TWO, port, str(number), str(tmp_path)]) for number in (0, 1)]
    results = [finish(process) for process in processes]
    assert [code for code, *_ in results] == [75, 1], results
    assert all(f"hf://org/model@{'a' * 40}\n" in out for _, out, _ in results)
    assert "error: process 0 of 2 lost the others" in results[0][2]
    line = results[1][2].splitlines()[-1]
    assert line.startswith("error: unexpected KeyError: 'of one process'; please report it; traceback: ")
    assert "Traceback" not in results[1][2]


def _in_child(line):
    """Start a process whose child prints "child" and then runs the line."""
    program = (
        "import os, time; from warp_jax.parallel import supervisor; supervisor.continue_in_child(); "
        f"print('child', flush=True); {line}"
    )
    return start([sys.executable, "-c", program])


@pytest.mark.parametrize(
    ("line", "want_code", "want_errors"),
    [("raise SystemExit(3)", 3, 0), ("os.kill(os.getpid(), 9)", 137, 0), ("os.abort()", 75, 1)],
)
def test_a_process_ends_as_its_child_does(line, want_code, want_errors):
    """Fails when exit codes are lost, or an abort by JAX does not print one line."""
    process = _in_child(line)
    code, _, error = finish(process)
    assert code == want_code
    assert len(error.splitlines()) == want_errors
    assert error == "" or error.startswith("error: aborted by JAX")


def test_a_child_ends_with_its_parent():
    """Fails when a killed process leaves a child that holds its chips and locks."""
    process = _in_child("time.sleep(300)")
    assert process.stdout.readline() == "child\n"
    process.kill()
    process.communicate(timeout=60)  # returns when no process holds its output


def test_bad_input_of_several_processes(tmp_path):
    """Fails when --multihost without an environment ends in a traceback."""
    result = run(main_command(*SETTINGS, f"--workdir={tmp_path / 'run'}", "--multihost", "--num_processes=2"))
    assert result.returncode == 2
    assert "--coordinator" in result.stderr.splitlines()[-1]
