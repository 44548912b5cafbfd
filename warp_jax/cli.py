"""Command lines: parse flags, and report bad input in one line with exit code 2."""

import functools
import importlib.metadata
import platform
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import app, flags

BAD_INPUT = 2  # exit code
STORAGE = 74  # exit code: a saved file is damaged, or cannot be read or written
TRY_AGAIN = 75  # exit code: the input is valid, and the same command may work later


def fail(message: str, code: int = BAD_INPUT) -> NoReturn:
    """Print one line to stderr and exit with `code`."""
    print_error(message)
    sys.exit(code)


def print_error(message: str) -> None:
    """Print one line to stderr."""
    print("error: " + " ".join(message.split()), file=sys.stderr)


def versions() -> str:
    """Versions of warp_jax, of Python and of the libraries that the results depend on, one per line."""

    def version(name: str) -> str:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    names = ("warp_jax", "jax", "flax", "orbax-checkpoint")
    return "\n".join([*(f"{name} {version(name)}" for name in names), f"Python {platform.python_version()}"])


def parse_flags(
    argv: Sequence[str],
    *,
    required: Sequence[str],
    example: str,
    load: Callable[[], object] = lambda: None,
    arguments: bool = False,
) -> list[str]:
    """Parse flags for `app.run`; report errors in one line, without a traceback. With --version, print and exit.

    required: names of flags without a default. example: arguments that work, for the error message. load: called after
    parsing; its errors are reported in the same way. arguments: True if the program takes arguments without a flag.
    """
    try:
        rest = flags.FLAGS(list(argv))
        if "version" in flags.FLAGS and flags.FLAGS["version"].value:
            print(versions())
            sys.exit(0)
        missing = [name for name in required if not flags.FLAGS[name].value]
        load()
    except Exception as error:  # a config file is a program that can raise anything
        fail(str(error))
    asks_for_help = any(arg in ("--help", "-h", "--helpfull") for arg in argv)
    if missing and not asks_for_help:
        fail(f"--{missing[0]} is missing; try {example}")
    if len(rest) > 1 and not arguments and not asks_for_help:
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
    """Run a script: parse its flags by `parse_flags(argv, **wanted)`, then call main."""
    app.run(main, flags_parser=functools.partial(parse_flags, **wanted))
