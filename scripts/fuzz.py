"""Give the program broken input of many kinds, and look for tracebacks, hangs and half-written files.

  python scripts/fuzz.py --config=configs/tiny.py --trials=200 --out=fuzz.csv

Each trial changes one valid input at random and tries it in a process of its own. The trial holds if the program
takes the input, or refuses it in one line and leaves no file; it must refuse a manifest whose content has changed.

flags      command lines of warp_jax.main, up to the training
headers    safetensors files that are opened and read
rows       data files (.jsonl, .json, .csv and their .gz) that are loaded and checked
manifests  manifests and checksums of saved weights
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import importlib
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import flags
from etils import epy

from warp_jax import cli, files
from warp_jax import main as program

with epy.lazy_imports():  # at their first use: --help does not wait for JAX
    from warp_jax import settings as typed
    from warp_jax import types
    from warp_jax.experiment import jobs
    from warp_jax.storage import manifest, model_files, weight_files


KINDS = flags.DEFINE_list("kinds", ["flags", "headers", "rows", "manifests"], "Kinds of input.", allow_override=True)
TRIALS = flags.DEFINE_integer("trials", 200, "Trials of each kind.", lower_bound=1, allow_override=True)
# tests import several scripts, which have these flags too
SEED = flags.DEFINE_integer("seed", 0, "Seed of the random changes.", allow_override=True)
OUT = flags.DEFINE_string("out", "fuzz.csv", "CSV file for the trials that did not hold.", allow_override=True)

FIELDS = ("kind", "trial", "seed", "input", "outcome", "errors")
SECONDS = 120  # a trial that takes longer hangs
MEMORY = 16 * 2**30
REFUSALS = {cli.BAD_INPUT, 70, cli.STORAGE}
NASTY: Sequence[object] = (
    *(None, True, -1, 0, 1, 7, 2**31, 10**23, -0.0, 1e-320, 1e308, float("inf"), float("nan"), 0.5),
    *("", " ", "\0", "\ud800", "../x", "/", "a:b", "x" * 5000, "\u202e\n", "None", "[]", "{", "1e999", "(1,", "\\"),
    *([], {}, [None], [[]], {"a": []}, [1, "1"], (0.1, "x"), {"": {"": {}}}),
)
TEXTS = (
    "",
    "x",
    "nan",
    "inf",
    "-1",
    "0",
    "1e999",
    "10**23",
    "(0.1,",
    "('x',)",
    "None",
    "../x",
    "a:b",
    "\u00fc\n",
    "[]",
)
HARD_TO_WRITE = ("/", "/proc/x", "/dev/null", "a/\0b", "x" * 300, "configs", "", " ", "a\nb", "~", "..", "foo://b/x")
NO_CONFIGS = ("", "x.py", "configs", "/dev/null", "configs/tiny.py:x", "README.md", "broken.py", "exits.py", "empty.py")


class Trial(NamedTuple):
    """One input, as text for the results, and the action that takes or refuses it in a process of its own."""

    shown: str
    action: Callable[[], object]


def nasty(chance: random.Random) -> object:
    """A value that is likely to be wrong."""
    return chance.choice(NASTY)


def changed_bytes(content: bytes, chance: random.Random) -> bytes:
    """Flip, insert, cut or repeat a few bytes."""
    data = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        place = chance.randrange(len(data) + 1)
        how = chance.randrange(4)
        if how == 0 and place < len(data):
            data[place] ^= 1 << chance.randrange(8)
        elif how == 1:
            data[place:place] = chance.choice((b"\0", b"{", b"[" * 50, b'"', b"\xff", b",", b"9" * 30, b"-", b"\n"))
        elif how == 2:
            del data[place : place + chance.choice((1, 2, 8, 10**6))]
        else:
            data[place:place] = data[place : place + chance.choice((1, 8, 64))]
    return bytes(data)


def changed_json(value: object, chance: random.Random) -> object:
    """Replace, delete or add one part of a JSON value."""
    if isinstance(value, dict) and value and chance.random() < 0.8:
        key = chance.choice(list(value))
        rest = {name: part for name, part in value.items() if name != key}
        return chance.choice(
            (rest, {**rest, str(nasty(chance)): value[key]}, {**value, key: nested(value[key], chance)})
        )
    if isinstance(value, list) and value and chance.random() < 0.8:
        place = chance.randrange(len(value))
        return [*value[:place], nested(value[place], chance), *value[place + 1 :]]
    return nasty(chance)


def nested(value: object, chance: random.Random) -> object:
    """Change a part inside a value, or now and then nest it in thousands of lists."""
    return ["deep"] if chance.random() < 0.02 else changed_json(value, chance)


def as_text(value: object, chance: random.Random) -> bytes:
    """JSON text; lists that say "deep" are nested deeply."""
    depth = chance.choice((50, 900, 5_000, 100_000))
    text = json.dumps(value, default=list).replace('["deep"]', "[" * depth + "]" * depth)
    return text.encode(errors="surrogatepass")


def try_flags(folder: Path, chance: random.Random) -> Trial:
    """A command line of warp_jax.main with one to three wrong or unusual arguments."""
    for name, text in (("broken.py", "def get_config(:"), ("exits.py", "import sys; sys.exit(0)"), ("empty.py", "")):
        (folder / name).write_text(text)
    settings = leaves(program.CONFIG.value.to_dict())
    arguments = ["--config=configs/tiny.py", "--workdir=run"]
    for _ in range(chance.randint(1, 3)):
        value = chance.choice((chance.choice(TEXTS), repr(nasty(chance))[:200]))
        name = chance.choice((*settings, chance.choice(settings)[1:], "seed.x", "", "warp"))
        arguments += [
            chance.choice(
                (
                    *[f"--config.{name}={value}"] * 6,
                    f"--config.{name}",
                    f"--{chance.choice(('run', 'iteration', 'merge', 'accept', 'process_id', 'x', 'nomerge'))}={value}",
                    f"--workdir={chance.choice(HARD_TO_WRITE)}",
                    f"--config={chance.choice(NO_CONFIGS)}",
                    value,
                    f"-{name}",
                )
            )
        ]
    arguments = [argument.replace("\0", "") for argument in arguments]  # no system passes them

    def action() -> None:
        jobs.run_part = lambda *given: "it would run"
        sys.argv = ["main", *arguments]  # where ml_collections looks for overrides
        flags.FLAGS.unparse_flags()
        program.app.run(program.main, sys.argv, flags_parser=program.parse_flags)

    return Trial(" ".join(map(repr, arguments[2:])), action)


def leaves(config: dict[str, object], prefix: str = "") -> list[str]:
    """Paths of all settings."""
    found = []
    for name, value in config.items():
        found += leaves(value, f"{prefix}{name}.") if isinstance(value, dict) and value else [prefix + name]
    return found


def try_header(folder: Path, chance: random.Random) -> Trial:
    """A safetensors file with another header, or other bytes."""
    values = np.arange(24, dtype=np.float32)
    header: object = {
        "__metadata__": {"format": "pt"},
        "a.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b.weight": {"dtype": "BF16", "shape": [6, 6], "data_offsets": [24, 96]},
    }
    for _ in range(chance.randint(0, 2)):
        header = changed_json(header, chance)
    text = as_text(header, chance)
    length = chance.choice((len(text), len(text), len(text), chance.getrandbits(64), len(text) + 8))
    content = length.to_bytes(8, "little") + text + values.tobytes()
    if chance.random() < 0.5:
        content = changed_bytes(content, chance)
    (folder / model_files.SINGLE).write_bytes(content)

    def action() -> None:
        weights = weight_files.open_weights(folder)
        for name, tensor in weights.tensors.items():
            weights.view(name, 0, tensor.size)

    return Trial(repr(content[:300]), action)


def try_rows(folder: Path, chance: random.Random) -> Trial:
    """A data file with a changed row, or changed bytes."""
    rows: list[object] = [{"text": f"film {i} was a good one", "label": i % 2, "more": i} for i in range(300)]
    suffix = chance.choice((".jsonl", ".jsonl", ".json", ".csv"))
    place = chance.randrange(len(rows))
    for _ in range(chance.randint(0, 2)):
        rows[place] = changed_json(rows[place], chance)
    if suffix == ".csv":
        table = io.StringIO()
        writer = csv.writer(table)
        writer.writerow(["text", "label", "more"])
        writer.writerows(list(row.values()) if isinstance(row, dict) else [row] for row in rows)
        content = table.getvalue().encode(errors="surrogatepass")
    elif suffix == ".json":
        content = as_text(rows, chance)
    else:
        content = b"\n".join(as_text(row, chance) for row in rows)
    if chance.random() < 0.5:
        content = changed_bytes(content, chance)
    if chance.random() < 0.2:
        content, suffix = gzip.compress(content), suffix + ".gz"
        content = changed_bytes(content, chance) if chance.random() < 0.5 else content
    path = folder / f"rows{suffix}"
    path.write_bytes(content)
    changes = {"data.source": str(path), "evaluation.num_prompts": 32, "evaluation.batch_size": 32}
    settings = typed.from_config(program.CONFIG.value.to_dict()).replace(changes)
    return Trial(f"{path.name}: {rows[place]!r:.200}", lambda: program.check(settings, folder / "run"))


def try_manifest(folder: Path, chance: random.Random) -> Trial:
    """Saved files whose manifest or checksums have changed."""
    saved = folder / "params"
    (saved / "d").mkdir(parents=True)
    for name in ("a", "d/b", "d/empty"):
        (saved / name).write_bytes(b"" if name.endswith("empty") else chance.randbytes(50))
    (folder / "log").write_text("a line\n")
    manifest.seal(saved, {"../log": 7})
    manifest.note(folder, "log")
    path = chance.choice((saved / manifest.NAME, folder / manifest.CHECKSUMS))
    before = path.read_bytes()
    parsed = json.loads(before)
    changed = as_text(changed_json(parsed, chance), chance) if chance.random() < 0.5 else changed_bytes(before, chance)
    path.write_bytes(changed)

    def action() -> None:
        found = manifest.damage(saved) or manifest.changed(folder)
        if found:
            raise types.StorageError(found)
        if path.name == manifest.NAME and json.loads(changed)["files"] != parsed["files"]:
            raise AssertionError("another manifest was taken")

    return Trial(f"{path.name}: {changed[:200]!r}", action)


MAKE: dict[str, Callable[[Path, random.Random], Trial]] = {
    **{"flags": try_flags, "headers": try_header, "rows": try_rows, "manifests": try_manifest}
}


def in_child(action: Callable[[], object], folder: Path, errors: Path) -> int:
    """Run an action in a process of its own, in `folder`; return its exit code, negative for a signal."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 1
    try:
        signal.alarm(SECONDS)  # ends this process
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.chdir(folder)
        try:
            action()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        except (ValueError, types.StorageError) as error:  # what the program reports in one line
            cli.print_error(str(error))
            code = cli.BAD_INPUT
        except BaseException:
            sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(code)


def judge(code: int, errors: str, left: bool) -> str:
    """Outcome of a trial: `taken`, `refused` or the problem."""
    if "Traceback" in errors:
        return "traceback"
    if code < 0:
        return "hang" if code == -signal.SIGALRM else f"signal {-code}"
    if code == 0:
        return "taken"
    if code not in REFUSALS or errors.count("error: ") != 1 or len(errors.splitlines()) > 3:
        return f"no single line: code {code}"
    return "something left behind" if left else "refused"


def try_one(kind: str, number: int) -> dict[str, object]:
    """Make one input, try it and judge how it ended."""
    chance = random.Random(f"{SEED.value} {kind} {number}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "configs").symlink_to(Path("configs").absolute())
        trial = MAKE[kind](folder, chance)
        before = set(folder.rglob("*"))
        code = in_child(trial.action, folder, folder / "errors.txt")
        errors = (folder / "errors.txt").read_text(errors="replace")
        left = set(folder.rglob("*")) - before - {folder / "errors.txt"}
        with contextlib.suppress(OSError):
            shutil.rmtree(folder / "run")
    outcome = judge(code, errors, bool(left))
    return dict(zip(FIELDS, (kind, number, SEED.value, trial.shown, outcome, errors[-400:]), strict=True))


def main(argv: list[str]) -> None:
    """Run all trials, write those that did not hold, and print how many of each kind ended in which way."""
    del argv
    if unknown := sorted(set(KINDS.value) - MAKE.keys()):
        cli.fail(f"--kinds: got {unknown[0]!r}, want some of {', '.join(MAKE)}")
    importlib.import_module("warp_jax.diagnosis.replay")  # and by it all that the processes of the trials need
    bad = []
    for kind in KINDS.value:
        counts: dict[str, int] = {}
        for number in range(TRIALS.value):
            row = try_one(kind, number)
            outcome = str(row["outcome"])
            counts[outcome] = counts.get(outcome, 0) + 1
            if outcome not in ("taken", "refused"):
                bad.append(row)
                print(*row.values(), sep=" | ", flush=True)
        print(f"{kind}: {TRIALS.value} tried: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
    content = io.StringIO()
    writer = csv.DictWriter(content, FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(bad)
    files.write_text(Path(OUT.value), content.getvalue())
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    sys.path.insert(0, "")  # configs import other configs from this folder
    cli.run(main, required=("config",), example="--config=configs/tiny.py")
