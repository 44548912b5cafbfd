"""Jobs with and without compiled programs of an earlier job, and with a trace: the same bits."""

import gzip
import json

import pytest

from tests.commands import ENV, TINY, finish, main_command, start
from warp_jax import cli

SMALL = (
    TINY,
    "--config.sft.num_steps=2",
    "--config.reward_model.num_steps=2",
    "--config.warp.num_iterations=1",
    "--config.warp.num_runs=1",
    "--config.warp.steps_per_iteration=(6,)",
    "--config.front.etas=(1.0,)",
)
HOST_WORK = {"train", "sample", "reward", "update", "logging", "saving"}
WITHOUT = {name: value for name, value in ENV.items() if not name.startswith("JAX_COMPILATION_CACHE")}


def _run(*arguments):
    """A job without the compilation cache of the tests."""
    code, output, errors = finish(start(main_command(*SMALL, *arguments), WITHOUT))
    return code, output, errors


def _results(workdir):
    names = ("metrics.jsonl", "*.npz", "front.csv", "geometry.json")
    return {path.relative_to(workdir): path.read_bytes() for name in names for path in workdir.rglob(name)}


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A folder with the workdir of a job that found no compiled programs, and left its own."""
    folder = tmp_path_factory.mktemp("start")
    code, _, errors = _run(f"--workdir={folder / 'first'}")
    assert code == 0, errors
    return folder


@pytest.mark.slow
def test_a_job_without_the_cache_has_the_same_bits(first):
    """Fails when off still keeps programs, or a kept program computes other numbers."""
    code, _, errors = _run(f"--workdir={first / 'elsewhere' / 'off'}", "--compilation_cache=off")
    assert code == 0, errors
    assert [path.name for path in (first / "elsewhere").iterdir()] == ["off"]
    assert _results(first / "elsewhere" / "off") == _results(first / "first")


@pytest.mark.slow
def test_damaged_programs_are_made_again_and_the_others_are_used(first):
    """Fails when a second job compiles what the first has compiled, damage ends or changes it, prints more than one
    line, or stays; when a trace changes the numbers, or does not name the work of the host.
    """
    entries = sorted((first / ".xla_cache").iterdir())
    before = {path: path.read_bytes() for path in entries}
    inodes = {path: path.stat().st_ino for path in entries}
    damaged = set(entries[::2])
    for number, path in enumerate(damaged):
        content = before[path]
        path.write_bytes(content[: len(content) // 2] if number % 2 else bytes([content[0] ^ 1]) + content[1:])
    code, _, errors = _run(f"--workdir={first / 'second'}", "--profile=2")
    assert code == 0, errors
    assert "Error" not in errors
    assert "arning" not in errors
    assert _results(first / "second") == _results(first / "first")
    assert len(entries) > 30
    assert sorted((first / ".xla_cache").iterdir()) == entries
    assert {path for path in entries if path.stat().st_ino != inodes[path]} == damaged
    (trace,) = (first / "second" / "profile").rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert {event.get("name") for event in events} >= HOST_WORK
    assert len([event for event in events if event.get("name") == "train"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compilation_cache={dir}/file"], "want auto, off or a folder"),
        (["--compilation_cache="], "want auto, off or a folder"),
        (["--compilation_cache=gs://bucket/x"], "want a local folder"),
        (["--profile=-1"], "profile"),
        (["--profile=two"], "profile"),
        (["--profile=2", "--merge"], "want a local job that trains"),
        (["--config.evaluation.num_prompts=16000"], "split 'eval' has"),
    ],
    ids=str,
)
def test_refused_input_leaves_nothing(arguments, message, tmp_path):
    """Fails when a bad value is taken, or the folder of compiled programs is made before all input is checked."""
    (tmp_path / "file").write_text("")
    arguments = [argument.format(dir=tmp_path) for argument in arguments]
    code, _, errors = _run(f"--workdir={tmp_path / 'run'}", *arguments)
    assert code == cli.BAD_INPUT, errors
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert message in errors
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
