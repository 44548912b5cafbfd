"""Measure how soon a resumed job trains: from the start of its process to its first new row of metrics.

  python scripts/study_start.py --config=configs/tiny.py --folder=/tmp/start

A job is killed when a run has saved a state; then it is started again, from copies of its workdir. Seconds by the clock
and of the processor: the latter hardly depend on what else runs.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from absl import flags

from warp_jax import cli

CONFIG = flags.DEFINE_string("config", None, "Config file.")
FOLDER = flags.DEFINE_string("folder", None, "Folder for the workdirs; must not exist.")
PROGRAM = flags.DEFINE_string("program", ".", "Folder of the checkout of warp_jax to measure.")
CACHE = flags.DEFINE_bool("cache", True, "Keep the compiled programs of the killed job.")
REPEATS = flags.DEFINE_integer("repeats", 5, "Starts.", lower_bound=1)
RUN = "iteration_1/run_1"


def start(workdir: Path) -> subprocess.Popen[bytes]:
    """Start the job of a workdir."""
    command = [sys.executable, "-m", "warp_jax.main", f"--config={CONFIG.value}", f"--workdir={workdir}"]
    return subprocess.Popen(command, cwd=PROGRAM.value, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def size(path: Path) -> int:
    """Rows of a file; 0 if it is missing."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def saved(workdir: Path) -> bool:
    """True if the run has a saved state."""
    return any(path.name.isdigit() for path in (workdir / RUN / "state").glob("*"))


def expect_running(job: subprocess.Popen[bytes]) -> None:
    """End this program if a job has ended by itself."""
    if job.poll() is not None:
        cli.fail(f"the job ended with exit code {job.returncode} before it was killed", cli.UNEXPECTED)


def kill(job: subprocess.Popen[bytes]) -> float:
    """Kill a job; return its seconds of processor time."""
    job.kill()
    _, job.returncode, usage = os.wait4(job.pid, 0)
    return usage.ru_utime + usage.ru_stime


def main(argv: list[str]) -> None:
    """Kill a job, start it again and again, and print the times."""
    del argv
    folder = Path(FOLDER.value).absolute()
    folder.mkdir(parents=True)
    job = start(folder / "killed")
    while not saved(folder / "killed"):
        expect_running(job)
        time.sleep(0.005)
    kill(job)
    seconds = []
    for number in range(REPEATS.value):
        workdir = folder / str(number)
        shutil.copytree(folder / "killed", workdir)
        if not CACHE.value:
            shutil.rmtree(folder / ".xla_cache", ignore_errors=True)
        log = workdir / RUN / "metrics.jsonl"
        began, inode = time.monotonic(), log.stat().st_ino
        job = start(workdir)
        kept = None
        while True:
            expect_running(job)
            if log.stat().st_ino != inode:
                kept = size(log) if kept is None else kept
                if size(log) > kept:
                    break
            time.sleep(0.005)
        seconds.append((time.monotonic() - began, kill(job)))
        print("{:.2f} s, {:.2f} s of processor time".format(*seconds[-1]), flush=True)
    medians = map(statistics.median, zip(*seconds, strict=True))
    print("median {:.2f} s, {:.2f} s of processor time".format(*medians))


if __name__ == "__main__":
    cli.run(main, required=("config", "folder"), example="--config=configs/tiny.py --folder=/tmp/start")
