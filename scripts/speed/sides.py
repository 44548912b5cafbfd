"""The two sides of a benchmark: processes that run a stage whenever they are asked to."""

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from speed.protocol import Facts, Work

# a small parent process: the peak memory of a child includes that of the process it was forked from
LAUNCH = """import os, resource, subprocess, sys, time
until, *command = sys.argv[1:]
started = time.perf_counter()
process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
while until and process.poll() is None and not (os.path.exists(until) and os.path.getsize(until)):
    time.sleep(0.005)
code = 0 if until and process.poll() is None else process.wait()
seconds = time.perf_counter() - started
process.kill()
process.wait()
print(seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)"""


TICKS = os.sysconf("SC_CLK_TCK")


def busy_seconds() -> float:
    """Seconds that all cores together have been busy since the machine started."""
    numbers = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    return (sum(numbers) - numbers[3] - numbers[4]) / TICKS  # without idle and waiting for disks


def run_command(*command: str | Path, folder: Path, until: Path | None = None) -> tuple[float, float]:
    """Run a program in a folder; return its seconds and its peak resident memory in bytes.

    until: kill it as soon as this file is not empty. Raises RuntimeError, with its last line, if it fails.
    """
    os.sync()  # finish the writes of the run before
    launcher = [sys.executable, "-S", "-c", LAUNCH, str(until or ""), *map(str, command)]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(folder)}
    ended = subprocess.run(launcher, cwd=folder, env=env, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} failed: {last_line(ended.stderr)}")
    seconds, kibibytes = ended.stdout.split()[-2:]
    return float(seconds), float(kibibytes) * 1024


class DisturbedError(RuntimeError):
    """Other processes use the cores."""


class Side:
    """One side: the facts of its runs so far."""

    def __init__(self) -> None:
        self.runs: list[Facts] = []

    def run(self) -> None:
        """Run once more. The fact `others` is the number of cores that other processes used meanwhile."""
        began, busy, own = time.perf_counter(), busy_seconds(), self._cpu_seconds()
        facts = self._run()
        others = busy_seconds() - busy - (self._cpu_seconds() - own)
        self.runs.append({**facts, "others": others / (time.perf_counter() - began)})

    def _run(self) -> Facts:
        raise NotImplementedError

    def _cpu_seconds(self) -> float:
        """Seconds that the processes of this side have used the cores."""
        raise NotImplementedError

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *error: object) -> None:
        pass


class Command(Side):
    """Runs warp_jax of a checkout as a user does: `arguments` of Python, with {workdir} for a new folder.

    until: the file in that folder that ends a run. The first run is not counted: it may download data.
    """

    def __init__(self, checkout: Path, arguments: list[str], until: str = "") -> None:
        super().__init__()
        self._checkout, self._arguments, self._until = checkout, arguments, until

    def __enter__(self) -> "Command":
        self._run()
        return self

    def _cpu_seconds(self) -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    def _run(self) -> Facts:
        temporary = Path(tempfile.mkdtemp())
        workdir = temporary / "workdir"
        arguments = [argument.replace("{workdir}", str(workdir)) for argument in self._arguments]
        until = workdir / self._until if self._until else None
        try:
            seconds, peak = run_command(sys.executable, *arguments, folder=self._checkout, until=until)
        finally:
            shutil.rmtree(temporary)
        return {"seconds": seconds, "peak_bytes": peak}


class Worker(Side):
    """A process that makes its stage once, then runs it for each line that it is sent (speed/protocol.py)."""

    def __init__(self, python: Path, program: str, work: Work, checkout: Path | None = None) -> None:
        """checkout: the warp_jax that the program imports."""
        super().__init__()
        self._command = [str(python), str(Path(__file__).with_name(program)), json.dumps(work._asdict())]
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self._env = env | {"HF_HUB_OFFLINE": "1"} | ({"PYTHONPATH": str(checkout)} if checkout else {})

    def __enter__(self) -> "Worker":
        """Start the process, and wait until it has compiled and run once."""
        pipe = subprocess.PIPE
        self._errors: IO[str] = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            self._command, stdin=pipe, stdout=pipe, stderr=self._errors, env=self._env, text=True
        )
        self._read()
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _run(self) -> Facts:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._read()

    def _cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def _read(self) -> dict[str, Any]:
        """The facts of a run: the next line of output that is a JSON object; libraries may print others."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                facts: dict[str, Any] = json.loads(line)
                return facts
        self._errors.seek(0)
        message = f"{Path(self._command[1]).name} ended: {last_line(self._errors.read())}"
        self.__exit__()
        raise RuntimeError(message)


def run_pairs(sides: Sequence[Side], repeats: int, max_load: float) -> int:
    """Run the sides in turn, so often; each is first in every second pair. Returns the number of disturbed pairs.

    Pairs during which other processes used more than max_load cores do not count, and are repeated. Raises
    DisturbedError if there are more of them than `repeats`.
    """
    done = disturbed = 0
    while done < repeats:
        for side in sides if done % 2 == 0 else sides[::-1]:
            side.run()
        seconds = " and ".join(f"{side.runs[-1]['seconds']:.3f}" for side in sides)
        others = max(side.runs[-1]["others"] for side in sides)
        print(f"pair {done + 1}: {seconds} s, others used {others:.2f} cores", file=sys.stderr, flush=True)
        if others <= max_load:
            done += 1
            continue
        disturbed += 1
        if disturbed > repeats:
            raise DisturbedError(f"other processes used more than {max_load} cores during {disturbed} pairs; stop them")
        for side in sides:
            side.runs.pop()
    return disturbed


def last_line(text: str) -> str:
    """The last line of what a program printed."""
    return (text.strip() or "no message").splitlines()[-1]
