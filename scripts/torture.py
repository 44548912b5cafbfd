"""End jobs in every way at random moments, start them again, and compare with a job that nothing disturbed.

  python scripts/torture.py --kinds=kill,stop,power,flip --trials=20 --folder=/tmp/torture --out=torture.csv

Each trial is a job of configs/tiny.py in a workdir of its own. Its line in the CSV file says what was done and how it
ended; a trial that has a line is not repeated. A trial holds if the job's second start ends with the very bytes of the
undisturbed job (metrics, evaluations, merges' geometry, front), or if a damaged file is named in one line.
Power cuts need Linux, ext4 and root: the workdir lies on a file system of its own, which is shut down without writing
anything more and mounted again.
"""

import contextlib
import csv
import fcntl
import hashlib
import io
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from absl import flags

from warp_jax import cli, files

KINDS = flags.DEFINE_list("kinds", ["kill", "stop", "power", "flip"], "Ways to disturb a job.")
TRIALS = flags.DEFINE_integer("trials", 20, "Trials of each kind.", lower_bound=1)
FOLDER = flags.DEFINE_string("folder", None, "Folder for the workdirs.")
# tests import several scripts, which have these flags too
SEED = flags.DEFINE_integer("seed", 0, "Seed of the random moments and places.", allow_override=True)
OUT = flags.DEFINE_string("out", "torture.csv", "CSV file for the results.", allow_override=True)

FIELDS = ("kind", "trial", "seed", "disturbed", "code", "outcome")
SHUTDOWN = 0x8004587D, struct.pack("I", 2)  # EXT4_IOC_SHUTDOWN without flushing the journal
IMAGE_BYTES = 96 * 2**20
RESULTS = ("metrics.jsonl", "*.npz", "front.csv", "geometry.json")
HELD = ("equal", "named")
ENV = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


class Ended(NamedTuple):
    """End of a process: its exit code, and what it printed as errors."""

    code: int
    errors: str


def start(workdir: Path) -> subprocess.Popen[str]:
    """Start the job."""
    command = [sys.executable, "-m", "warp_jax.main", "--config=configs/tiny.py", f"--workdir={workdir}"]
    env = ENV | {"JAX_COMPILATION_CACHE_DIR": str(Path(FOLDER.value) / "cache")}
    return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> Ended:
    """Wait for the end of a process."""
    _, errors = process.communicate(timeout=600)
    return Ended(process.returncode, errors)


def results(workdir: Path) -> dict[str, str]:
    """Hash of every file that is the same in any two jobs of one config."""
    paths = [path for pattern in RESULTS for path in workdir.rglob(pattern)]
    return {str(path.relative_to(workdir)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def outcome(ended: Ended, found: dict[str, str], wanted: dict[str, str]) -> str:
    """`equal` to the undisturbed job, or damage `named` in one line; else what went wrong."""
    if "Traceback" in ended.errors:
        return "traceback"
    if ended.code == 0:
        return "equal" if found == wanted else "silently different"
    named = [line for line in ended.errors.splitlines() if line.startswith("error: ")]
    return "named" if ended.code in (cli.BAD_INPUT, cli.STORAGE) and len(named) == 1 else "no line"


def interrupt(workdir: Path, seconds: float, number: int) -> str:
    """Start the job and send it a signal after so many seconds."""
    process = start(workdir)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    process.send_signal(number)
    sent = time.monotonic()
    ended = finish(process)
    return f"signal {number} after {seconds:.2f} s: code {ended.code} in {time.monotonic() - sent:.1f} s"


@contextlib.contextmanager
def mounted(image: Path, folder: Path) -> Iterator[None]:
    """Mount a file system in a file."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-o", "loop", image, folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def cut_power(image: Path, folder: Path, seconds: float) -> str:
    """Start the job on a new file system, and shut that down after so many seconds."""
    image.write_bytes(b"")
    os.truncate(image, IMAGE_BYTES)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    with mounted(image, folder):
        process = start(folder / "run")
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        root = os.open(folder, os.O_RDONLY)
        fcntl.ioctl(root, *SHUTDOWN)
        os.close(root)
        process.kill()
        process.communicate()
    return f"power cut after {seconds:.2f} s"


def flip(workdir: Path, chance: random.Random) -> str:
    """Flip one bit of one file, each file being as likely as any other."""
    path = chance.choice(sorted(path for path in workdir.rglob("*") if path.is_file() and path.stat().st_size))
    bit = chance.randrange(8 * path.stat().st_size)
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0] ^ 1 << bit % 8
        file.seek(bit // 8)
        file.write(bytes([byte]))
    return f"bit {bit} of {path.relative_to(workdir)}"


def trial(kind: str, number: int, duration: float, wanted: dict[str, str]) -> dict[str, object]:
    """Disturb one job, start it again, and judge the end."""
    chance = random.Random(f"{SEED.value} {kind} {number}")
    seconds = chance.uniform(0, duration)
    folder = Path(FOLDER.value)
    workdir = folder / f"{kind}_{number}"
    shutil.rmtree(workdir, ignore_errors=True)
    if kind == "power":
        image, mount = folder / "power.ext4", folder / "power"
        disturbed = cut_power(image, mount, seconds)
        with mounted(image, mount):
            ended, found = finish(start(mount / "run")), results(mount / "run")
    else:
        signals = {"kill": signal.SIGKILL, "stop": signal.SIGTERM, "flip": signal.SIGKILL}
        disturbed = interrupt(
            workdir, seconds if kind != "flip" else chance.choice((seconds, 10 * duration)), signals[kind]
        )
        if kind == "flip" and workdir.exists():
            disturbed = flip(workdir, chance)
        ended, found = finish(start(workdir)), results(workdir)
        shutil.rmtree(workdir)
    row = (kind, number, SEED.value, disturbed, ended.code, outcome(ended, found, wanted))
    return dict(zip(FIELDS, row, strict=True))


def table(rows: list[dict[str, object]]) -> str:
    """Trials tried and held, by kind."""
    lines = ["| kind | tried | held | otherwise |", "|---|---|---|---|"]
    for kind in dict.fromkeys(row["kind"] for row in rows):
        outcomes = [str(row["outcome"]) for row in rows if row["kind"] == kind]
        bad = [text for text in outcomes if text not in HELD]
        counted = ", ".join(f"{bad.count(text)} {text}" for text in dict.fromkeys(bad))
        lines.append(f"| {kind} | {len(outcomes)} | {len(outcomes) - len(bad)} | {counted} |")
    return "\n".join(lines)


def undisturbed(folder: Path) -> tuple[float, dict[str, str]]:
    """Seconds that a job takes with compiled programs at hand, and its results."""
    for name in ("first", "undisturbed"):
        shutil.rmtree(folder / name, ignore_errors=True)
        began = time.monotonic()
        ended = finish(start(folder / name))
        if ended.code:
            cli.fail(f"the undisturbed job ended with code {ended.code}: {ended.errors}")
    if results(folder / "first") != results(folder / "undisturbed"):
        cli.fail("two undisturbed jobs differ, so nothing can be compared with them")
    return time.monotonic() - began, results(folder / "undisturbed")


def main(argv: list[str]) -> None:
    """Run the trials that have no line yet."""
    del argv
    folder, out = Path(FOLDER.value), Path(OUT.value)
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, object]] = list(csv.DictReader(out.open())) if out.exists() else []
    done = {(row["kind"], str(row["trial"])) for row in rows}
    duration, wanted = undisturbed(folder)
    print(f"the undisturbed job takes {duration:.1f} s")
    for kind in KINDS.value:
        for number in range(TRIALS.value):
            if (kind, str(number)) in done:
                continue
            rows.append(trial(kind, number, duration, wanted))
            print(*rows[-1].values(), sep=", ", flush=True)
            content = io.StringIO()
            writer = csv.DictWriter(content, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            files.write_text(out, content.getvalue())
    print(table(rows))


if __name__ == "__main__":
    cli.run(main, required=("folder",), example="--folder=/tmp/torture")
