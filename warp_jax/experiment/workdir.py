"""A workdir: the config that it belongs to, and fingerprints of the models, rows and reward functions used in it."""

import datetime
import errno
import functools
import hashlib
import importlib
import json
import re
import shlex
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from warp_jax import files
from warp_jax.data import corpus
from warp_jax.files import hub
from warp_jax.parallel import environment, hosts
from warp_jax.pretrained import sources
from warp_jax.settings import Settings, from_saved
from warp_jax.storage import manifest, model_files
from warp_jax.types import StorageError

CONFIG = "config.json"
FINGERPRINTS = "models.json"
REWARDS = "rewards.json"
DATA = "data.json"
STARTS = "starts.jsonl"  # one line per start: time, environment, accepted changes
REQUIREMENTS = "requirements.lock"  # all packages of the first start, for launchers
MADE = ("tokenizer.json", "gold/gold.json", "gold/summary.json")  # single files that a job makes
LOCK = "lock"  # held while a job claims the workdir, or makes the inputs that all runs share
# settings that may change on resume; another mesh or remat changes rounding only
MAY_CHANGE = re.compile(
    r"checkpoint_(every|minutes) |report\.|front\.|health\.|logging\.|mesh |sampling\.tensor |model\.remat |"
    r"(gold|rewards\.[^ ]+)\.timeout |evaluation\.pass_threshold "
)


def claim(
    settings: Settings, workdir: Path, corpora: Mapping[str, corpus.Corpus], accept: Collection[str] = ()
) -> None:
    """Write config.json, if the workdir is new or belongs to the same inputs and config, apart from MAY_CHANGE.

    Jobs of one workdir may start at the same time. accept: inputs that may have changed (see --accept of main). Raises
    ValueError if the workdir belongs to another config or to other inputs, holds other files, or cannot be written;
    StorageError if one of its files is damaged.
    """

    def on_wait(owner: str) -> None:
        print(f"{owner} is preparing {workdir}: waiting for it", file=sys.stderr)

    def claim_locked() -> None:
        here = environment.describe()
        check_owner(settings, workdir)  # before the lock, which is a file in there
        with files.locked(workdir / LOCK, on_wait):
            files.keep(workdir, LOCK)  # from now on, it must not vanish
            check_owner(settings, workdir)
            files.delete_litter(workdir)
            check_made(workdir)
            _check_environment(workdir, here, accept)
            models = _model_fingerprints(settings) if "models" in accept else check_models_unchanged(settings, workdir)
            rows = _rows(corpora) if "data" in accept else check_rows_unchanged(settings.data.source, corpora, workdir)
            rewards = _check_rewards_unchanged(settings, workdir, accept="rewards" in accept)
            files.write_json(workdir / CONFIG, settings.as_json())
            for name, content in ((FINGERPRINTS, models), (REWARDS, rewards), (DATA, rows)):
                if content:
                    files.write_json(workdir / name, content)
            if not (workdir / REQUIREMENTS).exists() or "versions" in accept:
                files.write_text(workdir / REQUIREMENTS, environment.requirements())
                manifest.note(workdir, REQUIREMENTS, again=True)
            for name in (*MADE, REQUIREMENTS):
                if (workdir / name).exists() and not manifest.is_noted(workdir, name):
                    manifest.note(workdir, name)  # a process was killed before it could
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            command = shlex.join(["python", *sys.orig_argv[1:]])
            start = {"time": now, "command": command, **here, "accepted": sorted(accept)}
            files.write_text(workdir / STARTS, _starts(workdir) + json.dumps(start) + "\n")

    try:
        hosts.on_first_process(claim_locked)
    except OSError as error:
        if error.errno == errno.ENOENT and files.has_vanished(workdir):
            raise StorageError(f"{workdir} has vanished; mount or restore it, and start the job again") from error
        raise ValueError(
            f"workdir: cannot write to {workdir}: {error.strerror or error}; choose another --workdir"
        ) from error


def check_unchanged(settings: Settings, workdir: Path, corpora: Mapping[str, corpus.Corpus]) -> None:
    """Raise ValueError unless the workdir belongs to this config, these rows and models; nothing is written."""
    if not (workdir / CONFIG).is_file():
        raise ValueError(f"workdir: {workdir} has no {CONFIG}, want a folder that warp-jax run made")
    check_owner(settings, workdir)
    check_models_unchanged(settings, workdir)
    check_rows_unchanged(settings.data.source, corpora, workdir)


def _starts(workdir: Path) -> str:
    """The lines of STARTS; "" if it is missing."""
    path = workdir / STARTS
    return path.read_bytes().decode(errors="replace") if path.exists() else ""


def first_command(workdir: Path) -> str:
    """The command line that made a workdir; "" if an earlier version of warp_jax did."""
    first, *_ = [*_starts(workdir).splitlines(), "{}"]
    return str((_parsed(first) or {}).get("command", ""))


def _check_environment(workdir: Path, here: Mapping[str, Any], accept: Collection[str]) -> None:
    """Compare versions and device with all starts; print what else has changed since the last one.

    Raises ValueError if no start had these versions, or this kind of device, and `accept` does not name them: they may
    round differently.
    """
    starts = [start for line in _starts(workdir).splitlines() if (start := _parsed(line))]
    if not starts:
        return
    for kind in ("versions", "device"):
        if kind not in accept and here[kind] not in [start[kind] for start in starts]:
            was, now = (
                [f"{name} {version}" for name, version in given.items()] if kind == "versions" else [given]
                for given in (starts[-1][kind], here[kind])
            )
            first, then = next(pair for pair in zip(was, now, strict=False) if pair[0] != pair[1])
            raise ValueError(
                f"workdir {workdir} was made with {first}, now {then}, which may round differently; go back to it, or "
                f"choose another --workdir{_or_accept(kind)}"
            )
    for key in ("commit", "python", "devices", "processes", "xla_flags"):
        if starts[-1].get(key) != here[key]:
            print(f"note: {key} was {starts[-1].get(key)!r} at the last start, now {here[key]!r}", file=sys.stderr)


def _parsed(line: str) -> dict[str, Any] | None:
    """A line of STARTS; None if it is broken, or of an earlier version of warp_jax."""
    try:
        start = json.loads(line)
        return start if start["versions"].keys() >= {"jaxlib"} and start["device"] else None
    except (ValueError, TypeError, AttributeError, KeyError):
        return None


def check_made(workdir: Path) -> None:
    """Raise StorageError if the tokenizer or the gold reward of the workdir is damaged."""
    if damage := manifest.changed(workdir):
        raise StorageError(f"{damage}; delete it to make it again")


def check_ingredients(settings: Settings, workdir: Path, part: str, iteration: int = 1) -> None:
    """Raise ValueError if something is missing that a part of the job needs, and that a job would make and save.

    part: "sft", "reward_model", or the name of a part that needs both. iteration: it needs the merges of those before.
    """
    needed = [] if settings.model.source else ["tokenizer.json"]
    if part != "sft" and settings.sft.num_steps:
        needed.append("sft/params")
    if part not in ("sft", "reward_model"):
        needed += ["gold/gold.json"] * (settings.gold.source == "tfidf")
        needed += ["reward_model/params"] * settings.needs_reward_model
        needed += [f"iteration_{before}/merged" for before in range(1, iteration)]
    for name in needed:
        path = workdir / name
        if not hosts.number_of_first(path.exists if path.suffix else functools.partial(manifest.is_complete, path)):
            raise ValueError(f"{workdir / name} is missing, and {part} needs it; start the job first, to make it")


def read_settings(workdir: Path) -> Settings:
    """Settings of a workdir, with the defaults of those that it was made without.

    Raises ValueError that names config.json, if earlier versions accepted values that are refused now.
    """
    path = workdir / CONFIG
    content = files.read_json(path)
    try:
        return from_saved(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; if an earlier version accepted it, correct it in that file") from error


def check_models_unchanged(settings: Settings, workdir: Path) -> dict[str, str]:
    """Fingerprint of every pretrained model's folder, by its name in the config.

    Raises ValueError if a model's files have changed since the workdir was made.
    """
    found, before = _model_fingerprints(settings), _stored(workdir / FINGERPRINTS)
    for source, fingerprint in found.items():
        stored = before.get(source, fingerprint)
        if stored != fingerprint and stored != _older_fingerprint(_model_folders(settings)[source]):
            raise ValueError(
                f"workdir {workdir} was made with other files of {source}, and its weights belong to them; "
                f"restore those files, or choose another --workdir{_or_accept('models')}"
            )
    return found


def _model_folders(settings: Settings) -> dict[str, Path]:
    """Folder of every pretrained model, by its name in the config."""
    names = [part.source for part in settings.all_reward_parts.values()]
    folders = [name for name in (*names, settings.gold.source) if name and sources.is_folder(name)]
    return {name: sources.find(name) for name in (*folders, settings.model.source) if name}


def _model_fingerprints(settings: Settings) -> dict[str, str]:
    return {name: model_files.fingerprint(folder) for name, folder in _model_folders(settings).items()}


def check_rows_unchanged(source: str, corpora: Mapping[str, corpus.Corpus], workdir: Path) -> dict[str, Any]:
    """Number and fingerprint of the rows. Raises ValueError if the workdir has others; older workdirs have none."""
    found = _rows(corpora)
    before = _stored(workdir / DATA) if (workdir / DATA).exists() else found
    if before != found:
        raise ValueError(
            f"workdir {workdir} was made with other rows of {source} ({before.get('rows', '?')} rows, now "
            f"{found['rows']}), and its results belong to them; restore those rows, or choose another --workdir"
            f"{_or_accept('data')}"
        )
    return found


def _rows(corpora: Mapping[str, corpus.Corpus]) -> dict[str, Any]:
    count = sum(len(split.rows) for split in corpora.values())
    return {"rows": count, "fingerprint": corpus.fingerprint(corpora)}


def _check_rewards_unchanged(settings: Settings, workdir: Path, *, accept: bool) -> dict[str, str]:
    """Fingerprint of the source file of every reward function of the user's, by its name in the config.

    Raises ValueError if one has changed since the workdir was made.
    """
    names = {part.source for part in settings.all_reward_parts.values()} | {settings.gold.source}
    found = {}
    for name in sorted(names):
        module = name.partition(":")[0]
        if ":" in name and not sources.is_folder(name) and module.partition(".")[0] != "warp_jax":
            origin = importlib.import_module(module).__file__
            found[name] = hashlib.sha256(Path(origin).read_bytes()).hexdigest()[:32] if origin else ""
    before = {} if accept else _stored(workdir / REWARDS)
    for name, fingerprint in found.items():
        if before.get(name, fingerprint) != fingerprint:
            raise ValueError(
                f"workdir {workdir} was made with other code of {name}, and its rewards belong to it; restore that "
                f"code, or choose another --workdir{_or_accept('rewards')}"
            )
    return found


def _or_accept(kind: str) -> str:
    return f", or go on with --accept={kind}"


def _stored(path: Path) -> dict[str, Any]:
    """The fingerprints in a file; {} if it is missing."""
    return files.read_json(path) if path.exists() else {}


def _older_fingerprint(folder: Path) -> str:
    """Fingerprint that earlier versions stored: of all files with these suffixes, used by the model or not."""
    suffixes = (".json", ".jinja", ".model", ".safetensors", ".bin")
    return files.fingerprint(folder, sorted(path.name for path in folder.iterdir() if path.suffix in suffixes))


def check_owner(settings: Settings, workdir: Path) -> None:
    """Raise ValueError if a workdir belongs to another config, or to something else; a commit is a part of a config."""
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"workdir: {workdir} is a file, want a folder")
    found = {path.name for path in workdir.iterdir()} if workdir.exists() else set()  # once: others may write there
    if CONFIG in found:
        before = read_settings(workdir).as_json()
        changed = sorted(_differences(before, settings.as_json()))
        refused = [line for line in changed if not MAY_CHANGE.match(line)]
        if refused:
            moved = re.search(rf"(\S+) was '({hub.PREFIX}[^']+)'", "; ".join(refused))
            advice = f"to go on with that commit, give --config.{moved[1]}={moved[2]}, or " if moved else ""
            raise ValueError(
                f"workdir {workdir} was made by another config: {'; '.join(refused)}; {advice}choose another --workdir"
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
