"""The command warp-jax: its subcommands, and `warp-jax --help`. Nothing large is imported before a subcommand starts.

`python -m warp_jax.commands` is the same without an installation; scripts/ has a file for each subcommand.
"""

import difflib
import importlib
import sys
from typing import NamedTuple


class Command(NamedTuple):
    """A subcommand. Its module has a function `start()`, which parses the flags."""

    module: str
    line: str  # what it does


GROUPS = {
    "Train": {
        "run": Command("warp_jax.main", "Run or resume WARP in one workdir, from SFT to the report."),
        "sweep": Command("warp_jax.commands.sweep", "Run a job for each point of a sweep, and compare them."),
        "compile": Command("warp_jax.commands.compile_for_tpu", "Check without a TPU that a config fits a TPU slice."),
    },
    "Look at workdirs": {
        "status": Command("warp_jax.commands.status", "Show what is done, and what a start would do next."),
        "report": Command("warp_jax.commands.report", "Write the HTML report of one or several workdirs."),
        "compare": Command("warp_jax.commands.compare", "Print tables that compare finished workdirs."),
        "sample": Command("warp_jax.commands.sample", "Print the answers of several policies side by side."),
        "best-of-n": Command("warp_jax.commands.best_of_n", "Measure best-of-N of SFT, a baseline without training."),
    },
    "Use the weights": {
        "merge": Command("warp_jax.commands.merge", "Merge checkpoints on disk, of any size."),
        "export": Command("warp_jax.commands.export", "Write a policy as a Hugging Face folder."),
    },
    "Set up the shell": {
        "completion": Command("warp_jax.commands.completion", "Print the completion script of bash, zsh or fish."),
    },
}
COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}
HEAD = """WARP (Weight Averaged Rewarded Policies, arXiv 2406.16768) in JAX and Flax.

usage: warp-jax COMMAND [--flag=value ...]

  warp-jax run --config=quickstart --workdir=runs/quickstart
"""
TAIL = "warp-jax COMMAND --help lists the flags of a command; warp-jax --version prints the versions."


def overview() -> str:
    """The text of `warp-jax --help`."""
    groups = (
        "\n".join([f"{title}:", *(f"  {name:<12}{command.line}" for name, command in commands.items())])
        for title, commands in GROUPS.items()
    )
    return "\n\n".join([HEAD.rstrip(), *groups, TAIL])


def run(name: str) -> None:
    """Start a command with the arguments of this process; as `python -m`, it can import from the current folder."""
    sys.path.insert(0, "")
    try:
        importlib.import_module(COMMANDS[name].module).start()
    except KeyboardInterrupt:  # during the imports; later, a command has its own line
        print("error: stopped by SIGINT", file=sys.stderr)
        sys.exit(130)


def main() -> None:
    """Entry point of warp-jax."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in COMMANDS:
        sys.argv[:2] = [f"warp-jax {name}"]
        run(name)
    elif name == "--version":
        run("run")  # which has this flag
    elif name in ("", "--help", "-h", "help"):
        print(overview())
        sys.exit(0 if name else 2)
    else:
        close = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {close[0]}?" if close else f"want one of {', '.join(COMMANDS)};"
        print(f"error: unknown command {name!r}: {hint} See warp-jax --help", file=sys.stderr)
        sys.exit(2)
