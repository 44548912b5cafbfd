"""Points read from a workdir, finished or not."""

import matplotlib
import numpy as np
import pytest

from tests.report import hand_made
from tests.settings_of import settings_of
from warp_jax import files
from warp_jax.evaluation import columns, measure, plots, points

NAN = float("nan")


def _places(found):
    return [points.evaluation_name(*point[:5]) for point in found]


@pytest.mark.parametrize("count", [0, 1, 3, 6, 11])
def test_the_points_of_an_unfinished_job(tmp_path, count):
    """Fails when a point is there that is not evaluated, one is left out, or the order is not that of the job."""
    made = hand_made.points()
    hand_made.write(tmp_path, reversed(made[:count]))
    found = points.saved_points(hand_made.SETTINGS, tmp_path)
    assert _places(found) == _places(made[:count])
    for point, want in zip(found, made, strict=False):
        np.testing.assert_array_equal(point.evaluation.reward, want.evaluation.reward)


def test_places_of_all_kinds_of_points():
    """Fails when a kept step, a kept stage or an eta has no place, or a run that ended early has more steps."""
    keep = {"keep.anchor": True, "keep.steps": (2, 3), "evaluation.every": 4, "front.etas": (0.5,)}
    settings = settings_of({**keep, "warp.num_iterations": 1, "warp.num_runs": 2, "warp.steps_per_iteration": (6,)})
    found = points.places(settings, lambda iteration, run: 6 if run == 1 else 2)
    assert [place[:3] + place[4:] for place in found if place[0] == "policy"] == [
        *[("policy", 1, 1, step) for step in (2, 3, 4, 6)],
        ("policy", 1, 2, 2),
    ]
    fronts = [(stage, run, eta) for stage, _, run, eta, _ in found if stage in ("anchor", "average")]
    first = [(stage, 1, eta) for stage in ("anchor", "average") for eta in (0.5, 1.0)]
    assert fronts == [*first, ("anchor", 2, 0.5), ("anchor", 2, 1.0)]
    assert [place[:3] for place in found[-2:]] == [("merged", 1, 0), ("liti", 1, 0)]


def test_fronts_of_kept_weights_are_read_back(tmp_path):
    """Fails when the row of an anchor or an average names the evaluation of the merge, another run or eta, or
    has no curve.
    """
    kept = [("anchor", 1, 0.5, 3), ("anchor", 2, 0.5, 4), ("anchor", 1, 1.0, 5), ("average", 1, 1.0, 6)]
    made = [hand_made.point("sft", 0, 0, 0.0, 0), hand_made.point("merged", 1, 0, NAN, 8)]
    made += [hand_made.point(stage, 1, run, eta, level) for stage, run, eta, level in kept]
    for point in made:
        measure.save_evaluation(tmp_path / "evaluations" / f"{_places([point])[0]}.npz", point.evaluation)
    rows = columns.as_rows(made, settings_of().evaluation)
    files.write_text(tmp_path / "front.csv", columns.to_csv(rows))
    assert [point.evaluation.reward[0] for point in points.read_points(tmp_path)] == [0, 8, 3, 4, 5, 6]
    matplotlib.use("Agg")
    rows += [{**rows[0], "stage": "liti", "iteration": 1}]
    for stage in ("anchor", "average"):
        assert plots.draw_fronts(rows) != plots.draw_fronts([row for row in rows if row["stage"] != stage])
