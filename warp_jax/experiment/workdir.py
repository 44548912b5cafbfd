"""A workdir: the config that it belongs to, and fingerprints of the models and rows that were used in it."""

import functools
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from warp_jax import files
from warp_jax.data import corpus
from warp_jax.parallel import hosts
from warp_jax.pretrained import sources
from warp_jax.settings import Settings, from_config
from warp_jax.storage import model_files

CONFIG = "config.json"
FINGERPRINTS = "models.json"
DATA = "data.json"
LOCK = "lock"  # held while a job claims the workdir, or makes the inputs that all runs share
# settings that may change on resume; another mesh changes rounding only
MAY_CHANGE = re.compile(r"checkpoint_(every|minutes) |report\.|front\.|mesh |(gold|rewards\.[^ ]+)\.timeout ")


def claim(settings: Settings, workdir: Path, corpora: Mapping[str, corpus.Corpus]) -> None:
    """Write config.json, if the workdir is new or belongs to the same rows and config, apart from MAY_CHANGE.

    Jobs of one workdir may start at the same time. Raises ValueError if the workdir belongs to another config, other
    rows or other models, holds other files, or cannot be written.
    """
    waiting = f"another process is preparing {workdir}: waiting for it"

    def claim_locked() -> None:
        _check_owner(settings, workdir)  # before the lock, which is a file in there
        with files.locked(workdir / LOCK, functools.partial(print, waiting, file=sys.stderr)):
            _check_owner(settings, workdir)
            fingerprints = check_models_unchanged(settings, workdir)
            rows = check_rows_unchanged(settings.data.source, corpora, workdir)
            files.write_json(workdir / CONFIG, settings.as_json())
            if fingerprints:
                files.write_json(workdir / FINGERPRINTS, fingerprints)
            files.write_json(workdir / DATA, rows)

    try:
        hosts.on_first_process(claim_locked)
    except OSError as error:
        raise ValueError(f"workdir: cannot write to {workdir}: {error.strerror}; choose another --workdir") from error


def read_settings(workdir: Path) -> Settings:
    """Settings of a workdir, with the defaults of those that it was made without.

    Raises ValueError that names config.json, if earlier versions accepted values that are refused now.
    """
    path = workdir / CONFIG
    content = files.read_json(path)
    try:
        return from_config(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; if an earlier version accepted it, correct it in that file") from error


def check_models_unchanged(settings: Settings, workdir: Path) -> dict[str, str]:
    """Fingerprint of every pretrained model's folder, by its name in the config.

    Raises ValueError if a model's files have changed since the workdir was made.
    """
    names = [part.source for part in settings.reward_parts.values()]
    folders = {name: Path(name) for name in (*names, settings.gold.source) if name and Path(name).is_dir()}
    if settings.model.source:
        folders[settings.model.source] = sources.find(settings.model.source)
    found, path = {name: model_files.fingerprint(folder) for name, folder in folders.items()}, workdir / FINGERPRINTS
    before = files.read_json(path) if path.exists() else {}
    for source, fingerprint in found.items():
        stored = before.get(source, fingerprint)
        if stored != fingerprint and stored != _older_fingerprint(folders[source]):
            raise ValueError(
                f"workdir {workdir} was made with other files of {source}, and its weights belong to them; "
                "restore those files, or choose another --workdir"
            )
    return found


def check_rows_unchanged(source: str, corpora: Mapping[str, corpus.Corpus], workdir: Path) -> dict[str, Any]:
    """Number and fingerprint of the rows. Raises ValueError if the workdir has others; older workdirs have none."""
    count = sum(len(split.rows) for split in corpora.values())
    found, path = {"rows": count, "fingerprint": corpus.fingerprint(corpora)}, workdir / DATA
    before = files.read_json(path) if path.exists() else found
    if before != found:
        raise ValueError(
            f"workdir {workdir} was made with other rows of {source} ({before.get('rows', '?')} rows, now {count}), "
            "and its results belong to them; restore those rows, or choose another --workdir"
        )
    return found


def _older_fingerprint(folder: Path) -> str:
    """Fingerprint that earlier versions stored: of all files with these suffixes, used by the model or not."""
    suffixes = (".json", ".jinja", ".model", ".safetensors", ".bin")
    return files.fingerprint(folder, sorted(path.name for path in folder.iterdir() if path.suffix in suffixes))


def _check_owner(settings: Settings, workdir: Path) -> None:
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"workdir: {workdir} is a file, want a folder")
    found = {path.name for path in workdir.iterdir()} if workdir.exists() else set()  # once: others may write there
    if CONFIG in found:
        before = read_settings(workdir).as_json()
        changed = sorted(_differences(before, settings.as_json()))
        refused = [line for line in changed if not MAY_CHANGE.match(line)]
        if refused:
            raise ValueError(
                f"workdir {workdir} was made by another config: {'; '.join(refused)}; choose another --workdir"
            )
    elif any(name != LOCK and not name.startswith(".") for name in found):
        raise ValueError(f"workdir: {workdir} holds other files and no config.json, want a new or empty folder")


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from _differences(before, after, f"{prefix}{key}.")
        elif before != after:
            yield f"{prefix}{key} was {before!r}, now {after!r}"
