"""Disturb jobs at random moments, start them again, and compare the results with those of an undisturbed job.

  python scripts/torture.py --kinds=kill,stop,flip --trials=20 --folder=/tmp/torture --out=torture.csv

Each trial is a job of configs/tiny.py in a workdir of its own. Its line in the CSV file has the disturbance and the
outcome; a trial that has a line is not repeated. A trial holds if the job's second start ends with the same files and
weights as the undisturbed job, or if one line names a damaged file. The job prints that line, or status.py --verify
for files that no start reads again. Kinds:

kill         SIGKILL, at a random time (even trials) or at a random one of its operations on files (odd trials)
stop         SIGTERM while it trains: exit code 75, or 0 if it was done before
preempt      four SIGTERMs, each 60 steps after a start, with a save every 100 steps: each start must go further
flip         one flipped bit, or a truncation, of any file of a job that has ended or was killed
power        the file system of the workdir is shut down without writing anything more, and mounted again
full         the file system has a random size; then it is made larger
readonly     the file system turns read-only
descriptors  the process may open no more files
vanished     the workdir is moved away, and moved back
merge        two merges into one --out, the second after a random time: one must succeed, the other end with one line
bucket       SIGKILL, at a random time, of a job in a bucket (docs/reliability.md starts a server for it)

full, readonly, descriptors and vanished must end the job with one line and exit code 74. power, full and readonly need
Linux and root.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import hashlib
import importlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
from absl import flags
from etils import epy

from warp_jax import cli, files

with epy.lazy_imports():  # at their first use: --help does not wait for JAX
    import jax

    from warp_jax.storage import weight_files


KINDS = flags.DEFINE_list("kinds", ["kill", "stop", "preempt", "flip"], "Ways to disturb a job.")
TRIALS = flags.DEFINE_integer("trials", 20, "Trials of each kind.", lower_bound=1)
FOLDER = flags.DEFINE_string("folder", None, "Folder for the workdirs.")
# tests import several scripts, which have these flags too
SEED = flags.DEFINE_integer("seed", 0, "Seed of the random moments and places.", allow_override=True)
OUT = flags.DEFINE_string("out", "torture.csv", "CSV file for the results.", allow_override=True)

BUCKET = flags.DEFINE_string("bucket", "", "gs://BUCKET for the kind bucket.")
BUCKET_ROOT = flags.DEFINE_string("bucket_root", "", "Folder in which its server keeps the objects of the bucket.")

FIELDS = ("kind", "trial", "seed", "disturbed", "code", "outcome")
CONFIG = "configs/tiny.py"
HANGS = 600.0  # seconds
PRELOADED = ("flax", "optax", "sklearn.feature_extraction.text", "matplotlib.pyplot", "tensorboardX")
PRELOADED += ("tensorflow_datasets", "tokenizers", "pydantic", "chex", "jinja2.sandbox", "ml_collections.config_flags")
HELD = ("equal", "named", "named by status.py")
SHUTDOWN = 0x8004587D, struct.pack("I", 2)  # EXT4_IOC_SHUTDOWN without flushing the journal
IMAGE_BYTES = 96 * 2**20
ENOUGH = "64m"  # size of a file system that holds the whole job
FULL_AT = (20_000, 1_400_000)  # bytes of a file system that the job fills
LONG = ("--config.warp.steps_per_iteration=(320,6)", "--config.checkpoint_every=100", "--config.evaluation.every=320")
PREEMPTIONS, STEPS_EACH = 4, 60
ETAS = 0.1, 0.3  # of the two merges
KILLED = 40  # killed jobs, from which those with a damaged file are copied
# differ between two undisturbed jobs: times, and Orbax's random names (the arrays themselves are compared)
VARIES = re.compile(r"(starts\.jsonl|report\.html|error\.log|lock|events\.out\..*|\..*\.partial)")
WEIGHTS = ("params", "merged")
FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree")


class Ended(NamedTuple):
    """End of a process: its exit code, and what it printed as errors."""

    code: int
    errors: str = ""


class Undisturbed(NamedTuple):
    """The job that nothing disturbs: its duration in seconds, its operations on files, and its results."""

    seconds: float
    operations: int
    results: dict[str, str]


class Trial(NamedTuple):
    """One job to be disturbed."""

    kind: str
    number: int
    chance: random.Random
    seconds: float  # when to disturb it
    operation: int  # or at which operation on files

    @property
    def address(self) -> str:
        """The workdir in the job's command line."""
        return f"{BUCKET.value}/bucket_{self.number}" if self.kind == "bucket" else str(self.workdir)

    @property
    def workdir(self) -> Path:
        """Folder of the job's files."""
        if self.kind == "bucket":
            return Path(BUCKET_ROOT.value, f"bucket_{self.number}")
        inside = {"power": "mount/run", "full": "mount/run", "readonly": "mount/run"}.get(self.kind, "run")
        return self.folder / inside

    @property
    def at_operation(self) -> bool:
        """True if the job is killed at an operation, not at a time."""
        return self.kind == "kill" and self.number % 2 == 1

    @property
    def folder(self) -> Path:
        """Folder of the trial."""
        return Path(FOLDER.value, f"{self.kind}_{self.number}")


class Job:
    """The job in a process of its own, forked from this one, which has imported PRELOADED: that saves a third."""

    def __init__(self, workdir: Path | str, *extra: str, kill_at: int = 0):
        """kill_at: the operation on files at which the process kills itself; -1 = only count them; 0 = neither."""
        self._errors = Path(FOLDER.value, "errors.txt")
        self._code: int | None = None
        self.pid = os.fork()
        if not self.pid:
            _be_job([f"--config={CONFIG}", *extra, f"--workdir={workdir}"], self._errors, str(workdir), kill_at)

    def poll(self) -> int | None:
        """Exit code, negative for a signal; None if the process runs."""
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def wait(self, seconds: float) -> None:
        """Wait for some seconds, or until the process ends."""
        end = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < end:
            time.sleep(0.005)

    def send(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def finish(self) -> Ended:
        """Wait for the end of the process; one that takes longer than HANGS seconds is killed."""
        self.wait(HANGS)
        hangs = self.poll() is None
        self.send(signal.SIGKILL)
        self.wait(HANGS)
        errors = self._errors.read_text(errors="replace")
        return Ended(self._code or 0, f"Traceback: it hangs {errors}" if hangs else errors)


def _be_job(arguments: list[str], errors: Path, workdir: str, kill_at: int) -> NoReturn:
    """Become the job in a forked process."""
    from warp_jax import main as program  # noqa: PLC0415  it imports tensorstore, which allows no fork afterwards

    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    done = 0

    def count(event: str, args: tuple[object, ...]) -> None:
        nonlocal done
        if event in FILE_EVENTS and isinstance(args[0], str | bytes | os.PathLike):
            if os.fsdecode(args[0]).startswith(workdir):
                done += 1
            if done == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    if kill_at:
        sys.addaudithook(count)
    sys.argv = ["main", *arguments]  # where ml_collections looks for overrides
    flags.FLAGS.unparse_flags()
    code = 1
    try:
        program.app.run(program.main, sys.argv, flags_parser=program.parse_flags)
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    if kill_at < 0:
        errors.with_name("count").write_text(str(done))
    sys.stderr.flush()
    os._exit(code)


def preload(folder: Path) -> None:
    """Import libraries for all jobs, which share a cache of compiled programs."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_compilation_cache_dir", str(folder / "cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    warnings.filterwarnings("ignore", message=r"os\.fork\(\) was called")
    sys.path.insert(0, "")  # configs import other configs from this folder
    for name in PRELOADED:
        importlib.import_module(name)


def results(workdir: Path) -> dict[str, str]:
    """Hash of every file that is the same in any two jobs of one config, and of the arrays of all weights."""
    answer = Path(FOLDER.value, "results.json")
    pid = os.fork()  # tensorstore reads the arrays, and allows no fork afterwards
    if not pid:
        try:
            files.write_json(answer, hashes(workdir))
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    found: dict[str, str] = json.loads(answer.read_text())
    answer.unlink()
    return found


def hashes(workdir: Path) -> dict[str, str]:
    """The hashes of `results`."""
    found = {}
    for path in sorted(path for path in workdir.rglob("*") if path.is_file()):
        name = path.relative_to(workdir)
        if not VARIES.fullmatch(path.name) and not set(WEIGHTS) & set(name.parts):
            found[str(name)] = hashlib.sha256(path.read_bytes()).hexdigest()
    for folder in sorted(path for name in WEIGHTS for path in workdir.rglob(name)):
        found[str(folder.relative_to(workdir))] = hash_of_arrays(folder)
    return found


def hash_of_arrays(folder: Path) -> str:
    """Hash of the names and values of all arrays of saved weights."""
    digest = hashlib.sha256()
    try:
        weights = weight_files.open_weights(folder)
    except ValueError as error:
        return str(error)
    for name, tensor in sorted(weights.tensors.items()):
        digest.update(name.encode() + weights.view(name, 0, tensor.size).tobytes())
    return digest.hexdigest()


def outcome(ended: Ended, found: dict[str, str], wanted: dict[str, str]) -> str:
    """`equal` to the undisturbed job, or damage `named` in one line; else what went wrong."""
    if "Traceback" in ended.errors:
        return "traceback"
    if ended.code == 0:
        odd = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        return f"silently different: {' '.join(odd)}" if odd else "equal"
    named = [line for line in ended.errors.splitlines() if line.startswith("error: ")]
    return "named" if ended.code in (cli.BAD_INPUT, cli.STORAGE) and len(named) == 1 else "no line"


def judge_damage(workdir: Path, verdict: str) -> str:
    """Judge a damaged file that no start of the job came across: status.py names it, or its arrays are unchanged."""
    if run(sys.executable, "scripts/status.py", "--verify", workdir) == cli.BAD_INPUT:
        return "named by status.py"
    names = verdict.partition(": ")[2].split()
    whole = Path(FOLDER.value, "undisturbed")
    if all(name.endswith(".npz") and arrays(workdir / name) == arrays(whole / name) for name in names):
        return "equal"  # the bit is one that no reader of zip files looks at
    return verdict


def arrays(path: Path) -> dict[str, bytes]:
    """Content of the arrays of an .npz file."""
    with np.load(path, allow_pickle=False) as found:
        return {name: found[name].tobytes() for name in found}


def rows(workdir: Path) -> int:
    """Lines of the metrics of all runs."""
    return sum(path.read_bytes().count(b"\n") for path in workdir.glob("*/run_*/metrics.jsonl"))


def kill(trial: Trial) -> Ended:
    """SIGKILL at a time, or at an operation on files."""
    if trial.at_operation:
        return Job(trial.workdir, kill_at=trial.operation).finish()
    job = Job(trial.address)
    job.wait(trial.seconds)
    job.send(signal.SIGKILL)
    return job.finish()


def stop(trial: Trial) -> Ended:
    """SIGTERM after the first training has begun; the end must be 75, or 0 if the job is done."""
    job, began = Job(trial.workdir), time.monotonic()
    while not (trial.workdir / "sft" / "metrics.jsonl").exists() and job.poll() is None:
        time.sleep(0.05)
    job.wait(trial.seconds - (time.monotonic() - began))
    job.send(signal.SIGTERM)
    return job.finish()


def preempt(trial: Trial) -> Ended:
    """SIGTERM after every 60 steps; the last start goes on to the end."""
    done = []
    for _ in range(PREEMPTIONS):
        job, before = Job(trial.workdir, *LONG), rows(trial.workdir)
        while rows(trial.workdir) < before + STEPS_EACH and job.poll() is None:
            time.sleep(0.02)
        job.send(signal.SIGTERM)
        ended = job.finish()
        done.append(rows(trial.workdir))
        if ended.code != cli.TRY_AGAIN or done[-1] < before + STEPS_EACH:
            return Ended(1, f"no progress: {done} {ended}")
    return Ended(cli.TRY_AGAIN, f"steps: {done}")


def flip(trial: Trial) -> Ended:
    """Damage one file of a job that was killed, or (one of three) had ended; each file is as likely as any other."""
    number = trial.chance.randrange(KILLED)
    ended = Path(FOLDER.value, "undisturbed")
    shutil.copytree(ended if trial.chance.random() < 1 / 3 else killed_job(number, trial.seconds), trial.workdir)
    names = sorted(path for path in trial.workdir.rglob("*") if path.is_file() and path.stat().st_size)
    return Ended(0, damage(trial.chance.choice(names), trial.chance) if names else "nothing written yet")


def killed_job(number: int, seconds: float) -> Path:
    """The workdir of a job that was killed after so many seconds; made once, and copied for each trial."""
    folder = Path(FOLDER.value, f"killed_{number}")
    while not any(folder.rglob("metrics.jsonl")):
        job = Job(folder)
        job.wait(seconds)
        job.send(signal.SIGKILL)
        job.finish()
        seconds *= 1.5  # it had not written anything
    return folder


def damage(path: Path, chance: random.Random) -> str:
    """Flip a bit of a file, or (one of four) truncate it; return what was done."""
    size = path.stat().st_size
    if chance.random() < 0.25:
        length = chance.randrange(size)
        os.truncate(path, length)
        return f"{path} cut from {size} to {length} bytes"
    bit = chance.randrange(8 * size)
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0] ^ 1 << bit % 8
        file.seek(bit // 8)
        file.write(bytes([byte]))
    return f"bit {bit} of {path}"


def run(*command: object) -> int:
    """Run a system command quietly; return its exit code."""
    return subprocess.run([str(part) for part in command], capture_output=True, check=False).returncode


def mount(trial: Trial, *options: object) -> Path:
    """Mount a new file system of the trial; return its folder."""
    folder = trial.folder / "mount"
    folder.mkdir(parents=True, exist_ok=True)
    if run("mount", *options, folder):
        cli.fail(f"cannot mount {folder}: --kinds={trial.kind} needs Linux and root")
    return folder


def new_disk(trial: Trial) -> Path:
    """Make an empty ext4 file system in a file, and mount it."""
    image = trial.folder / "image"
    trial.folder.mkdir(parents=True, exist_ok=True)
    image.touch()
    os.truncate(image, IMAGE_BYTES)
    run("mkfs.ext4", "-q", image)
    return mount(trial, "-o", "loop", image)


def power(trial: Trial) -> Ended:
    """Shut the file system down in the middle of the job."""
    disk = new_disk(trial)
    job = Job(trial.workdir)
    job.wait(trial.seconds)
    root = os.open(disk, os.O_RDONLY)
    fcntl.ioctl(root, *SHUTDOWN)
    os.close(root)
    job.send(signal.SIGKILL)
    job.finish()
    run("umount", disk)
    mount(trial, "-o", "loop", trial.folder / "image")
    return Ended(-signal.SIGKILL)


def full(trial: Trial) -> Ended:
    """Run the job in a file system that is too small."""
    size = trial.chance.randrange(*FULL_AT)
    disk = mount(trial, "-t", "tmpfs", "-o", f"size={size}", "tmpfs")
    ended = Job(trial.workdir).finish()
    run("mount", "-o", f"remount,size={ENOUGH}", disk)
    return ended._replace(errors=f"{size} bytes: {ended.errors}")


def readonly(trial: Trial) -> Ended:
    """Make the file system (even trials) or its folders (odd trials) read-only, between two writes."""
    disk = new_disk(trial)
    job = Job(trial.workdir)
    job.wait(trial.seconds)
    turned = ("chattr", "-R", "+i", trial.workdir) if trial.number % 2 else ("mount", "-o", "remount,ro", disk)
    while run(*turned) and job.poll() is None:
        time.sleep(0.01)  # busy while a file is open for writing
    ended = job.finish()
    run("mount", "-o", "remount,rw", disk)
    run("chattr", "-R", "-i", trial.workdir)
    return ended


def descriptors(trial: Trial) -> Ended:
    """Let the job open at most three more files, after Python's imports, which would end before our code."""
    job = Job(trial.workdir)
    while not (trial.workdir / "config.json").exists() and job.poll() is None:
        time.sleep(0.05)
    job.wait(trial.seconds / 2)
    with contextlib.suppress(OSError):  # ended already
        most = len(os.listdir(f"/proc/{job.pid}/fd")) + trial.chance.randrange(4)
        resource.prlimit(job.pid, resource.RLIMIT_NOFILE, (most, most))
    return job.finish()


def vanished(trial: Trial) -> Ended:
    """Move the workdir away, and back after the job has ended."""
    away = trial.folder / "away"
    job = Job(trial.workdir)
    job.wait(trial.seconds)
    with contextlib.suppress(FileNotFoundError):  # not made yet
        trial.workdir.rename(away)
    ended = job.finish()
    if away.exists():
        if trial.workdir.exists() and ended.code == 0:
            return Ended(1, f"it was made again: {ended}")
        shutil.rmtree(trial.workdir, ignore_errors=True)  # Orbax makes the folders that it saves into
        away.rename(trial.workdir)
    return ended


DISTURB: dict[str, Callable[[Trial], Ended]] = {
    **{"kill": kill, "bucket": kill, "stop": stop, "preempt": preempt, "flip": flip, "power": power},
    **{"full": full, "readonly": readonly, "descriptors": descriptors, "vanished": vanished},
}
FIRST_CODES = {"stop": (0, cli.TRY_AGAIN), "preempt": (cli.TRY_AGAIN,)} | dict.fromkeys(
    ("full", "readonly", "descriptors", "vanished"), (0, cli.STORAGE)
)


def merging(out: Path, eta: float) -> subprocess.Popen[str]:
    """Start a merge of the two policies of the undisturbed job."""
    job = Path(FOLDER.value, "undisturbed")
    policies = ",".join(str(job / "iteration_1" / f"run_{run}" / "params") for run in (1, 2))
    command = ["scripts/merge.py", f"--init={job / 'sft' / 'params'}", f"--policies={policies}", f"--etas={eta}"]
    command = [sys.executable, *command, f"--out={out}"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def end_of(process: subprocess.Popen[str]) -> Ended:
    """Wait for the end of a merge."""
    _, errors = process.communicate(timeout=HANGS)
    return Ended(process.returncode, errors)


def try_merges(number: int) -> dict[str, object]:
    """Two merges with different etas: the one that ends well must have written --out, the other nothing."""
    chance, folder = random.Random(f"{SEED.value} merge {number}"), Path(FOLDER.value, "merge")
    right = {eta: hash_of_arrays(folder / f"alone_{eta}" / f"eta_{eta}") for eta in ETAS}  # safetensors
    seconds = chance.uniform(0, float((folder / "seconds").read_text()))
    out = folder / f"out_{number}"
    shutil.rmtree(out, ignore_errors=True)
    processes = [merging(out, ETAS[0])]
    with contextlib.suppress(subprocess.TimeoutExpired):
        processes[0].wait(seconds)
    processes.append(merging(out, ETAS[1]))
    ended = [end_of(process) for process in processes]
    codes = [end.code for end in ended]
    lost = ended[codes.index(0) - 1] if 0 in codes else ended[0]
    won = ETAS[codes.index(0)] if 0 in codes else ETAS[0]
    good = sorted(codes) == [0, cli.BAD_INPUT] and lost.errors.count("error: ") == 1
    names = {f"eta_{won}", "merge_report.json"}
    whole = {path.name for path in out.iterdir()} == names and hash_of_arrays(out / f"eta_{won}") == right[won]
    left = [path for path in folder.iterdir() if path.name.startswith(f".out_{number}")]
    verdict = "equal" if good and whole and not left else "wrong codes" if not good else "wrong result"
    disturbed = f"second after {seconds:.2f} s: codes {codes}; {lost.errors.strip()[-200:]}"
    return dict(zip(FIELDS, ("merge", number, SEED.value, disturbed, max(codes), verdict), strict=True))


def prepare_merges(folder: Path) -> None:
    """Run each of the two merges alone; save the mean number of seconds."""
    began = time.monotonic()
    for eta in ETAS:
        shutil.rmtree(folder / f"alone_{eta}", ignore_errors=True)
        if ended := end_of(merging(folder / f"alone_{eta}", eta)).code:
            cli.fail(f"a merge alone ended with code {ended}")
    files.write_text(folder / "seconds", str((time.monotonic() - began) / len(ETAS)))


@contextlib.contextmanager
def cleaned(trial: Trial) -> Iterator[None]:
    """Delete all files of the trial, before and after it."""

    def clean() -> None:
        run("umount", trial.folder / "mount")
        for folder in (trial.folder, trial.workdir):
            shutil.rmtree(folder, ignore_errors=True)

    clean()
    trial.folder.mkdir(parents=True)
    try:
        yield
    finally:
        clean()


def try_one(kind: str, number: int, undisturbed: Undisturbed) -> dict[str, object]:
    """Disturb one job, start it again, and judge both ends."""
    chance = random.Random(f"{SEED.value} {kind} {number}")
    seconds, operation = chance.uniform(0, undisturbed.seconds), chance.randint(1, undisturbed.operations)
    trial = Trial(kind, number, chance, seconds, operation)
    with cleaned(trial):
        began = time.monotonic()
        first = DISTURB[kind](trial)
        where = f"operation {operation}" if trial.at_operation else f"{seconds:.2f} s"
        took = time.monotonic() - began
        disturbed = f"{where}: code {first.code} in {took:.1f} s {' '.join(first.errors.split())[-300:]}"
        ended = Job(trial.address, *(LONG if kind == "preempt" else ())).finish()
        verdict = outcome(ended, {} if ended.code else results(trial.workdir), undisturbed.results)
        if kind == "flip" and ended.code == 0 and verdict != "equal":
            verdict = judge_damage(trial.workdir, verdict)
    if kind in FIRST_CODES and first.code not in FIRST_CODES[kind]:
        verdict = f"wrong first end, then {verdict}"
    if "Traceback" in first.errors or (first.code == cli.STORAGE and first.errors.count("error: ") != 1):
        verdict = f"more than a line, then {verdict}"
    if verdict != "equal":
        disturbed += f" | {' '.join(ended.errors.split())[-300:]}"
    return dict(zip(FIELDS, (kind, number, SEED.value, disturbed, ended.code, verdict), strict=True))


def table(lines: Sequence[dict[str, object]]) -> str:
    """Trials tried and held, by kind."""
    text = ["| kind | tried | held | otherwise |", "|---|---|---|---|"]
    for kind in dict.fromkeys(line["kind"] for line in lines):
        outcomes = [str(line["outcome"]) for line in lines if line["kind"] == kind]
        bad = [found.partition(":")[0] for found in outcomes if found not in HELD]
        counted = ", ".join(f"{bad.count(found)} {found}" for found in dict.fromkeys(bad))
        text.append(f"| {kind} | {len(outcomes)} | {len(outcomes) - len(bad)} | {counted} |")
    return "\n".join(text)


def undisturbed_job(folder: Path, *extra: str) -> Undisturbed:
    """Run the job twice with nothing that disturbs it: once to compile, and once to measure."""
    found, seconds = [], 0.0
    for name in ("first", "undisturbed"):
        shutil.rmtree(folder / name, ignore_errors=True)
        began = time.monotonic()
        ended = Job(folder / name, *extra, kill_at=0 if name == "first" else -1).finish()
        seconds = time.monotonic() - began
        if ended.code:
            cli.fail(f"the undisturbed job ended with code {ended.code}: {ended.errors}")
        found.append(results(folder / name))
    if found[0] != found[1]:
        odd = [name for name in found[0] if found[0][name] != found[1].get(name)]
        cli.fail(f"two undisturbed jobs differ in {odd}, so nothing can be compared with them")
    return Undisturbed(seconds, int((folder / "count").read_text()), found[0])


def main(argv: list[str]) -> None:
    """Run the trials that have no line yet."""
    del argv
    folder, out = Path(FOLDER.value).absolute(), Path(OUT.value)
    kinds = (*DISTURB, "merge")
    if unknown := sorted(set(KINDS.value) - set(kinds)):
        cli.fail(f"--kinds: got {unknown[0]!r}, want some of {', '.join(kinds)}")
    folder.mkdir(parents=True, exist_ok=True)
    preload(folder)
    lines: list[dict[str, object]] = list(csv.DictReader(out.open())) if out.exists() else []
    done = {(line["kind"], str(line["trial"])) for line in lines if str(line["seed"]) == str(SEED.value)}
    for kind in KINDS.value:
        left = [number for number in range(TRIALS.value) if (kind, str(number)) not in done]
        if not left:
            continue
        undisturbed = undisturbed_job(folder, *(LONG if kind == "preempt" else ()))
        print(f"{kind}: the undisturbed job takes {undisturbed.seconds:.1f} s", flush=True)
        if kind == "merge":
            prepare_merges(folder / "merge")
        for number in left:
            lines.append(try_merges(number) if kind == "merge" else try_one(kind, number, undisturbed))
            print(*lines[-1].values(), sep=", ", flush=True)
            content = io.StringIO()
            writer = csv.DictWriter(content, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(lines)
            files.write_text(out, content.getvalue())
    print(table(lines))


if __name__ == "__main__":
    cli.run(main, required=("folder",), example="--folder=/tmp/torture")
