"""The folder of compiled programs: whole and checked entries, a limit, and whom it trusts."""

import os
import threading
from pathlib import Path

import jax
import pytest

from warp_jax.storage import program_cache
from warp_jax.storage.program_cache import Store


def test_a_damaged_entry_is_missing_and_is_replaced(tmp_path):
    """Fails when an entry is given out with a flipped bit or without its end, or stays damaged for ever."""
    store = Store(tmp_path)
    store.put("key", b"program")
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:-1] + b"n", bytes([whole[0] ^ 1]) + whole[1:], b""):
        path.write_bytes(damaged)
        assert store.get("key") is None
        store.put("key", b"program")
        assert store.get("key") == b"program"
    assert store.get("other") is None


def test_a_reader_never_meets_half_an_entry(tmp_path):
    """Fails when an entry is written in place, while another process reads it."""
    store, value = Store(tmp_path), os.urandom(2_000_000)
    store.put("key", value)
    writing = threading.Thread(target=lambda: [store.put("key", value) for _ in range(30)])
    writing.start()
    while writing.is_alive():
        assert store.get("key") == value
    writing.join()


def test_entries_that_were_not_used_for_longest_are_deleted(tmp_path):
    """Fails when the size has no limit, reading an entry does not keep it, or another file in the folder is deleted."""
    (tmp_path / "thesis.tex").write_bytes(bytes(5000))
    store = Store(tmp_path, max_bytes=3 * (1000 + 32))
    for number, key in enumerate("abc"):
        store.put(key, bytes(1000))
        os.utime(next(tmp_path.glob(f"{key}-*")), ns=(number, number))
    assert store.get("a") is not None
    store.put("d", bytes(1000))
    assert [store.get(key) is not None for key in "abcd"] == [True, False, True, True]
    assert len(list(tmp_path.iterdir())) == 4


def test_a_folder_that_cannot_be_used_changes_nothing(tmp_path):
    """Fails when the end of a compilation, which may be days old, raises for want of a folder to store it in."""
    store = Store(tmp_path / "missing")
    store.put("key", b"program")
    assert store.get("key") is None
    assert not list(tmp_path.iterdir())
    program_cache.enable(Path("/proc/nowhere"))
    assert not jax.config.jax_compilation_cache_dir


def test_a_program_of_another_processor_is_not_used(tmp_path, monkeypatch):
    """Fails when a folder that machines share gives one of them instructions that it does not have."""
    Store(tmp_path).put("key", b"program")
    monkeypatch.setattr(program_cache, "machine", lambda: "another")
    assert Store(tmp_path).get("key") is None


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_folder_that_others_may_write_into_is_not_used(mode, tmp_path):
    """Fails when another user could put a program there, which this user would run."""
    tmp_path.chmod(mode)
    program_cache.enable(tmp_path)
    assert not jax.config.jax_compilation_cache_dir


def test_the_place_of_the_folder(tmp_path, monkeypatch):
    """Fails when workdirs side by side do not share it, or a bucket is asked for each program."""
    monkeypatch.setenv("WARP_JAX_CACHE", str(tmp_path))
    assert program_cache.choose("auto", tmp_path / "runs" / "x") == tmp_path / "runs" / ".xla_cache"
    assert program_cache.choose("off", tmp_path) is None
    assert program_cache.choose(str(tmp_path / "new"), tmp_path) == tmp_path / "new"
    monkeypatch.setattr(program_cache.files, "is_remote", lambda path: True)
    assert program_cache.choose("auto", tmp_path) == tmp_path / "xla"
