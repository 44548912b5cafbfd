"""Run WARP: python -m warp_jax.main --config=configs/quickstart.py --workdir=runs/quickstart

Any setting can be changed on the command line: --config.warp.ema_rate=0.005. Started again with the same config and
workdir, it resumes. configs/default.py explains every setting.
"""

import functools
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from warp_jax import cli, files
from warp_jax.data.corpus import Corpus
from warp_jax.experiment import inputs, jobs, preparation, warp
from warp_jax.experiment.workdir import ACCEPTABLE, claim
from warp_jax.parallel import hosts, stopping, supervisor
from warp_jax.settings import Settings, from_config
from warp_jax.types import RewardError, StorageError

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, for example configs/quickstart.py.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder for all results; a job in an existing one is resumed.")
RUN = flags.DEFINE_integer("run", 0, "Train only this run of one iteration, 1 to warp.num_runs; 0 = the whole job.")
MERGE = flags.DEFINE_bool("merge", False, "Merge the finished runs of one iteration; the last merge writes the report.")
ITERATION = flags.DEFINE_integer("iteration", 0, "Iteration of --run or --merge; 0 = the first that is not merged.")
ACCEPT = flags.DEFINE_list(
    "accept", [], f"Go on although these inputs have changed since the workdir was made: {', '.join(ACCEPTABLE)}."
)
MULTIHOST = flags.DEFINE_bool("multihost", False, "Run as one of several processes, all started with the same command.")
COORDINATOR = flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0, if JAX does not find it itself.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", 0, "Number of processes, if JAX does not find it itself.")
PROCESS_ID = flags.DEFINE_integer("process_id", -1, "Number of this process, from 0, if JAX does not find it itself.")
flags.DEFINE_bool(
    "version", False, "Print the versions of warp_jax, jax, flax, orbax-checkpoint and Python, then exit."
)


def check(settings: Settings, workdir: Path, accept: Collection[str] = ()) -> Mapping[str, Corpus]:
    """Load the data, check all input, then claim the workdir. Bad input raises ValueError, and nothing is written."""

    def read() -> Mapping[str, Corpus]:
        if unknown := set(accept) - set(ACCEPTABLE):
            raise ValueError(f"accept: got {min(unknown)!r}, want some of {', '.join(ACCEPTABLE)}")
        inputs.check(settings)
        corpora = preparation.load_corpora(settings)
        inputs.try_rewards(settings, corpora)
        return corpora

    corpora = hosts.all_or_none(read)
    claim(settings, workdir, corpora, accept)
    return corpora


def main(argv: Sequence[str]) -> None:
    """Entry point."""
    del argv
    logging.set_verbosity(logging.ERROR)  # hide warnings of libraries, such as JAX and Orbax
    try:
        if MULTIHOST.value:
            supervisor.continue_in_child()
        workdir = files.as_path(str(WORKDIR.value))
        if MULTIHOST.value:
            hosts.initialize(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
    except ValueError as error:
        cli.fail(str(error))
    except (RuntimeError, OSError) as error:
        cli.fail(f"multihost: no connection to the other processes: {error}", cli.TRY_AGAIN)
    stopping.listen()
    try:
        _run(CONFIG.value, workdir)
    except BaseException as error:
        if MULTIHOST.value:
            hosts.exit_if_multihost(error)
        raise


def _run(config: ConfigDict, workdir: Path) -> None:
    """Run the part of the job that the flags name; print errors that a user can correct in one line."""
    try:
        settings = hosts.all_or_none(lambda: from_config(config.to_dict()))
        corpora = check(settings, workdir, ACCEPT.value)
        part = jobs.choose_part(settings, workdir, run=RUN.value, merge=MERGE.value, iteration=ITERATION.value)
    except RewardError as error:
        _end(error)
    except (ValueError, OSError, hosts.PeerError) as error:
        hosts.exit_if_peer_lost(error)
        cli.fail(str(error))
    try:
        line = jobs.run_part(settings, corpora, workdir, part)
        if line and hosts.is_first():
            print(line)
    except RewardError as error:
        _end(error)
    except (FloatingPointError, warp.JobError) as error:
        cli.fail(str(error))
    except StorageError as error:
        cli.fail(str(error), cli.STORAGE)
    except (warp.BusyError, hosts.PeerError) as error:
        cli.fail(str(error), cli.TRY_AGAIN)
    except stopping.Stopped as stopped:
        if hosts.is_first():
            print(f"stopped by {stopped.signal} in {stopped}; the same command resumes the job", file=sys.stderr)
        sys.exit(stopped.exit_code)


def _end(error: RewardError) -> NoReturn:
    """Print the error and end the process, even if the user's function still runs in a thread."""
    cli.print_error(str(error))
    hosts.exit_at_once(cli.BAD_INPUT)


parse_flags = functools.partial(
    cli.parse_flags,
    required=("config", "workdir"),
    example="--config=configs/quickstart.py --workdir=runs/quickstart",
    load=functools.partial(cli.load_config, CONFIG),
)

if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
