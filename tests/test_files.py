"""Files that are written whole or not at all."""

import json
import os

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
