"""The model of costs that scripts/study_cost.py fits."""

import importlib
import sys

import jax
import numpy as np
import pytest

from tests.commands import ROOT
from warp_jax.models import apply, transformer


@pytest.fixture
def cost_model(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    yield importlib.import_module("speed.cost_model")
    for name in [name for name in sys.modules if name.startswith("speed")]:
        sys.modules.pop(name)


@pytest.mark.parametrize("size", ["135M", "81M", "23M"])
def test_all_weights_of_products_are_counted(cost_model, size):
    """Fails when the key-value heads, one of the MLP's three matrices or the head is left out, or norms are counted."""
    work = cost_model.work_of("update", size, "4x8+24")
    shapes = apply.param_shapes(transformer.TransformerConfig(*work.sizes))
    sizes = {jax.tree_util.keystr(path): x.size for path, x in jax.tree.leaves_with_path(shapes)}
    assert sum(cost_model.weights(work)) == sum(x for name, x in sizes.items() if "scale" not in name)


def test_costs_follow_the_tokens(cost_model):
    """Fails when samples of a prompt do not share its prefill, the head sees prompts, or a step reads no weights or
    cache."""
    work = cost_model.Work("decode", 4, 8, 24, 24)
    layers, head = cost_model.weights(work)
    flop = 2 * (layers * (2 * 8 + 4 * 24) + head * 4 * 24)
    cache = 2 * 30 * 3 * 64 * 4 * 32 * 24  # keys and values, layers, heads, their size, rows, columns, steps
    found = cost_model.costs(work)
    assert found["tflop"] == pytest.approx(flop / 1e12)
    assert found["weights_gb"] == pytest.approx(4 * (layers + head) * 24 / 1e9)
    assert found["cache_gb"] == pytest.approx(4 * cache / 1e9)
    flop = 8 * (layers * 4 * 32 + head * 4 * 24)
    found = cost_model.costs(work._replace(stage="update"))
    assert found == pytest.approx({"tflop": flop / 1e12, "weights_gb": 4 * (layers + head) / 1e9})


def test_a_fit_finds_the_terms_and_the_errors(cost_model):
    """Fails when the seconds are not those of the sum of the terms, or errors are not relative to the measurement."""
    points = [{"tflop": a, "gb": b, "seconds": 3 * a + 0.2 * b} for a, b in ((1.0, 7.0), (2.0, 3.0), (5.0, 1.0))]
    names, found, errors = cost_model.fit(points)
    assert names == ["tflop", "gb"]
    np.testing.assert_allclose(found, [3, 0.2], rtol=1e-9)
    np.testing.assert_allclose(errors, 0, atol=1e-9)
    _, found, errors = cost_model.fit([{"fixed": 1, "seconds": 2.0}, {"fixed": 1, "seconds": 4.0}])
    np.testing.assert_allclose(errors, found[0] / np.array([2.0, 4.0]) - 1)
