"""Command lines: parse flags; turn any error into one line and an exit code."""

import contextlib
import datetime
import difflib
import errno
import functools
import importlib.metadata
import os
import platform
import re
import resource
import shlex
import shutil
import sys
import tempfile
import textwrap
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from warp_jax import files
from warp_jax.exit_codes import BAD_INPUT, INTERRUPTED, MEMORY, STORAGE, TRY_AGAIN, UNEXPECTED, USER_FUNCTION

_RESTORE = "check the disk or the network file system"
_ADVICE = {  # errors of the machine, not of the input: what to do
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space, or ask for a larger quota",
    errno.EROFS: "make the file system writable",
    errno.EACCES: "give this user the right to read and write there",
    errno.EPERM: "give this user the right to read and write there",
    errno.EMFILE: "raise the limit of open files: ulimit -n",
    errno.ENFILE: "close files of other programs",
    errno.EIO: _RESTORE,
    errno.ESTALE: _RESTORE,
    errno.EPIPE: "let the program that reads the output run to its end",
}
_STATUS = re.compile(r"[A-Z_]+: ")  # begins the errors of XLA and tensorstore
STAGES = (
    "sft, reward_model, iteration_I/run_M, iteration_I/run_M/KEPT (anchor, average or step_N, see config.keep), "
    "iteration_I/merged, or liti:ETA (from sft to the last merge)"
)
FEW_FILES = 8  # that may still be opened
_LOG, _LOG_CHARACTERS = "error.log", 500_000
_workdir: Path | None = None  # folder of the error log
_CONFIGS = Path(__file__).with_name("configs")  # in a checkout, a link to the folder configs/

flags.disclaim_key_flags()  # a config flag belongs to the module that asks for it


def explain(error: BaseException, *, bad_input: bool = False) -> tuple[int, str]:
    """Exit code and one line for an error. bad_input: True if a check of the input raised it."""
    text = " ".join(str(error).split()) or type(error).__name__
    code = getattr(error, "exit_code", None)
    if code is not None and not (bad_input and code == UNEXPECTED):
        return code, text
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "stopped by SIGINT"
    for cause in (*_causes(error), *_no_descriptor_left(), *_workdir_vanished()):
        number, place = _system_error(cause)
        if number == errno.ENOMEM:
            advice = "use a smaller batch_size, more microbatches or a larger mesh"
            return MEMORY, f"out of memory ({type(cause).__name__}: {str(cause)[:200]}); {advice}"
        if number in _ADVICE or (number and not bad_input and _is_in_workdir(Path(place))):
            advice = _ADVICE.get(number, "check this path")
            return STORAGE, f"{place}: {os.strerror(number)}; {advice}, then start the same command again"
    if bad_input:
        return BAD_INPUT, text
    return UNEXPECTED, f"unexpected {type(error).__name__}: {text[:500]}; please report it"


def _no_descriptor_left() -> list[OSError]:
    """The error of opening one file too many, if the process is near its limit: C++ libraries fail in odd ways then."""
    try:
        left = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - len(os.listdir("/dev/fd"))
    except OSError as error:
        return [error]
    return [OSError(errno.EMFILE, os.strerror(errno.EMFILE))] if 0 <= left < FEW_FILES else []


def _workdir_vanished() -> list[OSError]:
    """The error of writing into the workdir, if that is gone: libraries report it in many ways."""
    is_gone = _workdir is not None and files.has_vanished(_workdir)
    return [FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(_workdir))] if is_gone else []


def _is_in_workdir(path: Path) -> bool:
    return _workdir is not None and not files.is_remote(_workdir) and path.is_relative_to(_workdir.absolute())


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and its causes, the newest first."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)


def _system_error(error: BaseException) -> tuple[int, str]:
    """Error number of the operating system (0 for other errors), and the path of the file, if known.

    Libraries in C++ write both into the text of a ValueError or RuntimeError.
    """
    text = str(error)
    quoted = re.search(r'"(/[^"]+)"', text)
    name = os.fsdecode(getattr(error, "filename", None) or (quoted[1] if quoted else str(_workdir or "the output")))
    place = name if "://" in name or name == "the output" else os.path.abspath(name)
    if isinstance(error, MemoryError):
        return errno.ENOMEM, place
    if isinstance(error, BrokenPipeError):
        return errno.EPIPE, "the output"
    if isinstance(error, OSError):
        return error.errno or errno.ENOENT * isinstance(error, FileNotFoundError), place
    if not _STATUS.match(text):
        return 0, place
    if found := re.search(r"os_error_code='(\d+)'", text):
        return int(found[1]), place
    named = [number for number in _ADVICE if os.strerror(number) in text]
    return named[0] if named else errno.ENOMEM * text.startswith("RESOURCE_EXHAUSTED"), place


def fail(problem: str | Exception, code: int = BAD_INPUT) -> NoReturn:
    """Print one line to stderr and exit with `code`; an exception has its own line and code (see `explain`)."""
    if isinstance(problem, Exception):
        code = report(problem, bad_input=True)
    else:
        print_error(problem)
    sys.exit(code)


def print_error(message: str) -> None:
    """Print one line to stderr, with control characters as escapes."""
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(message.split()))
    with contextlib.suppress(OSError):  # stderr may be closed
        print(f"error: {line}", file=sys.stderr, flush=True)


def report(error: BaseException, *, bad_input: bool = False) -> int:
    """Print one line about an error, write its traceback to the log, and return the exit code (see `explain`)."""
    code, line = explain(error, bad_input=bad_input)
    is_clear = code in (BAD_INPUT, TRY_AGAIN, INTERRUPTED) or isinstance(error, BrokenPipeError)
    if not is_clear and (code == USER_FUNCTION or not hasattr(error, "exit_code")):
        line += f"; traceback: {_log(error)}"
    print_error(line)
    return code


def _log(error: BaseException) -> str:
    """Append the traceback to the log of the workdir, or else write it to a temporary file; return the path."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    entry = f"{now} {shlex.join(sys.orig_argv)}\n{''.join(traceback.format_exception(error))}\n"
    lost = isinstance(error, files.BucketError)  # the log would be in that bucket
    with contextlib.suppress(OSError, files.BucketError):
        if _workdir and not lost and (_workdir / "config.json").exists():  # else the folder is not this job's
            path = _workdir / _LOG
            before = path.read_bytes().decode(errors="replace") if path.exists() else ""
            files.write_text(path, (before + entry)[-_LOG_CHARACTERS:])
            return str(path)
    with contextlib.suppress(OSError):
        descriptor, name = tempfile.mkstemp(".log", "warp_jax_error_", text=True)
        with open(descriptor, "w", encoding="utf-8", errors="replace") as file:
            file.write(entry[-_LOG_CHARACTERS:])
        return name
    return "none, no file could be written"


def _log_of_thread(args: Any) -> None:
    if args.exc_value is not None:
        _log(args.exc_value)


def keep_quiet(workdir: Path | None = None) -> None:
    """Hide the log messages of libraries; write the errors of threads to the log of the workdir."""
    global _workdir  # noqa: PLW0603  of the process, as the hooks are
    logging.set_verbosity(logging.FATAL)
    if workdir is not None:
        _workdir = workdir
        threading.excepthook = sys.unraisablehook = _log_of_thread


def end(code: int) -> NoReturn:
    """End the process without waiting for its threads, which may hang or print."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


def version(name: str) -> str:
    """Version of a package; "not installed" also for warp_jax in the current folder, as in an image for GKE."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def versions() -> str:
    """Versions of warp_jax, of Python and of the libraries that the results depend on, one per line."""
    names = ("warp_jax", "jax", "flax", "orbax-checkpoint")
    return "\n".join([*(f"{name} {version(name)}" for name in names), f"Python {platform.python_version()}"])


def config_names() -> list[str]:
    """Names of this project's configs, for --config."""
    return sorted(path.stem for path in _CONFIGS.glob("*.py") if path.stem != "__init__")


def find_config(given: str) -> str:
    """Path of a config file, given its path or the name of one of this project's; raises ValueError if there is none.

    What follows a colon, the argument of its get_config, is kept.
    """
    name, colon, argument = given.partition(":")
    if Path(name).is_file():
        return given
    if name in config_names():
        return f"{_CONFIGS / name}.py{colon}{argument}"
    close = difflib.get_close_matches(Path(name).stem, config_names(), 1)
    hint = f"; did you mean {close[0]}?" if close else ""
    names = ", ".join(config_names())
    raise ValueError(
        f"no config {name!r}, want the path of a config file, such as my_config.py, or one of {names}{hint}"
    )


def check_overrides(config: object, name: str, argv: Sequence[str]) -> None:
    """Raise ValueError if an argument --NAME.a.b changes a setting that the config does not have."""
    overrides = (re.match(rf"--?{name}\.([\w.]+)", argument) for argument in argv)
    for path in [override[1] for override in overrides if override]:
        group = config
        for part in path.split("."):
            if not isinstance(group, ConfigDict):
                break
            if part not in group:
                close = difflib.get_close_matches(part, group.keys(), 1)
                hint = f"did you mean {close[0]}?" if close else f"want one of {', '.join(sorted(group.keys()))}"
                raise ValueError(f"{name}.{path}: no setting {part!r}, {hint}")
            group = group[part]


class _ConfigParser(flags.ArgumentParser[Any]):
    """The parser of a config flag. It takes names too, and knows the settings that the command line changes."""

    def __init__(self, by_path: flags.ArgumentParser[Any], name: str, argv: tuple[str, ...] | None) -> None:
        self._by_path, self._name, self._argv = by_path, name, argv

    def parse(self, argument: str) -> Any:
        config = self._by_path.parse(find_config(argument))
        check_overrides(config, self._name, self._argv or sys.argv)
        return config

    def flag_type(self) -> str:
        return self._by_path.flag_type()


def define_config(
    name: str, help_text: str, *, flag_values: flags.FlagValues = flags.FLAGS, argv: Sequence[str] | None = None
) -> flags.FlagHolder[Any]:
    """Define a flag for a config file (see `find_config`) whose settings can be changed: --NAME.setting=value.

    argv: the command line that changes them; None = that of this process.
    """
    holder = config_flags.DEFINE_config_file(
        name,
        None,
        help_text,
        flag_values=flag_values,
        sys_argv=argv and list(argv),
        allow_override=True,  # tests import several programs
    )
    flag = flag_values[name]
    flag.parser = _ConfigParser(flag.parser, name, tuple(argv) if argv else None)
    return holder


def usage(module: str, required: Sequence[str]) -> str:
    """The text of --help: what the module says about itself, then its flags, one paragraph each."""
    width = min(shutil.get_terminal_size((120, 50)).columns, 120)
    lines = [(sys.modules[module].__doc__ or "").rstrip(), "", "flags (* must be given):"]
    for flag in sorted(own_flags(module), key=lambda flag: flag.name):
        name = f"{'*' if flag.name in required else ' '} --{'[no]' if flag.boolean else ''}{flag.name}"
        text = flag.help or ""
        if flag.default not in (None, "", [], False) and "default" not in text:
            text += f" Default: {str(flag.default_as_str).strip(chr(39))}."
        lines += textwrap.wrap(f"{name:<20} {text}", width, subsequent_indent=" " * 21, break_on_hyphens=False)
    return "\n".join(lines)


def own_flags(module: str) -> list[flags.Flag[Any]]:
    """The flags that a module defines."""
    return flags.FLAGS.get_key_flags_for_module(sys.argv[0] if module == "__main__" else module)  # as absl names it


def parse_flags(
    argv: Sequence[str],
    *,
    required: Sequence[str],
    example: str,
    load: Callable[[], object] = lambda: None,
    arguments: bool = False,
    module: str = "__main__",
) -> list[str]:
    """Parse flags for `app.run`; report errors in one line, without a traceback. With --help or --version, exit.

    required: names of flags without a default. example: arguments that work, for the error message. load: called after
    parsing; its errors are reported in the same way. arguments: True if the program takes arguments without a flag.
    module: the module that defines the flags.
    """
    if {"--help", "-help", "-h", "-?"} & set(argv[1:]):
        print(usage(module, required))
        sys.exit(0)
    try:
        rest = flags.FLAGS(list(argv))
        if "version" in flags.FLAGS and flags.FLAGS["version"].value:
            print(versions())
            sys.exit(0)
        missing = [name for name in required if not flags.FLAGS[name].value]
        load()
    except flags.UnrecognizedFlagError as error:
        close = difflib.get_close_matches(error.flagname, [flag.name for flag in own_flags(module)], 1)
        hint = f"did you mean --{close[0]}?" if close else f"see --help, or try {example}"
        fail(f"no flag --{error.flagname}; {hint}")
    except Exception as error:  # a config file is a program that can raise anything
        before, has_traceback, inside = str(error).partition("Traceback (most recent call last)")
        if has_traceback:  # ml_collections puts that of a config file into the message
            fail(f"{before}{inside.strip().splitlines()[-1]}")
        fail(error)
    if missing:
        fail(f"--{missing[0]} is missing; try {example}")
    if len(rest) > 1 and not arguments:
        fail(f"unexpected argument {rest[1]!r}; options start with --, see --help")
    return rest


def load_config(config: flags.FlagHolder[Any]) -> None:
    """Read a config flag; if its file failed to load or leaves a value out, the error is raised only here."""
    if config.value is not None:
        config.value.to_dict()


def numbers(flag: flags.FlagHolder[list[str]], want: str = "numbers separated by commas") -> tuple[float, ...]:
    """Convert the items of a list flag to numbers. Raises ValueError, with `want`, if one is not a number."""
    try:
        return tuple(map(float, flag.value))
    except ValueError:
        raise ValueError(f"--{flag.name}: got {','.join(flag.value)!r}, want {want}") from None


def run(main: Callable[[list[str]], object], **wanted: Any) -> None:
    """Run a script: parse its flags by `parse_flags(argv, **wanted)`, then call main; end any error with one line."""

    def run_main(argv: list[str]) -> None:
        keep_quiet()
        try:
            try:
                main(argv)
            except SystemExit as ended:
                if ended.code:
                    raise
            sys.stdout.flush()
        except SystemExit as ended:
            if isinstance(ended.code, str):
                raise
            end(int(ended.code or 0))
        except BaseException as error:
            end(report(error))

    app.run(run_main, flags_parser=functools.partial(parse_flags, module=main.__module__, **wanted))
