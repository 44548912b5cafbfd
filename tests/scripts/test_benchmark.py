"""The programs that scripts/benchmark.py times: they run, and do the work that they are asked for."""

import importlib
import sys

import jax
import numpy as np
import pytest

from tests.commands import ROOT, run

TINY = {"batch": 4, "prompt": 3, "new": 5, "vocab": 64, "width": 24, "layers": 3, "heads": 3, "kv_heads": 1, "mlp": 16}


@pytest.fixture
def programs(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "speed"))
    yield importlib.import_module
    for name in ("protocol", "with_jax", "with_torch"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("program", "stage", "shape"),
    [
        ("with_jax", "decode", (4, 5)),
        ("with_jax", "score", (4, 5)),
        ("with_jax", "evaluate", (1024,)),
        ("with_torch", "decode", (4, 5)),
        ("with_torch", "score", (4, 5)),
    ],
)
def test_each_program_computes_as_many_tokens(programs, program, stage, shape):
    """Fails when a stage ends early, or one library samples or scores other sizes than the other."""
    work = programs("protocol").Work(stage, **TINY)
    result = programs(program).make(work)()
    found = np.asarray(getattr(result, "completion_ids", result))
    assert found.shape == shape
    mask = getattr(result, "completion_mask", None)
    assert mask is None or mask.all()


@pytest.mark.parametrize("trained_layers", [0, 1])
def test_an_update_trains(programs, trained_layers):
    """Fails when the update of the benchmark does nothing, or freezes no layer."""
    work = programs("protocol").Work("rl_step", **TINY, trained_layers=trained_layers)
    with jax.numpy_dtype_promotion("standard"):  # as outside the tests
        metrics = programs("with_jax").make(work)()
    assert float(metrics["grad_norm"]) > 0
    assert float(metrics["length"]) == 5


def test_bad_sizes_are_refused():
    """Fails when the sizes are not checked before programs are started."""
    ended = run([sys.executable, "scripts/benchmark.py", "--shapes=16x32"])
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: --shapes: got '16x32', want such as 16x32+64")
