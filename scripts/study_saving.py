"""Measure what saving costs a run, and what checking costs a restore.

  python scripts/study_saving.py --config=configs/smollm2_135m.py --workdir=runs/saving --out=saving.json

Trains the first run of the config for --steps steps and saves its state every --every steps. The cost of a
save is the time for which the run waits (to copy the arrays, and for the end of the save before) plus the extra time of
the step during the save. Then it restores the state with and without the check of its manifest, in turn.
"""

from __future__ import annotations

import functools
import itertools
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from absl import flags
from etils import epy

from warp_jax import cli, files

with epy.lazy_imports():  # at their first use: --help does not wait for JAX
    import jax

    from warp_jax import progress as job_progress
    from warp_jax import settings as typed
    from warp_jax.experiment import preparation
    from warp_jax.storage import checkpoint, manifest
    from warp_jax.training import loop, metric_writer, reinforce


sys.path.insert(0, "")  # config files import configs from the folder that the program is started in

CONFIG = cli.define_config("config", "Config file.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder for the run; SFT and reward model in it are not repeated.")
OUT = flags.DEFINE_string("out", "saving.json", "JSON file for the results.")
STEPS = flags.DEFINE_integer("steps", 40, "Steps of the run.", lower_bound=4)
EVERY = flags.DEFINE_integer("every", 4, "Steps between two saves.", lower_bound=3)
RESTORES = flags.DEFINE_integer("restores", 7, "Restores of each kind.", lower_bound=1)
PLANNED = 20  # steps between two saves, for the share of time that saving costs


def timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """The same function; the duration of each call is appended to `seconds`."""

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*args, **options)
        finally:
            seconds.append(time.perf_counter() - began)

    return call


def measure_saves(trainer: reinforce.Trainer, init_params: Any, folder: Path) -> dict[str, Any]:
    """Train and save; return durations in seconds."""
    shutil.rmtree(folder, ignore_errors=True)  # of a measurement before
    ends: list[float] = []
    blocked: list[float] = []
    published: list[float] = []

    def on_step(done: int, values: Any) -> None:
        ends.append(time.perf_counter())

    schedule = loop.Schedule(num_steps=STEPS.value, directory=folder, checkpoint_every=EVERY.value, on_step=on_step)
    patches = {"start": timed(checkpoint.Saver.start, blocked), "_publish": timed(checkpoint.Saver._publish, published)}
    with mock.patch.multiple(checkpoint.Saver, **patches):
        reinforce.run_policy(trainer, init_params, iteration=1, run=1, schedule=schedule)
    # the first call of on_step is made before any step; the next step after it compiles
    steps = {number: after - before for number, (before, after) in enumerate(itertools.pairwise(ends), 1)}
    beside = [steps[n] for n in steps if n > EVERY.value and n % EVERY.value == 1]
    alone = [steps[n] for n in steps if n > EVERY.value and n % EVERY.value not in (0, 1)]
    result = {"step": statistics.median(alone), "step_beside_a_save": statistics.median(beside)}
    result |= {"blocked": statistics.median(blocked[1:]), "saved_after": statistics.median(published[1:])}
    result["cost_of_a_save"] = result["blocked"] + max(0.0, result["step_beside_a_save"] - result["step"])
    result["share"] = result["cost_of_a_save"] / (PLANNED * result["step"])
    result |= {"steps": alone, "steps_beside_a_save": beside, "all_blocked": blocked}
    return result


def forget(folder: Path) -> None:
    """Take the files of a folder out of the system's memory, as if the machine had just started."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure_restores(folder: Path, restore: Callable[[], Any], *, cold: bool) -> dict[str, Any]:
    """Restore with the check and without it, each first in turn; seconds. cold: from the disk, and compile again."""
    checked: list[float] = []
    unchecked: list[float] = []
    for number in range(RESTORES.value):
        for seconds in (checked, unchecked) if number % 2 else (unchecked, checked):
            if cold:
                forget(folder)
                jax.clear_caches()
            check = manifest.damage if seconds is checked else lambda folder: ""
            with mock.patch.object(manifest, "damage", check):
                timed(restore, seconds)()
    ratios = [with_check / without for with_check, without in zip(checked, unchecked, strict=True)]
    return {"checked": checked, "unchecked": unchecked, "share": statistics.median(ratios) - 1}


def main(argv: list[str]) -> None:
    """Measure, print and write the results."""
    del argv
    settings, workdir = typed.from_config(CONFIG.value.to_dict()), files.as_path(WORKDIR.value)
    corpora = preparation.load_corpora(settings)
    with job_progress.JobProgress(0, quiet=True) as progress:
        _, (trainer, *_), examiner = preparation.prepare(settings, corpora, workdir, progress)
        folder = workdir / "measured"
        saves = measure_saves(trainer, examiner.sft_params, folder)
    init = functools.partial(trainer.programs.init, examiner.sft_params)
    store = checkpoint.StateStore(folder / "state", folder / metric_writer.FILE)
    checkpoint.save_params(folder / "params", examiner.sft_params)
    like = checkpoint.abstract(examiner.sft_params)
    restores = {
        "state": functools.partial(store.restore, init),
        "params": functools.partial(checkpoint.restore_params, folder / "params", like),
    }
    results: dict[str, Any] = {"save": saves}
    print(
        f"a step takes {saves['step']:.2f} s; a save costs {saves['cost_of_a_save']:.3f} s, {saves['share']:.2%} of "
        f"{PLANNED} steps"
    )
    for name, restore in restores.items():
        for cold in (True, False):
            measured = measure_restores(folder / name, restore, cold=cold)
            results[f"{name}_{'cold' if cold else 'warm'}"] = measured
            print(
                f"{name}, {'from the disk' if cold else 'from memory'}: restored in "
                f"{statistics.median(measured['unchecked']):.3f} s; the check adds {measured['share']:.2%}"
            )
    files.write_json(Path(OUT.value), results)


if __name__ == "__main__":
    cli.run(main, required=("config", "workdir"), example="--config=configs/tiny.py --workdir=/tmp/saving")
