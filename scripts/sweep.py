"""Run a sweep: one job of warp_jax.main for each point that a config file names, and one table over all of them.

  python scripts/sweep.py --config=configs/sweep_ema_rate.py --out=runs/sweep   # here, one after another
  python scripts/sweep.py --config=configs/sweep_ema_rate.py --out=runs/sweep --print   # or --jobs=FILE: only the lines

Beside get_config(), the config file defines its points, each a name and values of the config:

  def sweep(add):
      for ema_rate in (0.0, 0.003, 0.01):
          add(f"ema_rate_{ema_rate:g}", {"warp.ema_rate": ema_rate})

--config.x.y=value holds for all points. Before anything starts, each command line is parsed as main parses it, and must
give just the values that were asked for. Started again, finished points are skipped and the others go on. A point that
fails does not stop the others; the exit code is then 1, and 2 on bad input.

A scheduler's indexed job runs one line of --jobs, in this folder: with Slurm, and in an Indexed Job of Kubernetes,

  sbatch --array=1-4 --requeue --wrap='sed -n "${SLURM_ARRAY_TASK_ID}p" sweep.txt | bash'
  sed -n "$((JOB_COMPLETION_INDEX + 1))p" sweep.txt | bash
"""

import functools
import json
import re
import shlex
import subprocess
import sys
import time
import types
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any, NamedTuple

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from warp_jax import cli, files

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file with sweep(add), as configs/sweep_ema_rate.py.")
OUT = flags.DEFINE_string("out", None, "Folder of the workdirs: OUT/NAME for each point.")
PRINT = flags.DEFINE_bool("print", False, "Only print the command lines.")
JOBS = flags.DEFINE_string("jobs", "", "Only write the command lines to this file, one a line.")
ONLY = flags.DEFINE_list("only", [], "Names of points, separated by commas; default: all.")

PROGRAM = [sys.executable, "-m", "warp_jax.main"]
COMPARE = [sys.executable, str(Path(__file__).with_name("compare.py"))]
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+-]*")
PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


class Point(NamedTuple):
    """One job of a sweep."""

    name: str
    workdir: Path
    arguments: tuple[str, ...]  # of warp_jax.main
    config: ConfigDict  # what main makes of them


def load_points(config_file: str, common: Mapping[str, Any], out: Path) -> list[Point]:
    """The points of a config file; ValueError if main would not take one of them just as it was meant."""
    settings: dict[str, dict[str, Any]] = {}

    def add(name: str, values: Mapping[str, Any]) -> None:
        if not NAME.fullmatch(name):
            raise ValueError(f"sweep: got the name {name!r}, want letters, digits and . _ = + -: it names a folder")
        if name in settings:
            raise ValueError(f"sweep: two points have the name {name!r}, want one of each")
        settings[name] = {**common, **values}

    find_sweep(config_file)(add)
    if not settings:
        raise ValueError(f"--config: sweep(add) of {config_file} adds no point")
    return [make_point(config_file, name, values, out) for name, values in settings.items()]


def find_sweep(config_file: str) -> Callable[[Any], None]:
    """The function `sweep` of a config file (PATH, or PATH:ARGUMENT of its get_config)."""
    path = config_file.split(":", 1)[0]
    module = types.ModuleType("sweep_config")
    SourceFileLoader("sweep_config", path).exec_module(module)
    if not hasattr(module, "sweep"):
        raise ValueError(f"--config: {path} has no sweep(add), which names the points; see configs/sweep_ema_rate.py")
    return module.sweep


def make_point(config_file: str, name: str, values: Mapping[str, Any], out: Path) -> Point:
    """A point with its command line, which gives exactly `values` when it is parsed."""
    try:
        overrides = [to_argument(path, value) for path, value in values.items()]
        config = parse([f"--config={config_file}", *overrides])
        for path, value in values.items():
            got = functools.reduce(lambda group, key: group[key], path.split("."), config)
            if not is_same(got, plain(value)):
                raise ValueError(f"config.{path}: got {value!r}, want a value such as {got!r}, which main would read")
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"sweep, point {name}: {error.args[0] if error.args else error}") from error
    return Point(name, out / name, (f"--config={config_file}", f"--workdir={out / name}", *overrides), config)


def to_argument(path: str, value: Any) -> str:
    """--config.path=value, which config_flags reads back exactly: text as it is, all else as a Python literal."""
    if not PATH.fullmatch(path):
        raise ValueError(f"got {path!r}, want the path of a config value, such as warp.ema_rate")
    value = plain(value)
    argument = f"--config.{path}={value if isinstance(value, str) else repr(value)}"
    if argument.splitlines() != [argument]:
        raise ValueError(f"config.{path}: got {value!r}, want no line break: a command is one line")
    return argument


def plain(value: Any) -> Any:
    """Python's own numbers for NumPy's, tuples for lists."""
    if isinstance(value, (list, tuple)):
        return tuple(plain(item) for item in value)
    return value.item() if hasattr(value, "item") else value


def parse(arguments: Sequence[str]) -> ConfigDict:
    """The config that main reads from these arguments."""
    argv = ["main", *arguments]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    values(argv)
    return values["config"].value


def is_same(got: Any, want: Any) -> bool:
    """Equal and of one type; a whole number may stand for a float."""
    if isinstance(want, tuple):
        return isinstance(got, tuple) and len(got) == len(want) and all(map(is_same, got, want))
    return got == want and (type(got) is type(want) or (type(got), type(want)) == (float, int))


def is_finished(point: Point) -> bool:
    """Whether the workdir holds the report of this very config; what another config left is for main to judge."""
    made = [point.workdir / name for name in ("report.html", "summary.json", "config.json")]
    return all(path.is_file() for path in made) and files.read_json(made[-1]) == json.loads(point.config.to_json())


def say(text: str) -> None:
    """A line on stderr, so that stdout holds the table."""
    print(text, file=sys.stderr, flush=True)


def run_points(points: Sequence[Point]) -> list[Point]:
    """Run the points one after another; returns those that failed."""
    pending, failed = [point for point in points if not is_finished(point)], []
    say(f"{len(points) - len(pending)} of {len(points)} points are finished")
    started = time.monotonic()
    for done, point in enumerate(pending):
        left = (time.monotonic() - started) / max(done, 1) * (len(pending) - done) / 60
        say(f"[{done + 1}/{len(pending)}] {point.name}: started" + (f", about {left:.1f} min left" if done else ""))
        code = subprocess.run([*PROGRAM, *point.arguments], check=False).returncode
        if code or not is_finished(point):
            say(f"{point.name}: failed with exit code {code}{'' if code else ' and no report'}")
            failed.append(point)
    return failed


def choose(points: Sequence[Point], names: Sequence[str]) -> list[Point]:
    """The points of these names, or all."""
    known = [point.name for point in points]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"--only: the sweep has no {', '.join(unknown)}; it has {', '.join(known)}")
    return [point for point in points if not names or point.name in names]


def main(argv: list[str]) -> None:
    """Entry point."""
    del argv
    flag = flags.FLAGS["config"]
    try:
        points = choose(load_points(flag.config_filename, flag.override_values, Path(OUT.value)), ONLY.value)
        lines = [shlex.join(["python", *PROGRAM[1:], *point.arguments]) for point in points]
        if JOBS.value:
            files.write_text(Path(JOBS.value), "".join(f"{line}\n" for line in lines))
    except (ValueError, TypeError, OSError, ImportError) as error:
        cli.fail(str(error))
    if PRINT.value or JOBS.value:
        print("\n".join(lines) if PRINT.value else f"{JOBS.value}: {len(lines)} command lines")
        return
    failed = run_points(points)
    finished = [str(point.workdir) for point in points if is_finished(point)]
    table_failed = bool(finished) and subprocess.run([*COMPARE, *finished], check=False).returncode != 0
    if failed:
        say(f"failed: {', '.join(point.name for point in failed)}; the same command goes on with them")
    sys.exit(1 if failed or table_failed else 0)


if __name__ == "__main__":
    sys.path.insert(0, "")  # configs import one another from this folder, as under python -m warp_jax.main
    parse_flags = functools.partial(
        cli.parse_flags,
        required=("config", "out"),
        example="--config=configs/sweep_ema_rate.py --out=runs/sweep",
        load=lambda: CONFIG.value is None or CONFIG.value.seed,  # a file that failed to load raises only here
    )
    app.run(main, flags_parser=parse_flags)
