"""Inject a NaN at a random step and place of jobs of configs/tiny.py: python -m tests.nan_trials FOLDER TRIALS [SEED]

A trial holds if the job ends at that step with exit code 2 and one line, the replay names the place and changes
nothing, the replay without the fault finds nothing, and the job started without the fault ends with the bytes of an
undisturbed one.
"""

import random
import re
import shutil
import sys
from pathlib import Path

from configs import tiny
from tests import commands

RESULTS = ("metrics.jsonl", "*.npz", "front.csv", "geometry.json")
FOUND = {  # place: what a replay names first
    "reward": ("reward/sentiment",),
    "sampler": ("sampler logps",),
    "gradient": ("gradient",),
    "weights": ("new policy", "new params"),
}


def results(workdir):
    """Content of every file that is the same in any two jobs of one config."""
    return {p.relative_to(workdir): p.read_bytes() for pattern in RESULTS for p in workdir.rglob(pattern)}


def files(workdir):
    """Content of every file."""
    return {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}


def draw(chance):
    """Place, part and step of a fault."""
    config = tiny.get_config()
    parts = {"sft": config.sft.num_steps, "reward_model": config.reward_model.num_steps}
    runs = {f"iteration_{i + 1}/run_{run}": n for i, n in enumerate(config.warp.steps_per_iteration) for run in (1, 2)}
    place = chance.choice(sorted(FOUND))
    part = chance.choice(sorted(runs if place in ("reward", "sampler") else parts | runs))
    return place, part, chance.randrange((parts | runs)[part])


def trial(workdir, fault, wanted):
    """Inject one fault; return what did not hold, "" if all held."""
    place, part, step = fault
    shutil.rmtree(workdir, ignore_errors=True)
    poisoned = [sys.executable, "-m", "tests.poisoned_main", place, part, step]
    job = [commands.TINY, f"--workdir={workdir}"]
    ended = commands.run([*poisoned, *job])
    lines = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    named = re.sub("[_/]", " ", part) if "/" in part else part
    if (ended.returncode, len(lines)) != (2, 1) or not lines[0].startswith(f"error: {named} step {step}: "):
        return f"not stopped at its step: code {ended.returncode}: {ended.stderr}"
    replay = f"--replay={workdir / part / f'replay_{step}.json'}"
    before = files(workdir)
    ended = commands.run([*poisoned, *job, replay])
    first = ended.stdout.partition("not finite first: ")[2].partition("\n")[0]
    if ended.returncode != 2 or first not in FOUND[place]:
        return f"replay found {first!r}: code {ended.returncode}: {ended.stderr}"
    ended = commands.run(commands.main_command(*job, replay))
    if ended.returncode or "not reproduced" not in ended.stdout:
        return f"replay without the fault: code {ended.returncode}: {ended.stdout} {ended.stderr}"
    if files(workdir) != before:
        return "the replay changed the workdir"
    ended = commands.run(commands.main_command(*job))
    if ended.returncode or results(workdir) != wanted:
        return f"another end: code {ended.returncode}: {ended.stderr}"
    return ""


def main(folder, trials, seed):
    """Run the trials; print a line for each."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "undisturbed" / "front.csv").exists():
        commands.run(commands.main_command(commands.TINY, f"--workdir={folder / 'undisturbed'}")).check_returncode()
    wanted, held = results(folder / "undisturbed"), 0
    for number in range(trials):
        fault = draw(random.Random(f"{seed} nan {number}"))
        problem = trial(folder / "trial", fault, wanted)
        held += not problem
        print(number, *fault, problem or "held", f"({held} of {number + 1})", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int((sys.argv[3:] or ["0"])[0]))
