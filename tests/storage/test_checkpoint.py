"""Saved parameters and states: complete, on disk before they appear, checked when they are read."""

import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from warp_jax import files
from warp_jax.storage import checkpoint, manifest, weight_files
from warp_jax.training import loop
from warp_jax.types import StorageError

TREE = {"layer": {"kernel": jnp.arange(600.0).reshape(20, 30), "bias": jnp.ones(30)}, "step": jnp.int32(7)}


def equal(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8 % len(content)] ^= 1 << bit % 8
    path.write_bytes(content)


def contents(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def store_of(folder: Path, *steps: int) -> Path:
    """A folder with one state for each number of steps, and a log with a row for each step."""
    with (folder / "log").open("a") as log:
        store = checkpoint.StateStore(folder / "state", folder / "log")
        for step in steps:
            log.write(f"row {step}\n")
            log.flush()
            store.save(step, {**TREE, "step": jnp.int32(step)})
        store.close()
    return folder / "state"


def newest(folder: Path) -> int:
    return checkpoint.StateStore(folder / "state", folder / "log").restore(lambda: TREE)[0]


def test_params_come_back_and_are_never_overwritten(tmp_path):
    checkpoint.save_params(tmp_path / "params", TREE)
    equal(checkpoint.restore_params(tmp_path / "params", TREE), TREE)
    with pytest.raises(ValueError, match="exists, and nothing is overwritten"):
        checkpoint.save_params(tmp_path / "params", TREE)
    assert [path.name for path in tmp_path.iterdir()] == ["params"]


@pytest.mark.parametrize("bit", range(3, 4000, 397))
def test_a_flipped_bit_of_any_file_is_noticed(tmp_path, bit):
    """Mutation: checksums of the sizes only; the manifest itself or files in subfolders are not checked."""
    checkpoint.save_params(tmp_path / "params", TREE)
    for path in contents(tmp_path / "params"):
        whole = path.read_bytes()
        flip(path, bit)
        if path.name != manifest.NAME or manifest.damage(tmp_path / "params"):  # a flip in its white space is harmless
            with pytest.raises(StorageError, match=r"is not what was written; delete .*params to make it again"):
                checkpoint.restore_params(tmp_path / "params", TREE)
        path.write_bytes(whole)
    equal(checkpoint.restore_params(tmp_path / "params", TREE), TREE)


@pytest.mark.parametrize(
    "harm",
    {
        "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
        "empty": lambda path: path.write_bytes(b""),
        "deleted": lambda path: path.unlink(),
        "new": lambda path: path.with_name("stray").write_bytes(b"x"),
    }.items(),
    ids=lambda item: item[0],
)
def test_other_files_than_those_saved_are_noticed(tmp_path, harm):
    checkpoint.save_params(tmp_path / "params", TREE)
    harm[1](next((tmp_path / "params" / "d").iterdir()))
    with pytest.raises(StorageError, match=r"delete .*params to make it again"):
        checkpoint.restore_params(tmp_path / "params", TREE)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "3",
        '{"files": 3, "logs": {}}',
        '{"files": {}}',
        "[" * 100_000,
        '{"files": {"d": 1}, "logs": {}}',
    ],
    ids=range(9),
)
def test_a_malformed_manifest_is_damage_not_a_traceback(tmp_path, text):
    checkpoint.save_params(tmp_path / "params", TREE)
    (tmp_path / "params" / manifest.NAME).write_text(text)
    assert "params" in manifest.damage(tmp_path / "params")


def test_weights_are_checked_before_they_are_merged_too(tmp_path):
    """A copy without its log is whole. Mutation: the manifest not looked at, or its logs missed."""
    (tmp_path / "log").write_text("row\n")
    checkpoint.save_params(tmp_path / "params", {"a": jnp.arange(50.0)}, tmp_path / "log")
    copy = tmp_path / "elsewhere" / "params"
    shutil.copytree(tmp_path / "params", copy)
    assert weight_files.open_weights(copy).view("a", 3, 5).tolist() == [3.0, 4.0]
    flip(next((copy / "d").iterdir()), 77)
    with pytest.raises(ValueError, match=r"is not what was written; make .* again"):
        weight_files.open_weights(copy)


@pytest.mark.parametrize("name", ["summary.json", "log"])
def test_files_beside_weights_are_checked_with_them(tmp_path, name):
    """Mutation: only the first of them is described. A log may grow afterwards."""
    for beside in ("log", "summary.json"):
        (tmp_path / beside).write_text('{"loss": 1.25}')
    checkpoint.save_params(tmp_path / "params", TREE, tmp_path / "log", tmp_path / "summary.json")
    with (tmp_path / name).open("a") as file:
        file.write("more")
    assert not manifest.damage(tmp_path / "params")
    (tmp_path / name).write_text('{"loss": 1.26}')
    assert manifest.damage(tmp_path / "params") == f"{tmp_path / name} is not what was written"


def test_names_in_manifests_stay_near_their_folder(tmp_path):
    """Mutation: a log, or a noted file, may lie anywhere."""
    checkpoint.save_params(tmp_path / "params", TREE)
    files.write_text(tmp_path / "x", "x")
    written = files.read_json(tmp_path / "params" / manifest.NAME)
    for name in ("../x", "../../../x", str(tmp_path / "x"), "../y/../x", "x/../../x"):
        logs = {name: manifest.describe(tmp_path / "x")}
        files.write_json(tmp_path / "params" / manifest.NAME, {**written, "logs": logs})
        assert bool(manifest.damage(tmp_path / "params")) == (name != "../x")
    for name in ("../x", str(tmp_path / "x"), "params/../x"):
        noted = {name: manifest.describe(tmp_path / "x")}
        content = {"files": noted, "xxh3": manifest._own_checksum(noted)}
        files.write_json(tmp_path / "params" / manifest.CHECKSUMS, content)
        assert "checksums.json is not what was written" in manifest.changed(tmp_path / "params")
    manifest.note(tmp_path, "x")
    text = (tmp_path / manifest.CHECKSUMS).read_text()
    assert not manifest.changed(tmp_path)
    (tmp_path / manifest.CHECKSUMS).write_text(text.replace('"x"', '"y"'))
    assert "checksums.json is not what was written" in manifest.changed(tmp_path)


def test_checksums_do_not_depend_on_the_order_of_the_notes(tmp_path):
    """Fails when a job that was killed between two notes, and makes them in another order, ends with other bytes."""
    for name in ("b", "a"):
        files.write_text(tmp_path / name, name)
    contents = []
    for order in ("ab", "ba"):
        for name in order:
            manifest.note(tmp_path, name)
        contents.append((tmp_path / manifest.CHECKSUMS).read_bytes())
        (tmp_path / manifest.CHECKSUMS).unlink()
    assert contents[0] == contents[1]


def test_a_folder_of_an_earlier_version_has_no_manifest(tmp_path):
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "params", TREE)
    equal(checkpoint.restore_params(tmp_path / "params", TREE), TREE)


def test_two_states_are_kept_and_the_newest_is_used(tmp_path):
    """Mutation: one is kept; the oldest are kept."""
    store_of(tmp_path, 2, 10, 9, 11)
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["10", "11"]
    assert newest(tmp_path) == 11


def test_a_damaged_state_falls_back_to_the_one_before(tmp_path, capsys):
    state = store_of(tmp_path, 3, 5)
    flip(next((state / "5" / "d").iterdir()), 77)
    store = checkpoint.StateStore(state, tmp_path / "log")
    step, restored = store.restore(lambda: TREE)
    assert (step, int(restored["step"])) == (3, 3)
    assert "continuing from step 3, not 5" in capsys.readouterr().err
    store.save(5, TREE)  # its name is free again
    store.close()
    assert newest(tmp_path) == 5


def test_all_states_damaged_is_an_error_that_says_what_to_delete(tmp_path):
    state = store_of(tmp_path, 3, 5)
    for step in (3, 5):
        flip(next((state / str(step) / "d").iterdir()), 77)
    with pytest.raises(StorageError, match=f"delete {state} to train this part from its start"):
        newest(tmp_path)
    assert len(list(state.iterdir())) == 2


def test_the_log_belongs_to_the_state(tmp_path):
    """A row changed after the state of step 5 costs this state; later rows may be anything.

    Mutation: the log is not checked, or all of it is.
    """
    store_of(tmp_path, 3, 5)
    log = tmp_path / "log"
    log.write_text(log.read_text() + "a torn ro")
    assert newest(tmp_path) == 5
    log.write_text("row 3\nrow 6\na torn ro")
    assert newest(tmp_path) == 3


def test_states_of_an_earlier_version_are_restored(tmp_path):
    with ocp.CheckpointManager(tmp_path / "state", options=ocp.CheckpointManagerOptions(max_to_keep=1)) as manager:
        manager.save(4, args=ocp.args.StandardSave(TREE))
    store = checkpoint.StateStore(tmp_path / "state", tmp_path / "log")
    step, state = store.restore(lambda: jax.tree.map(jnp.zeros_like, TREE))
    assert step == 4
    equal(state, TREE)
    equal(loop.state_before(None, lambda: TREE, tmp_path, 4), TREE)  # of a replay


def test_what_a_killed_save_left_is_deleted(tmp_path):
    state = store_of(tmp_path, 3)
    for name in (".5.saving", ".5.saving.orbax-checkpoint-tmp", "7.orbax-checkpoint-tmp"):
        shutil.copytree(state / "3", state / name)
    assert newest(tmp_path) == 3
    assert [path.name for path in state.iterdir()] == ["3"]


def test_everything_is_on_disk_before_it_appears(tmp_path, monkeypatch):
    """Mutation: no sync of a file, of a folder, or of the folder that holds the new name, or after the renaming."""
    events = []
    fsync, rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd))[1])

    def recorded_rename(path, target):
        events.append(("rename", str(path), str(target)))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", recorded_rename)
    checkpoint.save_params(tmp_path / "new" / "params", TREE)
    hidden, path = tmp_path / "new" / ".params.saving", tmp_path / "new" / "params"
    at = events.index(("rename", str(hidden), str(path)))
    wanted = {hidden, *(hidden / file.relative_to(path) for file in path.rglob("*"))}
    assert {str(file) for file in wanted} <= set(events[:at])
    assert str(tmp_path / "new") in events[at:]
    assert str(tmp_path) in events[:at]  # the new folder's own name


def test_written_files_are_on_disk_before_they_appear(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append(str(b)), replace(a, b))[1])
    files.write_text(tmp_path / "a" / "b.txt", "text")
    kinds = ["partial" if event.endswith(".partial") else event for event in events]
    assert kinds == [str(tmp_path), "partial", str(tmp_path / "a" / "b.txt"), str(tmp_path / "a")]


def test_an_error_while_saving_is_raised_by_the_next_call(tmp_path, monkeypatch):
    def full(folder, logs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest, "seal", full)
    store = checkpoint.StateStore(tmp_path / "state", tmp_path / "log")
    store.save(1, TREE)
    with pytest.raises(OSError, match="No space left"):
        store.close()
    assert newest(tmp_path) == 0
