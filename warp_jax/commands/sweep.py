"""Run a sweep: one job of warp_jax.main for each point that a config file defines, and a table that compares them.

  warp-jax sweep --config=sweep_ema_rate --out=runs/sweep           # run all points, one by one
  warp-jax sweep --config=sweep_ema_rate --out=runs/sweep --print   # only print their commands

Besides get_config(), the config file defines sweep(add), which adds points: a name, and the config values to change.

  def sweep(add):
      for ema_rate in (0.0, 0.003, 0.01):
          add(f"ema_rate_{ema_rate:g}", {"warp.ema_rate": ema_rate})

An override --config.x.y=value applies to all points. All points are checked before any is started or printed. Start the
sweep again to skip finished points and resume the others. Exit codes: 0 success, 1 a point failed (the others still
run), 2 bad input.

To run the points in parallel, write the commands to a file with --jobs=sweep.txt, and let each task of an array job run
one line of it in this folder. With Slurm, and in an Indexed Job of Kubernetes:

  sbatch --array=1-4 --requeue --wrap='sed -n "${SLURM_ARRAY_TASK_ID}p" sweep.txt | bash'
  sed -n "$((JOB_COMPLETION_INDEX + 1))p" sweep.txt | bash
"""

import functools
import json
import operator
import re
import runpy
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict

from warp_jax import cli, exit_codes, files
from warp_jax.files import hub
from warp_jax.settings import from_config, legacy

CONFIG = cli.define_config("config", "Config with sweep(add), see above: a file, or a name such as sweep_ema_rate.")
OUT = flags.DEFINE_string("out", None, "Folder to write: the workdir of a point is OUT/NAME.")
PRINT = flags.DEFINE_bool("print", False, "Print the command lines and run nothing.")
JOBS = flags.DEFINE_string("jobs", "", "File to write with the command lines, one per line; nothing is run.")
ONLY = flags.DEFINE_list("only", [], "Names of the points to run, separated by commas; default: all.")

PROGRAM = [sys.executable, "-m", "warp_jax.main"]
COMPARE = [sys.executable, "-m", "warp_jax.commands", "compare"]
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+-]*")
PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")

say = functools.partial(print, file=sys.stderr, flush=True)  # stdout is for the table


class Point(NamedTuple):
    """One job of a sweep."""

    name: str
    workdir: Path
    arguments: tuple[str, ...]  # command-line arguments of warp_jax.main
    config: ConfigDict  # the config that main reads from them


def load_points(config_file: str, common: Mapping[str, Any], out: Path) -> list[Point]:
    """Read the points of a config file; raise ValueError if main would read another value for one of them."""
    path = cli.find_config(config_file).split(":", 1)[0]  # without the argument of get_config
    define_points = runpy.run_path(path).get("sweep")
    if define_points is None:
        raise ValueError(f"--config: {path} has no sweep(add), want one as in the config sweep_ema_rate")
    values_of: dict[str, dict[str, Any]] = {}

    def add(name: str, values: Mapping[str, Any]) -> None:
        if not NAME.fullmatch(name):
            raise ValueError(f"sweep: got the name {name!r}, want letters, digits and . _ = + -: it names a folder")
        if name in values_of:
            raise ValueError(f"sweep: two points have the name {name!r}, want different names")
        values_of[name] = {**common, **values}

    define_points(add)
    if not values_of:
        raise ValueError(f"--config: sweep(add) of {config_file} adds no point, want add(name, values) for each point")
    return [make_point(config_file, name, values, out) for name, values in values_of.items()]


def make_point(config_file: str, name: str, values: Mapping[str, Any], out: Path) -> Point:
    """Make a point and check that its command line, when parsed, gives `values`; an int may stand for a float."""
    try:
        overrides = [to_argument(path, value) for path, value in values.items()]
        config = parse([f"--config={config_file}", *overrides])
        for path, value in values.items():
            got, want = operator.attrgetter(path)(config), plain(value)
            if got != want or (type(got) is not type(want) and (type(got), type(want)) != (float, int)):
                raise ValueError(f"config.{path}: got {value!r}, but main would read {got!r}; want the same type")
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"sweep, point {name}: {error.args[0] if error.args else error}") from error
    return Point(name, out / name, (f"--config={config_file}", f"--workdir={out / name}", *overrides), config)


def to_argument(path: str, value: Any) -> str:
    """Write an override --config.path=value: text unchanged, other values as Python literals."""
    if not PATH.fullmatch(path):
        raise ValueError(f"got {path!r}, want the path of a config value, such as warp.ema_rate")
    value = plain(value)
    argument = f"--config.{path}={value if isinstance(value, str) else repr(value)}"
    if argument.splitlines() != [argument]:
        raise ValueError(f"config.{path}: got {value!r}, want no line break, since a command is one line")
    return argument


def plain(value: Any) -> Any:
    """Convert NumPy numbers to Python numbers, and lists to tuples."""
    if isinstance(value, (list, tuple)):
        return tuple(plain(item) for item in value)
    return value.item() if hasattr(value, "item") else value


def parse(arguments: Sequence[str]) -> ConfigDict:
    """Parse command-line arguments into a config, as main does."""
    argv = ["main", *arguments]
    values = flags.FlagValues()
    cli.define_config("config", "", flag_values=values, argv=argv)
    values(argv)
    return values["config"].value


def settings(point: Point) -> dict[str, Any]:
    """Validate the config of a point; return it as main writes it to config.json. Raises ValueError."""
    try:
        return from_config(point.config.to_dict()).as_json()
    except ValueError as error:
        raise ValueError(f"sweep, point {point.name}: {error}") from error


def is_finished(point: Point) -> bool:
    """Return True if the workdir holds the report of this config. main reports a workdir of another config."""
    results = [point.workdir / name for name in ("report.html", "summary.json", "config.json")]
    if not all(path.is_file() for path in results):
        return False
    made, wanted = (
        json.loads(hub.without_revisions(json.dumps(content)))  # config.json has the commits, a point may have none
        for content in (legacy.upgrade(files.read_json(results[-1])), settings(point))
    )
    return made == wanted


def run_points(points: Sequence[Point]) -> list[Point]:
    """Run the points one after another; return those that failed."""
    pending, failed = [point for point in points if not is_finished(point)], []
    say(f"{len(points) - len(pending)} of {len(points)} points are finished")
    started = time.monotonic()
    for done, point in enumerate(pending):
        left = (time.monotonic() - started) / max(done, 1) * (len(pending) - done) / 60
        say(f"[{done + 1}/{len(pending)}] {point.name}: started" + (f", about {left:.1f} min left" if done else ""))
        code = subprocess.run([*PROGRAM, *point.arguments], check=False).returncode
        if code or not is_finished(point):
            meaning = f" ({exit_codes.EXIT_CODES[code]})" if code in exit_codes.EXIT_CODES else ""
            say(f"{point.name}: failed with exit code {code}{meaning if code else ' and no report'}")
            failed.append(point)
    return failed


def choose(points: Sequence[Point], names: Sequence[str]) -> list[Point]:
    """Select the points with these names; all if there are none."""
    known = [point.name for point in points]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"--only: got {', '.join(unknown)}, want names of the sweep: {', '.join(known)}")
    return [point for point in points if not names or point.name in names]


def main(argv: list[str]) -> None:
    """Run the points and print the table, or only write the commands."""
    del argv
    flag: Any = flags.FLAGS["config"]
    try:
        points = load_points(flag.config_filename, flag.override_values, files.as_path(str(OUT.value)))
        points = choose(points, ONLY.value)
        _ = [settings(point) for point in points]  # raises if main would refuse one
        lines = [shlex.join(["python", *PROGRAM[1:], *point.arguments]) for point in points]
        if JOBS.value:
            files.write_text(Path(JOBS.value), "".join(f"{line}\n" for line in lines))
    except (ValueError, TypeError, OSError, ImportError) as error:
        cli.fail(error)
    if PRINT.value or JOBS.value:
        print("\n".join(lines) if PRINT.value else f"{JOBS.value}: {len(lines)} command lines")
        return
    failed = run_points(points)
    finished = [str(point.workdir) for point in points if is_finished(point)]
    table_failed = bool(finished) and subprocess.run([*COMPARE, *finished], check=False).returncode != 0
    if failed:
        say(f"failed: {', '.join(point.name for point in failed)}; run the same command again to resume them")
    sys.exit(1 if failed or table_failed else 0)


def start() -> None:
    """Parse the flags and run."""
    cli.run(
        main,
        required=("config", "out"),
        example="--config=sweep_ema_rate --out=runs/sweep",
        load=functools.partial(cli.load_config, CONFIG),
    )
