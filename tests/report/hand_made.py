"""A workdir made by hand: two iterations of two runs, one character a token, and texts that try to run as HTML."""

import json

import numpy as np

from tests.settings_of import settings_of
from warp_jax import files
from warp_jax.data.tokenizer import Tokenizer
from warp_jax.evaluation import measure
from warp_jax.evaluation.measure import Evaluation
from warp_jax.evaluation.points import Point, evaluation_name
from warp_jax.report.data import HeldOut
from warp_jax.types import PromptBatch

NAN, COUNT = float("nan"), 40
ATTACK = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>&"
SETTINGS = settings_of(
    {
        "warp.num_iterations": 2,
        "warp.num_runs": 2,
        "warp.steps_per_iteration": (5, 5),
        "warp.runs": ({"rl.kl_coef": 0.2, "seed": 3}, {}),
        "evaluation.every": 5,
        "evaluation.num_prompts": COUNT,
        "evaluation.samples_per_prompt": 1,
        "evaluation.batch_size": COUNT,
        "front.etas": (0.5, 1.0),
        "front.kl_budget": 5.0,
        "report.num_samples": 3,
        "report.bootstrap_resamples": 50,
    }
)
PROGRESS = {"written": "now", "finished": True, "steps": [20, 20], "left": "", "parts": []}
TOKENIZER = Tokenizer.train(["a"], 259)  # one character is one token


def ids(texts):
    """Token ids [N, C], padded on the right with 0."""
    rows = TOKENIZER.encode(texts)
    return np.stack([np.pad(row, (0, max(map(len, rows)) - len(row))) for row in rows])


def point(stage, iteration, run, eta, level):
    """A policy whose completions are its first letter, iteration, eta and prompt; its rewards are `level` and up."""
    noise = np.random.default_rng(iteration * 10 + run).normal(0, 0.3, COUNT).astype(np.float32)
    reward = np.arange(COUNT, dtype=np.float32) / 10 + level
    text = f"{stage[0]}{iteration}e{eta:g}p"
    tokens = ids([f"{text}{i}{ATTACK if i == 0 else ''}" for i in range(COUNT)])
    columns = reward, reward / 2, np.abs(np.float32(2 * level**2) + noise * bool(level)), (tokens > 0).sum(1)
    evaluation = Evaluation(*columns, np.array(0.5), tokens, tokens > 0, np.arange(COUNT))
    return Point(stage, iteration, run, eta, 5 if stage == "policy" else 0, evaluation)


def points():
    """The points of the whole job; the KL of a policy is about twice the square of its level."""
    found = [point("sft", 0, 0, 0.0, 0)]
    for i in (1, 2):
        found += [point("policy", i, run, NAN, i + run / 4) for run in (1, 2)]
        found.append(point("merged", i, 0, NAN, 1.5 * i))
        found += [point("liti", i, 0, eta, 1.5 * i * eta) for eta in (0.5, 1.0)]
    return found


def held_out():
    """The held-out prompts, q0 and up."""
    prompts = ids([f"q{i}{ATTACK if i == 0 else ''} " for i in range(COUNT)])
    return HeldOut(TOKENIZER, PromptBatch(prompts, prompts > 0, np.arange(COUNT)))


def write(workdir, found=(), *, steps=5):
    """Write the files that the report reads: config, evaluations of `found`, metrics, geometries and a start."""
    files.write_json(workdir / "config.json", SETTINGS.as_json())
    for one in found:
        path = workdir / "evaluations" / f"{evaluation_name(*one[:5])}.npz"
        measure.save_evaluation(path, one.evaluation)
    for i in (1, 2):
        for run in (1, 2):
            drift = {"drift/outside": 0.1 * run, "drift/mean": 0.0}
            rows = [{"step": s, "reward": 10 * i + run + s, "reward/a": s, **drift} for s in range(steps)]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            files.write_text(workdir / f"iteration_{i}" / f"run_{run}" / "metrics.jsonl", text)
        angles = [[[0.0, angle], [angle, 0.0]] for angle in (80.0 + i, 90.0 + i)]
        norms = [[1.0, 2.0], [3.0, 4.0]]
        geometry = {"units": ["embed", "layers/0"], "angles_degrees": angles, "norms": norms}
        files.write_json(workdir / f"iteration_{i}" / "geometry.json", geometry)
    start = {"time": "2030-01-01", "versions": {"jax": "1.2"}, "device": "cpu", "accepted": ["data", "models"]}
    files.write_text(workdir / "starts.jsonl", json.dumps(start) + "\n")
    return workdir
