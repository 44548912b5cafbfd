"""Atomic writes of files and folders."""

import errno
import fcntl
import json
import os
import time

import pytest

from warp_jax import files


def test_write_text_makes_directories_and_leaves_one_file(tmp_path):
    """Mutation: parents not made; a copy in place of a rename."""
    path = tmp_path / "a" / "b" / "note.txt"
    files.write_text(path, "first, longer")
    files.write_text(path, "zwölf")
    assert path.read_bytes() == "zwölf".encode()
    assert list(path.parent.iterdir()) == [path]


def test_write_text_keeps_the_old_file_when_the_rename_fails(tmp_path, monkeypatch):
    """Mutation: written straight to the path; the old file deleted first."""
    path = tmp_path / "note.txt"
    files.write_text(path, "old")

    def fail(*_):
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        files.write_text(path, "new")
    assert path.read_text() == "old"
    monkeypatch.undo()
    files.write_text(path, "new")
    assert path.read_text() == "new"


def test_json_there_and_back(tmp_path):
    """Mutation: keys sorted; text not indented; no newline at the end."""
    path = tmp_path / "value.json"
    value = {"b": [1, 2.5, None], "a": {"text": "é"}}
    files.write_json(path, value)
    assert files.read_json(path) == value
    assert path.read_text(encoding="utf-8").startswith('{\n  "b": [\n')
    assert path.read_text(encoding="utf-8").endswith("}\n")
    assert json.loads(path.read_bytes()) == value


def test_jsonl_rows_know_their_place(tmp_path):
    """Fails when blank lines count as rows or not as lines, U+2028 ends a line, or a byte order mark is broken JSON."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": "x\xe2\x80\xa8y"}\r\n \n{"a": "\xc3\xa9"}')
    assert files.read_jsonl(path) == [(f"{path} line 1", {"a": "x\u2028y"}), (f"{path} line 3", {"a": "é"})]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n\n{', "rows.jsonl line 3: broken JSON: Expecting property name"),
        (b"[" * 100_000, "rows.jsonl line 1: broken JSON"),
        (b'{"a": 1}\n[1]', "rows.jsonl line 2: got list, want a JSON object"),
        ('{"a": "é"}'.encode("utf-16"), "rows.jsonl: not UTF-8 text"),
        ('{"a": "é"}'.encode("utf-16-le"), "rows.jsonl: not UTF-8 text"),
        ('{"a": "é"}'.encode("latin-1"), "rows.jsonl: not UTF-8 text"),
        ('{"a": "e"}'.encode("utf-16-le"), "rows.jsonl: not UTF-8 text .*line 1"),
    ],
)
def test_bad_jsonl_is_named(tmp_path, content, message):
    """Fails when the error of a codec or of JSON does not name the file and the line."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        files.read_jsonl(path)


def _publish(out, then=lambda: None):
    with files.staged(out) as staging:
        files.write_text(staging / "note.txt", str(then))
        then()


def test_two_stagings_at_once_publish_one_folder(tmp_path):
    """Mutation: one staging folder for all processes; the staging folder of a running process deleted."""
    out = tmp_path / "out"
    with pytest.raises(FileExistsError, match="another process wrote it first"):
        _publish(out, then=lambda: _publish(out, then=str))
    assert (out / "note.txt").read_text() == str(str)
    assert list(tmp_path.iterdir()) == [out]


def test_staging_leaves_nothing_after_an_error_and_deletes_what_a_kill_left(tmp_path):
    """Mutation: no cleaning up; the leftovers of another folder deleted, or a file."""
    kept = {tmp_path / ".other.partial", tmp_path / ".out.2.json", tmp_path / ".out.file.partial"}
    for folder in (".other.partial", ".out.2.json", ".out.partial", ".out.0123abcd.partial"):
        (tmp_path / folder).mkdir()
    (tmp_path / ".out.file.partial").write_text("being written")
    with pytest.raises(ZeroDivisionError):
        _publish(tmp_path / "out", then=lambda: 1 / 0)
    assert set(tmp_path.iterdir()) == kept


def test_a_folder_that_cannot_be_synced_is_no_error(tmp_path, monkeypatch):
    """Fails when a file system that syncs files only is refused, or a file that cannot be synced passes."""

    def refuse(descriptor):
        raise OSError(errno.EINVAL, "no")

    monkeypatch.setattr(os, "fsync", refuse)
    files.sync(tmp_path)
    (tmp_path / "x").touch()
    with pytest.raises(OSError, match="no"):
        files.sync(tmp_path / "x")


def test_a_lock_that_is_held_for_a_moment_is_waited_for(tmp_path, monkeypatch):
    """Fails when status.py, which looks at a lock, makes a job end as if another one ran."""
    with (tmp_path / "lock").open("w") as looked_at:
        fcntl.flock(looked_at, fcntl.LOCK_SH)
        monkeypatch.setattr(time, "sleep", lambda seconds: fcntl.flock(looked_at, fcntl.LOCK_UN) if seconds else None)
        with files.locked(tmp_path / "lock"):
            pass
