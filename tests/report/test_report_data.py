"""The data of the page, from a workdir made by hand."""

import json
import shlex

import numpy as np
import pytest

from tests.report import hand_made
from warp_jax.evaluation import fronts, summary
from warp_jax.report import data


@pytest.fixture
def results(tmp_path):
    workdir = hand_made.write(tmp_path / "w")
    points = hand_made.points()
    return data.make_results(hand_made.SETTINGS, workdir, points, summary.summarise(hand_made.SETTINGS, points))


@pytest.fixture
def gathered(results):
    return data.gather(results, hand_made.held_out(), hand_made.PROGRESS)


def test_answers_stand_beside_their_prompts(gathered):
    """Fails when answers or rewards are those of another prompt, eta or iteration, or an eta has none."""
    prompts, fronts = gathered["answers"].values()
    assert [prompt[:3].strip("<") for prompt in prompts] == ["q0", "q19", "q39"]
    assert [(one["iteration"], one["eta"]) for one in fronts] == [(0, 0), (1, 0.5), (1, 1), (2, 0.5), (2, 1)]
    for one in fronts:
        start = f"{'l' if one['iteration'] else 's'}{one['iteration']}e{one['eta']:g}p"
        assert one["texts"] == [f"{start}0{hand_made.ATTACK}", f"{start}19", f"{start}39"]
        level = 1.5 * one["iteration"] * one["eta"]
        assert one["reward"] == pytest.approx([level, level + 1.9, level + 3.9])
        assert one["gold_reward"] == pytest.approx([reward / 2 for reward in one["reward"]])


def test_budgets_agree_with_the_summary(results, gathered):
    """Fails when another front, half, seed or number of resamples chooses, or the budget of the config is not there."""
    best = results.numbers["best_eta_under_budget"]
    front = summary.front_members(results.points, 2)[1:]
    measured = fronts.Measured(*(np.stack([getattr(p.evaluation, x) for p in front]) for x in ("sft_kl", "reward")))
    clusters = front[0].evaluation.clusters
    (choice,) = fronts.choose_under_budgets(measured, clusters, [5.0], resamples=50, seed=hand_made.SETTINGS.seed)
    assert list(best.values()) == [0.5, choice.reward, choice.kl, choice.probability]
    rows = {row.pop("budget"): row for row in gathered["budgets"]["2"]}
    assert rows[5.0] == best
    assert rows[0.0] == {}
    assert rows[max(rows)]["eta"] == 1
    front = summary.front_members(results.points, 1)[1:]
    for number, row in enumerate(gathered["budgets"]["1"][::10]):
        (again,) = summary.best_etas(hand_made.SETTINGS, front, [row.pop("budget")])
        assert row == (again or {}), number


def test_the_command_exports_the_point(tmp_path):
    """Fails when a command names another stage, one that is not saved, or breaks at a blank in the workdir's name."""
    settings = hand_made.SETTINGS.replace({"keep.steps": (3, 5)})
    points = {p[:5]: p for p in hand_made.points()}
    points["anchor"] = hand_made.point("anchor", 1, 2, 1.0, 1)
    points["anchor 0.5"] = hand_made.point("anchor", 1, 2, 0.5, 1)
    points["kept"] = hand_made.point("policy", 2, 1, float("nan"), 1)._replace(step=3)
    points["gone"] = points["kept"]._replace(step=4)
    found = []
    for point in points.values():
        command = data.export_command(settings, tmp_path / "a b", point)
        arguments = shlex.split(command) if command else ["", "", "", "--stage=None", ""]
        assert not command or arguments[2] == f"--workdir={tmp_path / 'a b'}"
        found.append(arguments[3].removeprefix("--stage="))
    first = ["sft", "iteration_1/run_1", "iteration_1/run_2", "iteration_1/merged", "None", "iteration_1/merged"]
    second = ["iteration_2/run_1", "iteration_2/run_2", "iteration_2/merged", "liti:0.5", "liti:1"]
    assert found == [*first, *second, "iteration_1/run_2/anchor", "None", "iteration_2/run_1/step_3", "None"]


def test_long_curves_are_thinned_to_means(tmp_path, monkeypatch):
    """Fails when steps are dropped instead of averaged, a curve keeps too many points, or runs are swapped."""
    workdir = hand_made.write(tmp_path, steps=7)
    monkeypatch.setattr(data, "MAX_STEPS", 4)
    found = {(run["iteration"], run["run"]): run for run in data.curves(data.read_metrics(hand_made.SETTINGS, workdir))}
    assert found.keys() == {(1, 1), (1, 2), (2, 1), (2, 2)}
    assert found[2, 1]["steps"] == [1, 3, 5, 6]
    assert found[2, 1]["values"]["reward"] == [21.5, 23.5, 25.5, 27]
    assert found[2, 1]["every"] == 2


def test_geometry_is_by_pair_and_by_run(gathered):
    """Fails when units and pairs, or units and runs, are swapped."""
    first, second = gathered["geometry"]
    assert (first["pairs"], second["angles"]) == (["1 and 2"], [[82.0, 92.0]])
    assert first["norms"] == [[1, 3], [2, 4]]


def test_drift_above_the_limit_is_marked(gathered):
    """Fails when the limit is for the mean, or one run's drift hides behind another's."""
    assert [(row["run"], row["outside"], row["high"]) for row in gathered["drift"]] == [
        (run, pytest.approx(0.1 * run), True) for run in (1, 2, 1, 2)
    ]
    assert data.MAX_DRIFT < 0.1


def test_the_settings_of_each_run_are_shown(gathered):
    """Fails when a reader does not see which run had which settings, or how many steps it had."""
    (runs,) = [table["rows"] for table in gathered["tables"] if table["title"] == "Runs"]
    assert [(row["run"], row["steps"], row["changes"]) for row in runs[:2]] == [
        (1, 5, "rl.kl_coef = 0.2, seed = 3"),
        (2, 5, ""),
    ]


def test_starts_are_flat(gathered):
    """Fails when versions or lists come into a cell as objects."""
    assert gathered["starts"] == [{"time": "2030-01-01", "device": "cpu", "accepted": "data, models", "jax": "1.2"}]


def test_an_old_or_unfinished_workdir_has_data_too(tmp_path):
    """Fails when a job without metrics, geometry, gold, held-out prompts or a merge fails, or nan is in JSON."""
    sft, policy, *_ = hand_made.points()
    gold = np.full(hand_made.COUNT, np.nan, np.float32)
    points = [p._replace(evaluation=p.evaluation._replace(gold_reward=gold)) for p in (sft, policy)]
    results = data.make_results(hand_made.SETTINGS, tmp_path / "none", points)
    gathered = data.gather(results, "no data", hand_made.PROGRESS)
    json.dumps(gathered, allow_nan=False)
    assert (gathered["curves"], gathered["geometry"], gathered["budgets"], gathered["starts"]) == ([], [], {}, [])
    assert gathered["rows"][1]["gold_reward"] is None
    assert gathered["answers"] == "no data"


def test_config_and_rows_are_whole(results, gathered):
    """Fails when a row or column of front.csv is left out."""
    assert gathered["config"] == json.loads(json.dumps(hand_made.SETTINGS.as_json()))
    rows = [{k: v for k, v in row.items() if k != "export"} for row in gathered["rows"]]
    assert [list(row) for row in rows] == [list(row) for row in results.rows]
    assert [row["reward"] for row in rows] == [row["reward"] for row in results.rows]
