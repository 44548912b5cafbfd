"""The report's files, on points made by hand."""

import csv
import html
import re

import matplotlib
import numpy as np
import pytest

from tests.settings_of import settings_of
from warp_jax import files
from warp_jax.data.tokenizer import Tokenizer
from warp_jax.evaluation import columns, measure, plots, report
from warp_jax.evaluation.measure import Evaluation
from warp_jax.evaluation.points import Point
from warp_jax.types import PromptBatch

NAN, COUNT = float("nan"), 8
SETTINGS = {
    "warp.num_iterations": 2,
    "warp.num_runs": 1,
    "warp.steps_per_iteration": (5, 5),
    "warp.runs": ({"rl.kl_coef": 0.2, "seed": 3},),
    "front.etas": (0.5, 1.0),
    "report.num_samples": 3,
    "report.bootstrap_resamples": 10,
}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["a"], 259)  # one character is one token


def _ids(tokenizer, texts):
    return np.stack(tokenizer.encode(texts))


def _point(tokenizer, stage, iteration, eta, level):
    """A policy whose completions are its first letter, iteration and prompt; its rewards are `level` and up."""
    reward = np.arange(COUNT, dtype=np.float32) + level
    ids = _ids(tokenizer, [f"{stage[0]}{iteration}{i}" for i in range(COUNT)])
    arrays = reward, reward / 2, reward / 4, np.full(COUNT, 3), np.array(0.5), ids, ids > 0, np.arange(COUNT)
    return Point(stage, iteration, int(stage == "policy"), eta, 5 if stage == "policy" else 0, Evaluation(*arrays))


@pytest.fixture(scope="module")
def written(tokenizer, tmp_path_factory):
    """The folder of a report of two iterations with one run each, and its points."""
    workdir = tmp_path_factory.mktemp("report")
    points = [_point(tokenizer, "sft", 0, 0.0, 0)]
    for i in (1, 2):
        files.write_json(workdir / f"iteration_{i}" / "geometry.json", {})
        stages = ("policy", NAN, 4), ("merged", NAN, 8), ("liti", 0.5, 4), ("liti", 1.0, 8)
        points += [_point(tokenizer, stage, i, eta, level * i) for stage, eta, level in stages]
    ids = _ids(tokenizer, [f"q{i}" for i in range(COUNT)])
    prompts = PromptBatch(ids, ids > 0, np.arange(COUNT))
    report.write_report(settings_of(SETTINGS), tokenizer, prompts, points, workdir)
    return workdir, points


def _tables(page):
    """The rows of cells of every table."""
    tables = re.findall(r"<table>(.*?)</table>", page, re.DOTALL)
    return [[re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", t)] for t in tables]


def test_completions_stand_beside_their_prompts(written):
    """Fails when completions or rewards are those of another prompt, policy or iteration."""
    page = html.unescape((written[0] / "report.html").read_text())
    (samples,) = [table for table in _tables(page) if table[0][0] == "prompt"]
    assert samples == [
        ["prompt", "SFT", "SFT reward", "final merged policy", "final merged policy reward"],
        *([f"q{i}", f"s0{i}", f"{i}", f"m2{i}", f"{16 + i}"] for i in (0, 3, 7)),
    ]


def test_the_settings_of_each_run_are_shown(written):
    """Fails when a reader does not see which run had which settings, or how many steps it had."""
    page = html.unescape((written[0] / "report.html").read_text())
    (runs,) = [table for table in _tables(page) if table[0][-1] == "changes"]
    rows = [["1", "1", "5", "rl.kl_coef = 0.2, seed = 3"], ["2", "1", "5", "rl.kl_coef = 0.2, seed = 3"]]
    assert runs[1:] == rows
    changes = [run["changes"] for run in files.read_json(written[0] / "summary.json")["runs"]]
    assert changes == [{"rl.kl_coef": 0.2, "seed": 3}] * 2


def test_the_page_runs_and_loads_nothing(written, tokenizer, tmp_path):
    """Fails when a text of the model, or a setting, comes into the page as HTML, or a picture from elsewhere."""
    page = (written[0] / "report.html").read_text()
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert f'<meta http-equiv="Content-Security-Policy" content="{policy}">' in page
    assert set(re.findall(r"(?:src|href)=\"?(\w+:)", page)) == {"data:"}
    (tmp_path / "iteration_1").mkdir()
    files.write_json(tmp_path / "iteration_1" / "geometry.json", {})
    attack = "<img src=x onerror=alert(1)>&"
    ids = _ids(tokenizer, [attack] * COUNT)
    arrays = np.zeros(COUNT, np.float32), np.zeros(COUNT), np.zeros(COUNT), np.full(COUNT, 3), np.array(0.5)
    evaluation = Evaluation(*arrays, ids, ids > 0, np.arange(COUNT))
    points = [Point("sft", 0, 0, 0.0, 0, evaluation), Point("merged", 1, 0, NAN, 0, evaluation)]
    points += [Point("policy", 1, 1, NAN, 5, evaluation), Point("liti", 1, 0, 1.0, 0, evaluation)]
    settings = settings_of({**SETTINGS, "warp.num_iterations": 1, "warp.steps_per_iteration": (5,)})
    report.write_report(settings, tokenizer, PromptBatch(ids, ids > 0, np.arange(COUNT)), points, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "<img src=x" not in page
    assert html.escape(attack) in page


def test_the_front_has_a_row_for_each_point(written):
    """Fails when a column has the values of another, or a row those of another point."""
    with (written[0] / "front.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row, point in zip(rows, written[1], strict=True):
        assert (row["stage"], int(row["iteration"]), int(row["run"]), int(row["step"])) == (*point[:3], point.step)
        level = point.evaluation.reward.mean()
        columns = [float(row[name]) for name in ("reward", "gold_reward", "sft_kl", "length")]
        assert columns == pytest.approx([level, level / 2, level / 4, 3])
        assert float(row["eta"]) == pytest.approx(point.eta, nan_ok=True)


def test_fronts_of_kept_weights_are_read_back(tokenizer, tmp_path):
    """Fails when the row of an anchor or an average names the evaluation of the merge, another run or eta, or
    has no curve.
    """
    names = {
        "anchor_i1_r1_e0.5": 3,
        "anchor_i1_r2_e0.5": 4,
        "anchor_i1_r1_e1": 5,
        "average_i1_r1_e1": 6,
        "merged_i1": 8,
    }
    points = [_point(tokenizer, "sft", 0, 0.0, 0)]
    for name, level in names.items():
        stage, _, run, eta = [*name.split("_"), "r0", "enan"][:4]
        point = _point(tokenizer, stage, 1, float(eta[1:]), level)
        points.append(point._replace(run=int(run[1:])))
    for name, point in zip(["sft", *names], points, strict=True):
        measure.save_evaluation(tmp_path / "evaluations" / f"{name}.npz", point.evaluation)
    rows = columns.as_rows(points, settings_of().evaluation)
    files.write_text(tmp_path / "front.csv", report.to_csv(rows))
    assert [point.evaluation.reward[0] for point in report.read_points(tmp_path)] == [0, *names.values()]
    matplotlib.use("Agg")
    rows += [{**rows[0], "stage": "liti", "iteration": 1}]
    for stage in ("anchor", "average"):
        assert plots.draw_fronts(rows) != plots.draw_fronts([row for row in rows if row["stage"] != stage])
