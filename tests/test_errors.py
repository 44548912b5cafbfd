"""How a job or a script ends after an error: one line, one exit code of the table, and the traceback in a file."""

import errno
import os
import re
import resource
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.commands import ENV, TINY, finish, main_command, run, start, wait_for
from warp_jax import cli, exit_codes, files
from warp_jax.experiment import warp
from warp_jax.parallel import hosts
from warp_jax.storage import checkpoint, manifest
from warp_jax.types import RewardError, StorageError

FULL = """RESOURCE_EXHAUSTED: Error writing "0.w/0.0" in OCDBT database at local file "/w/run/state/.4.saving/": Failed
to write 14235 bytes to file 19: No space left on device [os_error_code='28']"""


def caused(error, cause):
    """The error, raised from another one."""
    error.__cause__ = cause
    return error


def system(number, path="/w/run/x"):
    """The error of the operating system with a number."""
    return OSError(number, os.strerror(number), path)


@pytest.fixture(autouse=True)
def _workdir(monkeypatch):
    monkeypatch.setattr(cli, "_workdir", Path("/w/run"))


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (system(errno.ENOSPC), 74, ["/w/run/x: No space left", "free some space, then start the same command again"]),
        (system(errno.EDQUOT, "/elsewhere/x"), 74, ["/elsewhere/x: Disk quota exceeded", "larger quota"]),
        (OSError(errno.ENOSPC, "No space left"), 74, ["/w/run: No space left"]),
        (system(errno.EROFS), 74, ["Read-only file system; make the file system writable"]),
        (system(errno.EACCES), 74, ["Permission denied; give this user the right"]),
        (system(errno.EMFILE), 74, ["Too many open files", "ulimit -n"]),
        (system(errno.EIO), 74, ["check the disk"]),
        (system(errno.ESTALE), 74, ["check the disk or the network file system"]),
        (system(errno.EPIPE), 74, ["the output: Broken pipe; let the program that reads"]),
        (system(errno.ENOENT), 74, ["/w/run/x: No such file or directory; check this path, then start"]),
        (system(errno.ENOENT, "/w/run"), 74, ["/w/run: No such file"]),
        (system(errno.EFBIG), 74, ["/w/run/x: File too large"]),
        (FileNotFoundError("no checkpoint"), 74, ["/w/run: No such file"]),
        (system(errno.ENOENT, "/w/running"), 1, ["unexpected FileNotFoundError: ", "please report it"]),
        (ValueError(FULL), 74, ["/w/run/state/.4.saving: No space left on device"]),
        (jax.errors.JaxRuntimeError("UNKNOWN: cannot open: Too many open files"), 74, ["ulimit -n"]),
        (caused(ValueError("saving failed"), system(errno.EROFS)), 74, ["/w/run/x: Read-only"]),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."), 71, ["9 bytes", "batch"]),
        (MemoryError("Unable to allocate 9 GiB"), 71, ["out of memory (MemoryError: Unable to", "more microbatches"]),
        (caused(RewardError("f: raised OSError"), system(errno.ENOSPC)), 70, ["f: raised OSError"]),
        (StorageError("x is not what was written"), 74, ["x is not what was written"]),
        (warp.BusyError("run 1 is being made"), 75, ["run 1 is being made"]),
        (warp.JobError("cannot"), 2, ["cannot"]),
        (hosts.PeerError("process 1 failed"), 75, ["process 1 failed"]),
        (hosts.PeerError("process 1 failed", exit_codes.USER_FUNCTION), 70, ["process 1 failed"]),
        (KeyboardInterrupt(), 130, ["stopped by SIGINT"]),
        (TypeError("f() takes\nno arguments"), 1, ["unexpected TypeError: f() takes no arguments; please report it"]),
        (ValueError("'Permission denied' is no number"), 1, ["unexpected ValueError: "]),
        (AssertionError(), 1, ["unexpected AssertionError: AssertionError"]),
    ],
    ids=lambda value: repr(value)[:60] if isinstance(value, BaseException) else "",
)
def test_each_error_has_its_code_and_its_line(error, code, words):
    """Mutation: a row of the table is taken out, the cause is not looked at, or the text of C++ libraries is not."""
    got, line = cli.explain(error)
    assert got == code
    assert got in exit_codes.EXIT_CODES
    for word in words:
        assert word in line
    assert "\n" not in line


def test_the_place_of_an_error_without_a_file_name(monkeypatch):
    """Mutation: the folder in a bucket, or the output, is shown as a file below the current folder."""
    for workdir, place in ((None, "the output"), ("gs://bucket/run", "gs://bucket/run")):
        monkeypatch.setattr(cli, "_workdir", workdir)
        assert cli.explain(OSError(errno.ENOSPC, "full"))[1].startswith(f"{place}: No space left on device; ")


def test_an_odd_error_for_want_of_descriptors(monkeypatch):
    """Mutation: a library that cannot open a file, and says something else, counts as a bug."""

    def no_more(*args):
        raise system(errno.EMFILE)

    assert cli.explain(RuntimeError("INTERNAL: unsupported"))[0] == 1
    monkeypatch.setattr(os, "listdir", no_more)
    code, line = cli.explain(RuntimeError("INTERNAL: unsupported"))
    assert (code, "ulimit -n" in line) == (74, True)


def test_an_odd_error_after_the_workdir_has_vanished(tmp_path, monkeypatch):
    """Mutation: a library that misses a folder, and says so in words of its own, counts as a bug."""
    monkeypatch.setattr(files, "_kept", {})
    monkeypatch.setattr(cli, "_workdir", tmp_path / "run")
    files.write_text(tmp_path / "run" / "config.json", "{}")
    files.keep(tmp_path / "run", "config.json")
    error = ValueError("Checkpoint directory does not exist: 4.saving")
    assert cli.explain(error)[0] == 1
    (tmp_path / "run" / "config.json").unlink()
    assert cli.explain(error)[0] == 74
    assert str(tmp_path / "run") in cli.explain(error)[1]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("etas: got nan"), 2),
        (system(errno.ENOENT), 2),
        (hosts.PeerError("process 1 failed", cli.UNEXPECTED), 2),
        (system(errno.ENOSPC), 74),
        (hosts.PeerError("process 1 failed", cli.STORAGE), 74),
        (RewardError("no module"), 70),
        (MemoryError(), 71),
    ],
    ids=repr,
)
def test_a_check_of_the_input_blames_the_input_last(error, code, monkeypatch, capsys):
    """Mutation: everything that a check raises counts as bad input, which no launcher tries again."""
    monkeypatch.setattr(cli, "_log", lambda error: "x.log")
    with pytest.raises(SystemExit) as ended:
        cli.fail(error)
    assert ended.value.code == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert lines[0].endswith("; traceback: x.log") == (code != 2 and not isinstance(error, hosts.PeerError))


def test_the_documents_list_every_exit_code():
    """Fails when a code is added without a row in the documents."""
    rows = re.findall(r"^\| (\d+) \|", Path("docs/reliability.md").read_text(), re.MULTILINE)
    assert {int(row) for row in rows} >= exit_codes.EXIT_CODES.keys() - {0}


def test_the_log_is_the_workdirs_and_bounded(tmp_path, monkeypatch):
    """Mutation: the log replaces the one before, grows for ever, or is written into a folder of somebody else."""
    monkeypatch.setattr(cli, "_workdir", tmp_path)
    monkeypatch.setattr(cli, "_LOG_CHARACTERS", 1000)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    outside = Path(cli._log(KeyError("first")))
    assert outside.parent == tmp_path / "temporary"
    assert "KeyError: 'first'" in outside.read_text()
    (tmp_path / "config.json").touch()
    log = Path(cli._log(KeyError("second")))
    assert log == tmp_path / "error.log"
    cli._log(KeyError("third"))
    assert "second" in log.read_text()
    for number in range(40):
        cli._log(KeyError(number))
    assert len(log.read_text()) == 1000
    assert log.read_text().endswith("KeyError: 39\n\n")


def test_the_line_says_so_if_no_log_can_be_written(tmp_path, monkeypatch, capsys):
    """Mutation: the error of writing the log hides the error itself, or leaves a part of the log."""

    def full(*args, **kwargs):
        raise system(errno.ENOSPC)

    (tmp_path / "config.json").touch()
    monkeypatch.setattr(cli, "_workdir", tmp_path)
    monkeypatch.setattr(tempfile, "mkstemp", full)
    monkeypatch.setattr(os, "fsync", full)
    assert cli.report(TypeError("a bug")) == 1
    assert capsys.readouterr().err == (
        "error: unexpected TypeError: a bug; please report it; traceback: none, no file could be written\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


PROGRAM = """
import gc, sys, threading, time
from pathlib import Path
from warp_jax import cli

class Bad:
    def __del__(self):
        raise ValueError("ignored")

def main(argv):
    cli.keep_quiet(Path(sys.argv[1]))
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()
    Bad()
    gc.collect()
    threading.Thread(target=time.sleep, args=(600,)).start()
    print("before")
    {last}

cli.run(main, required=(), example="", arguments=True)
"""


def _program(folder, last):
    (folder / "config.json").touch()
    return [sys.executable, "-c", PROGRAM.format(last=last), str(folder)]


@pytest.mark.parametrize(
    ("last", "code", "line"),
    [("{}[0]", 1, "unexpected KeyError: 0"), ("raise MemoryError", 71, "out of memory"), ("sys.exit(3)", 3, "")],
)
def test_a_script_ends_with_one_line(tmp_path, last, code, line):
    """Mutation: a traceback on the screen, also of a thread or of __del__; or the end waits for a thread."""
    result = run(_program(tmp_path, last))
    assert (result.returncode, result.stdout) == (code, "before\n")
    assert result.stderr.count("\n") == bool(line)
    assert result.stderr.startswith(f"error: {line}" if line else "")
    log = (tmp_path / "error.log").read_text()
    assert "ZeroDivisionError" in log
    assert "ValueError: ignored" in log
    assert ("in main" in log) == bool(line)


@pytest.mark.parametrize("last", ["return", "sys.exit(0)"])
def test_an_output_that_nobody_reads(tmp_path, last):
    """Mutation: stdout is flushed by the interpreter only, which prints a traceback."""
    process = start(_program(tmp_path, last), ENV | {"PYTHONUNBUFFERED": ""})
    process.stdout.close()
    process.stdout = None
    code, _, errors = finish(process)
    assert code == 74
    assert errors.startswith("error: the output: Broken pipe; ")
    assert errors.count("\n") == 1


@pytest.mark.parametrize("made_again", [False, True])
def test_a_vanished_workdir_is_not_made_again(tmp_path, monkeypatch, made_again):
    """Mutation: what is written next makes the folder again, without config.json, so that no job can use it; or goes
    into a folder that a thread of Orbax has made meanwhile.
    """
    monkeypatch.setattr(files, "_kept", {})
    folder = tmp_path / "run"
    files.write_text(folder / "config.json", "{}")
    files.keep(folder, "config.json")
    files.write_text(folder / "a" / "b", "x")
    folder.rename(tmp_path / "gone")
    if made_again:
        (folder / "a").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=str(folder)), files.locked(folder / "a" / "lock"):
        pass
    assert [str(path.relative_to(folder)) for path in folder.rglob("*")] == ["a"] * made_again


@pytest.mark.parametrize("at", ["save", "seal"])
def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch, at):
    """Mutation: on a full disk, the part that was written stays and takes the space."""

    def full(*args, **kwargs):
        (tmp_path / ".params.saving.orbax-checkpoint-tmp").mkdir(exist_ok=True)
        raise system(errno.ENOSPC)

    params = {"w": np.arange(3.0)}
    with monkeypatch.context() as patch:
        patch.setattr(*((manifest, "seal") if at == "seal" else (checkpoint.ocp.StandardCheckpointer, "save")), full)
        with pytest.raises(OSError, match="No space"):
            checkpoint.save_params(tmp_path / "params", params)
    assert list(tmp_path.iterdir()) == []
    checkpoint.save_params(tmp_path / "params", params)
    assert checkpoint.has_params(tmp_path / "params")


def test_all_processes_end_with_the_code_of_the_one_that_failed(monkeypatch):
    """Mutation: a full disk of one process is bad input for the others, so that no launcher tries the job again."""
    sent = []
    monkeypatch.setattr(hosts, "_gather", lambda number: sent.append(number) or [number, 74])
    with pytest.raises(hosts.PeerError, match="process 1 of 2") as failed:
        hosts.all_or_none(lambda: 3)
    assert failed.value.exit_code == cli.STORAGE
    with pytest.raises(RewardError):
        hosts.all_or_none(lambda: (_ for _ in ()).throw(RewardError("f")))
    assert sent == [0, 70]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RewardError("f: raised ConnectionError: connection refused"), 70),
        (StorageError("/igloo/x is not what was written"), 74),
        (warp.JobError("no connection"), 2),
        (jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed"), 75),
        (files.BucketError("gs://b/x: the bucket does not answer (barrier timed out)"), 75),
    ],
    ids=repr,
)
def test_the_words_of_a_user_are_no_lost_process(error, code, monkeypatch):
    """Mutation: a reward that cannot reach its judge counts as a lost process, so that launchers try without end."""
    monkeypatch.setattr(hosts, "_is_alone", lambda: False)
    monkeypatch.setattr(hosts, "is_first", lambda: False)
    monkeypatch.setattr(cli, "_log", lambda error: "x.log")
    monkeypatch.setattr(cli, "end", sys.exit)
    with pytest.raises(SystemExit) as ended:
        hosts.end(error)
    assert ended.value.code == code


def test_a_job_without_descriptors_ends_with_one_line(tmp_path):
    """Fails when a library, a thread or the end of the interpreter prints a traceback beside the line."""
    process = start(main_command(TINY, f"--workdir={tmp_path / 'run'}"))
    wait_for(tmp_path / "run" / "sft" / "metrics.jsonl", process)
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (3, 3))
    code, _, errors = finish(process)
    assert code == cli.STORAGE, errors
    assert "Traceback" not in errors
    assert [line.startswith("error: ") for line in errors.splitlines()].index(True) == errors.count("\n") - 1
    assert "Too many open files; raise the limit of open files: ulimit -n" in errors.splitlines()[-1]


def test_a_library_that_fails_near_the_limit_of_files_is_storage(monkeypatch):
    """Fails when an odd error of a C++ library, for want of a descriptor that is free again by now, is a bug."""
    error = RuntimeError("INTERNAL: YNNPACK operation failed: unsupported parameter")
    assert cli.explain(error)[0] == exit_codes.UNEXPECTED
    most = len(os.listdir("/dev/fd")) + 3
    monkeypatch.setattr(cli.resource, "getrlimit", lambda kind: (most, most))
    assert cli.explain(error)[0] == exit_codes.STORAGE
