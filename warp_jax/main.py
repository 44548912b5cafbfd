"""Run WARP: python -m warp_jax.main --config=configs/quickstart.py --workdir=runs/quickstart

Any value of the config can be set on the command line: --config.warp.ema_rate=0.005. Started again with the same config
and workdir, it goes on where it stopped.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from warp_jax import cli, prepare, report, validation, warp
from warp_jax.corpus import Corpus
from warp_jax.progress import JobProgress

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, for example configs/quickstart.py.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder for everything that is made; reused when it exists.")


def check(config: ConfigDict, workdir: Path) -> Mapping[str, Corpus]:
    """The data, once all input is found good; else ValueError, with nothing written. Then the workdir is claimed."""
    validation.check_config(config)
    corpora = prepare.load_corpora(config)
    prepare.check_prompts(config, corpora)
    validation.claim_workdir(config, workdir)
    return corpora


def run(config: ConfigDict, corpora: Mapping[str, Corpus], workdir: Path) -> str:
    """The whole job; returns the summary line."""
    with JobProgress(total_steps(config)) as progress:
        setup = prepare.prepare(config, corpora, workdir, progress)
        points = warp.run_warp(config, setup, workdir, progress)
        return report.write_report(config, setup, points, workdir)


def total_steps(config: ConfigDict) -> int:
    """Optimiser steps of all stages."""
    steps = sum(config.warp.steps_per_iteration[: config.warp.num_iterations]) * config.warp.num_runs
    return steps + config.sft.num_steps + prepare.needs_reward_model(config) * config.reward_model.num_steps


def main(argv: Sequence[str]) -> None:
    """Entry point."""
    del argv
    logging.set_verbosity(logging.ERROR)  # of libraries; warnings of JAX and Orbax about one process are noise here
    config, workdir = CONFIG.value, Path(str(WORKDIR.value))
    try:
        corpora = check(config, workdir)
    except (ValueError, OSError) as error:
        cli.fail(str(error))
    try:
        print(run(config, corpora, workdir))
    except FloatingPointError as error:
        cli.fail(str(error))


def _load_config() -> None:
    """A config file that failed to load raises only when it is read."""
    if CONFIG.value is not None:
        _ = CONFIG.value.seed


parse_flags = functools.partial(
    cli.parse_flags,
    required=("config", "workdir"),
    example="--config=configs/quickstart.py --workdir=runs/quickstart",
    load=_load_config,
)

if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
