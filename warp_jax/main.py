"""Run WARP: warp-jax run --config=quickstart --workdir=runs/quickstart

Any setting can be changed on the command line: --config.warp.ema_rate=0.005. Started again with the same config and
workdir, it resumes. configs/default.py explains every setting. Exit codes: 0 done, 2 bad input, 70 a function of yours
failed, 71 out of memory, 74 storage, 75 try again, 130 SIGINT, 1 an error of this program (docs/reliability.md).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from absl import app, flags
from etils import epy
from ml_collections import ConfigDict

from warp_jax import cli, files

with epy.lazy_imports():  # at their first use: --help does not wait for JAX
    from warp_jax import settings as typed
    from warp_jax.data import corpus
    from warp_jax.diagnosis import profiling, replay
    from warp_jax.experiment import inputs, jobs, preparation
    from warp_jax.experiment import workdir as workdirs
    from warp_jax.parallel import hosts, stopping, supervisor
    from warp_jax.storage import program_cache

CONFIG = cli.define_config("config", "Config file, or the name of one of warp_jax, such as quickstart.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder for all results; a job in an existing one is resumed.")
RUN = flags.DEFINE_integer("run", 0, "Train only this run of one iteration, 1 to warp.num_runs; 0 = the whole job.")
MERGE = flags.DEFINE_bool("merge", False, "Merge the finished runs of one iteration; the last merge writes the report.")
ITERATION = flags.DEFINE_integer("iteration", 0, "Iteration of --run or --merge; 0 = the first that is not merged.")
ACCEPTABLE = ("data", "models", "rewards", "versions", "device")
ACCEPT = flags.DEFINE_list(
    "accept", [], f"Go on although these inputs have changed since the workdir was made: {', '.join(ACCEPTABLE)}."
)
REPLAY = flags.DEFINE_string(
    "replay", "", "Repeat the step of this file, which a job wrote, and show what was not finite first; save nothing."
)
PROFILE = flags.DEFINE_integer(
    "profile",
    0,
    "Trace this many steps of the first run that is trained into WORKDIR/profile. Open it in TensorBoard (with xprof), "
    "or its .trace.json.gz at ui.perfetto.dev. 0 = off.",
    lower_bound=0,
)
COMPILATION_CACHE = flags.DEFINE_string(
    "compilation_cache",
    "auto",
    "Folder of compiled programs for the next start, or off; auto: .xla_cache beside the workdir.",
)
MULTIHOST = flags.DEFINE_bool("multihost", False, "Run as one of several processes, all started with the same command.")
COORDINATOR = flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0, if JAX does not find it itself.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", 0, "Number of processes, if JAX does not find it itself.")
PROCESS_ID = flags.DEFINE_integer("process_id", -1, "Number of this process, from 0, if JAX does not find it itself.")
flags.DEFINE_bool(
    "version", False, "Print the versions of warp_jax, jax, flax, orbax-checkpoint and Python, then exit."
)


def check(settings: typed.Settings, workdir: Path, accept: Collection[str] = ()) -> Mapping[str, corpus.Corpus]:
    """Load the data, check all input, then claim the workdir. Bad input raises ValueError, and nothing is written."""

    def read() -> Mapping[str, corpus.Corpus]:
        if hosts.is_first():
            workdirs.check_owner(settings, workdir)  # before anything is downloaded
        if unknown := set(accept) - set(ACCEPTABLE):
            raise ValueError(f"accept: got {min(unknown)!r}, want some of {', '.join(ACCEPTABLE)}")
        inputs.check(settings)
        corpora = preparation.load_corpora(settings)
        inputs.try_rewards(settings, corpora)
        return corpora

    corpora = hosts.all_or_none(read)
    workdirs.claim(settings, workdir, corpora, accept)
    files.keep(workdir, workdirs.CONFIG)
    return corpora


def main(argv: Sequence[str]) -> None:
    """Entry point."""
    del argv
    try:
        if MULTIHOST.value:
            supervisor.continue_in_child()
        workdir = files.as_path(str(WORKDIR.value))
        cli.keep_quiet(workdir)
        if MULTIHOST.value:
            hosts.initialize(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
        end = hosts.end  # imports JAX: after SIGINT in the middle of it, it cannot be imported again
    except ValueError as error:
        cli.fail(str(error))
    except (RuntimeError, OSError) as error:
        cli.fail(f"multihost: no connection to the other processes: {error}", cli.TRY_AGAIN)
    except (files.BucketError, KeyboardInterrupt) as error:
        cli.end(cli.report(error))
    try:
        stopping.listen()
        _run(CONFIG.value, workdir)
        sys.stdout.flush()
    except BaseException as error:
        end(error)


def _run(config: ConfigDict, workdir: Path) -> None:
    """Run the part of the job that the flags name."""
    try:
        settings = inputs.pin(hosts.all_or_none(lambda: typed.from_config(config.to_dict())))
        cache = hosts.all_or_none(lambda: program_cache.choose(COMPILATION_CACHE.value, workdir))
        if PROFILE.value and (files.is_remote(workdir) or MERGE.value or REPLAY.value):
            raise ValueError("profile: got --profile with a bucket, --merge or --replay, want a local job that trains")
        if REPLAY.value:
            _replay(settings, workdir, files.as_path(REPLAY.value))
        part = jobs.choose_part(settings, workdir, run=RUN.value, merge=MERGE.value, iteration=ITERATION.value)
        corpora = check(settings, workdir, ACCEPT.value)
        if cache is not None:
            program_cache.enable(cache)
    except (ValueError, OSError, hosts.PeerError) as error:
        hosts.end(error, bad_input=True)
    try:
        profile = profiling.Profile(PROFILE.value, workdir / "profile")
        line = jobs.run_part(settings, corpora, workdir, part, profile.of_run)
        if PROFILE.value and hosts.is_first():
            print(f"profile: {profile.folder if profile.written else 'no run trained enough steps'}", file=sys.stderr)
        if line and hosts.is_first():
            print(line)
    except FloatingPointError as error:
        hosts.end(error, bad_input=True)
    except stopping.Stopped as stopped:
        if hosts.is_first():
            print(f"stopped by {stopped.signal} in {stopped}; the same command resumes the job", file=sys.stderr)
        sys.exit(stopped.exit_code)


def _replay(settings: typed.Settings, workdir: Path, path: Path) -> NoReturn:
    """Print the replay of a step, then exit: code 0 if it is finite."""
    inputs.check(settings)
    text, broken = replay.replay(settings, preparation.load_corpora(settings), workdir, path)
    if hosts.is_first():
        print(text, flush=True)
    sys.exit(cli.BAD_INPUT if broken else 0)


parse_flags = functools.partial(
    cli.parse_flags,
    required=("config", "workdir"),
    example="--config=quickstart --workdir=runs/quickstart",
    load=functools.partial(cli.load_config, CONFIG),
    module=__name__,
)


def start() -> None:
    """Parse the flags and run."""
    app.run(main, flags_parser=parse_flags)


if __name__ == "__main__":
    start()
