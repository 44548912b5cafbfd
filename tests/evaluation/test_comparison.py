"""The table of methods, on workdirs made by hand."""

import numpy as np
import pytest

from warp_jax.evaluation import columns, comparison, measure
from warp_jax.evaluation.measure import Evaluation
from warp_jax.evaluation.points import Point, evaluation_name

COUNT = 8
NAN = float("nan")


def _evaluation(kl, reward, token=1):
    noise = np.arange(COUNT) % 2 / 10
    ids = np.full((COUNT, 1), token)
    columns = noise + reward, noise - 2 * reward, np.full(COUNT, kl), np.ones(COUNT)
    return Evaluation(*columns, np.array(0.5), ids, ids > 0, np.arange(COUNT))


def _write(folder, *policies, token=1):
    """A finished workdir with SFT and these policies: (stage, iteration, run, eta, step), KL, reward."""
    points = [Point("sft", 0, 0, 0.0, 0, _evaluation(0.0, 0.0, token))]
    points += [Point(*place, _evaluation(kl, reward)) for place, kl, reward in policies]
    rows = [{name: getattr(point, name) for name in Point._fields[:5]} for point in points]
    for point in points:
        measure.save_evaluation(folder / "evaluations" / f"{evaluation_name(*point[:5])}.npz", point.evaluation)
    (folder / "front.csv").write_text(columns.to_csv(rows))
    return folder


@pytest.fixture
def workdirs(tmp_path):
    """WARP with two iterations, a baseline of one run, and one with another SFT."""
    first, second = ((stage, i, 0, eta, 0) for stage, i, eta in (("liti", 1, 1.0), ("liti", 2, 1.0)))
    warp = _write(tmp_path / "warp", (first, 4.0, 1.0), (second, 4.0, 8.0))
    _write(warp / "best_of_n", (("best_of_n", 0, 0, NAN, 2), 2.0, 3.0))
    runs = [(("policy", 1, 1, NAN, step), kl, reward) for step, kl, reward in ((5, 1.0, 3.0), (9, 5.0, 3.0))]
    baseline = _write(tmp_path / "baseline", *runs, (first, 5.0, 5.0))
    return [warp, baseline, _write(tmp_path / "other", (first, 4.0, 6.0), token=2)]


def test_each_method_has_a_row(workdirs):
    """Fails when an earlier front is taken, a method is read at another KL or loses its gold, the sign of a difference
    turns, methods of another SFT are paired, or a single run or best-of-N has no row."""
    curves = {name: curve for workdir in workdirs for name, curve in comparison.read_curves(workdir).items()}
    rows = {name: cells for name, *cells in comparison.method_rows(curves, 1.5)}
    values = {
        name: [NAN if cell == "-" else float(cell.split(" ")[0]) for cell in cells] for name, cells in rows.items()
    }
    want = {
        "warp": [4, 3.05, NAN, -5.95, NAN, 2.25],
        "warp: best of N": [2, 2.3, -0.75, -4.45, 1.5, 1.6875],
        "baseline": [5, 1.55, -1.5, -2.95, 3, 1.125],
        "baseline: its run": [5, 3.05, 0, -5.95, 0, 3],
        "other": [4, 2.3, NAN, -4.45, NAN, 1.6875],
    }
    assert values.keys() == want.keys()
    for name, numbers in want.items():
        assert values[name] == pytest.approx(numbers, abs=1e-3, nan_ok=True)


def test_a_curve_that_ends_earlier_has_no_value(workdirs):
    """Fails when a curve is extrapolated."""
    (_, best_of_n) = comparison.method_rows(comparison.read_curves(workdirs[0]), 3.0)
    assert best_of_n[2:] == ["-"] * 5
