"""Show the parts of each workdir (done, running, saved, not begun or damaged), and what a start would do next.

  warp-jax status runs/quickstart
  warp-jax status --verify runs/seed0 runs/seed1

It changes nothing. Exit code: 0 all is done, 3 a workdir is unfinished, 2 a workdir is damaged or is none.
"""

from __future__ import annotations

import sys

from absl import flags
from etils import epy

from warp_jax import cli, files

with epy.lazy_imports():  # at their first use: --help does not wait for JAX
    from warp_jax.experiment import status


_VERIFY = flags.DEFINE_bool("verify", False, "Read every file and compare it with its checksum.")


def show(name: str) -> int:
    """Print the table of one workdir; return its exit code."""
    try:
        workdir = files.as_path(name)
        parts = status.read(workdir, verify=_VERIFY.value)
    except (ValueError, OSError) as error:
        cli.print_error(str(error))
        return status.BROKEN
    print(workdir)
    width = max(24, *(len(part.name) for part in parts))
    for part in parts:
        print(f"  {part.name:<{width}} {status.describe(part)}")
    print(*status.next_lines(parts), sep="\n")
    return status.exit_code(parts)


def main(argv: list[str]) -> None:
    """Show all workdirs; exit with the code of the worst."""
    codes = {show(name) for name in argv[1:]}
    if not codes:
        cli.fail("no workdir is given; try warp-jax status runs/quickstart")
    sys.exit(status.BROKEN if status.BROKEN in codes else max(codes))


def start() -> None:
    """Parse the flags and run."""
    cli.run(main, required=(), example="runs/quickstart", arguments=True)
