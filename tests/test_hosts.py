"""Several real processes on the loopback interface, against one process with as many devices."""

import csv
import socket
import sys

import numpy as np
import pytest

from tests.commands import ENV, FAST_COMPILE, TINY, finish, kill_when, main_command, run, start

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


def _launch(workdir, processes, mesh=(2, 2, 1)):
    """The same command in each process, told apart by its number only."""
    env = ENV | {"XLA_FLAGS": f"{FAST_COMPILE} --xla_force_host_platform_device_count={DEVICES // processes}"}
    multihost = ["--multihost", f"--coordinator=localhost:{_free_port()}", f"--num_processes={processes}"]
    together = multihost if processes > 1 else []
    arguments = (*SETTINGS, f"--config.mesh={mesh}", f"--workdir={workdir}", *together)
    return [start(main_command(*arguments, f"--process_id={number}"), env) for number in range(processes)]


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


def _assert_same_front(workdir, one):
    stages, numbers = _numbers(workdir)
    want_stages, want = _numbers(one)
    assert stages == want_stages
    np.testing.assert_allclose(numbers, want, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_two_processes_equal_one(one, tmp_path):
    """Fails when a process takes other prompts or keys than its share, or writes what the first one writes."""
    results = [finish(process) for process in _launch(tmp_path / "run", 2)]
    assert [code for code, *_ in results] == [0, 0], results
    _assert_same_front(tmp_path / "run", one)
    assert ["report:" in out for _, out, _ in results] == [True, False]
    rows = (tmp_path / "run" / "iteration_1" / "run_1" / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == 6


def test_a_lost_process_stops_the_others_and_the_restart_goes_on(one, tmp_path):
    """Fails when the others hang, or say it in a traceback, or a checkpoint is bound to its processes or its mesh.

    The restart is on other processes, and on another mesh.
    """
    workdir = tmp_path / "run"
    processes = _launch(workdir, 2)
    state = workdir / "iteration_1" / "run_1" / "state" / "4"
    kill_when(state, processes[1])
    code, _, error = finish(processes[0])
    assert code == 75
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "lost the other" in lines[0]
    assert "Traceback" not in error
    assert not (workdir / "front.csv").exists()
    results = [finish(process) for process in _launch(workdir, 4, mesh=(1, 2, 2))]
    assert [code for code, *_ in results] == [0] * 4, results
    _assert_same_front(workdir, one)


def _in_child(line):
    """A process that goes on in a child, which says so and then does the line."""
    program = (
        f"import os, time; from warp_jax import hosts; hosts.continue_in_child(); print('child', flush=True); {line}"
    )
    return start([sys.executable, "-c", program])


@pytest.mark.parametrize(
    ("line", "want_code", "want_errors"),
    [("raise SystemExit(3)", 3, 0), ("os.kill(os.getpid(), 9)", 137, 0), ("os.abort()", 75, 1)],
)
def test_a_process_ends_as_its_child_does(line, want_code, want_errors):
    """Fails when exit codes are lost, or when JAX's abort after the loss of a process is not said in one line."""
    process = _in_child(line)
    code, _, error = finish(process)
    assert code == want_code
    assert len(error.splitlines()) == want_errors
    assert error == "" or error.startswith("error: lost the other processes: start all of them again")


def test_a_child_ends_with_its_parent():
    """Fails when a killed process leaves a child that holds its chips and locks."""
    process = _in_child("time.sleep(300)")
    assert process.stdout.readline() == "child\n"
    process.kill()
    process.communicate(timeout=60)  # until nobody holds its output


def test_bad_input_of_several_processes(tmp_path):
    """Fails when --multihost without an environment ends in a traceback."""
    result = run(main_command(*SETTINGS, f"--workdir={tmp_path / 'run'}", "--multihost", "--num_processes=2"))
    assert result.returncode == 2
    assert "--coordinator" in result.stderr.splitlines()[-1]
