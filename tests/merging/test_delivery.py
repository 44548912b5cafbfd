"""What a merge delivers after rounding: reports and rounding, against independent float64 arithmetic."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from warp_jax import merging
from warp_jax.merging.on_disk import Settings, merge_folders, summary_line

BF16 = np.dtype(ml_dtypes.bfloat16)
NAMES = ("model.layers.0.up.weight", "model.layers.1.up.weight", "model.norm.weight")
ELEMENTS = 150_000
TASK_VECTOR = 1e-3  # length of the task vectors, as a share of that of the weights


def _models(change=TASK_VECTOR, dtype=BF16):
    """Init and two policies whose task vectors are `change` times as long as the weights, before they are rounded."""
    generator = np.random.default_rng(0)
    init = {name: generator.normal(0, 0.02, ELEMENTS).astype(dtype) for name in NAMES}
    policies = [
        {
            n: (x.astype(np.float64) + generator.normal(0, 0.02 * change, ELEMENTS)).astype(dtype)
            for n, x in init.items()
        }
        for _ in range(2)
    ]
    return init, *policies


def _merge(tmp_path, models, **settings):
    paths = [tmp_path / f"model_{number}" for number in range(len(models))]
    for path, model in zip(paths, models, strict=True):
        path.mkdir(exist_ok=True)
        safetensors.numpy.save_file(model, path / "model.safetensors")
    out = tmp_path / f"merged_{len(list(tmp_path.iterdir()))}"
    report = merge_folders(paths[0], paths[1:], out, Settings(**settings))
    assert json.loads((out / "merge_report.json").read_text()) == json.loads(json.dumps(report))
    read = {eta: safetensors.numpy.load_file(out / f"eta_{eta:g}" / "model.safetensors") for eta in settings["etas"]}
    return report, read


def _asked(models, eta, name):
    """eta times the slerp of two float64 task vectors at 1/2."""
    init, *policies = (model[name].astype(np.float64) for model in models)
    a, b = (policy - init for policy in policies)
    angle = np.arccos(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    return eta * np.sin(angle / 2) / np.sin(angle) * (a + b)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_the_delivered_share_is_that_of_the_written_file(tmp_path, rounding):
    """Mutation: the share of norms; of the merge in place of the displacement; units or etas swapped."""
    models = _models()
    etas = (0.1, 0.3, 1.0)
    report, written = _merge(tmp_path, models, etas=etas, rounding=rounding)
    for eta, number in zip(etas, range(3), strict=True):
        totals = np.zeros(3)
        for unit, name in zip(report["units"], NAMES, strict=True):
            asked = _asked(models, eta, name)
            got = written[eta][name].astype(np.float64) - models[0][name].astype(np.float64)
            sums = asked @ asked, got @ asked, (got - asked) @ (got - asked)
            totals += sums
            assert unit["delivered"][number]["eta"] == eta
            assert unit["delivered"][number]["share"] == pytest.approx(sums[1] / sums[0], abs=1e-6)
            assert unit["delivered"][number]["relative_error"] == pytest.approx((sums[2] / sums[0]) ** 0.5, rel=1e-6)
        assert report["delivered"][number]["share"] == pytest.approx(totals[1] / totals[0], abs=1e-6)


def test_nearest_rounding_loses_small_displacements_and_warns(tmp_path):
    """Mutation: no warning; a warning at eta 0 or in float32."""
    models = _models()
    report, _ = _merge(tmp_path, models, etas=(0.0, 0.1, 0.3, 1.0))
    shares = [row["share"] for row in report["delivered"]]
    assert shares[0] is None
    assert shares[1] < 0.1
    assert shares[2] < 0.3
    assert shares[3] > 1.1  # 0.7 of a step becomes a whole one
    assert [line.split(":")[0] for line in report["warnings"][:3]] == ["eta 0.1", "eta 0.3", "eta 1"]
    assert "3 of 3 units are outside 95% to 105%" in report["warnings"][1]
    assert "their task vectors are mostly rounding" in report["warnings"][3]
    assert "use --round=stochastic or --dtype=float32" in report["warnings"][1]
    assert "at eta 0.3" in summary_line(report)
    exact, _ = _merge(tmp_path, models, etas=(0.0, 0.1), dtype="float32")
    assert exact["delivered"][1]["share"] == pytest.approx(1, abs=1e-4)
    assert not any("eta" in line for line in exact["warnings"])


@pytest.mark.parametrize(
    "settings",
    [
        {"etas": (0.0,)},
        {"etas": (1e-300,)},
        {"etas": (0.3, 1.0), "method": "lerp", "weights": (0.0, 0.0)},
        {"etas": (0.3, 1.0), "method": "model_stock"},
    ],
)
def test_a_merge_that_asks_for_no_displacement_has_a_summary(tmp_path, settings):
    """Mutation: a share is written for every eta but 0, so a merge equal to init ends with a TypeError."""
    init = {"model.norm.weight": np.zeros(4, np.float32)}
    policies = [{"model.norm.weight": np.eye(4, dtype=np.float32)[axis]} for axis in (0, 1)]  # at exactly 90 degrees
    report, _ = _merge(tmp_path, (init, *policies), **settings)
    assert [row["share"] for row in report["delivered"]] == [None] * len(settings["etas"])
    assert (
        summary_line(report) == "merged 2 policies over 1 units (1 tensors outside layers), median angle 90.0 degrees"
    )


def test_stochastic_rounding_delivers_the_mean_and_is_the_same_again(tmp_path):
    """Mutation: rounding depends on chunks or threads; the seed is not used."""
    models = _models()
    options = {"etas": (0.1, 0.3), "rounding": "stochastic"}
    report, first = _merge(tmp_path, models, **options, memory_gb=0.02)
    _, again = _merge(tmp_path, models, **options, memory_gb=1.0)
    _, other = _merge(tmp_path, models, **options, seed=1)
    noise = 7.6 / np.sqrt(3 * ELEMENTS)  # standard error of the share at eta 0.1
    assert report["delivered"][0]["share"] == pytest.approx(1, abs=4 * noise)
    assert report["delivered"][1]["share"] == pytest.approx(1, abs=2 * noise)
    assert not any("eta" in line for line in report["warnings"])
    for name in NAMES:
        assert np.array_equal(first[0.1][name], again[0.1][name])
        assert not np.array_equal(first[0.1][name], other[0.1][name])


def test_stochastic_rounding_keeps_a_stored_head_tied(tmp_path):
    """Mutation: the random numbers of a head are not those of the embedding, so that two equal tensors become two."""
    renamed = {NAMES[0]: "model.embed_tokens.weight", NAMES[1]: "model.layers.0.up.weight"}
    models = [{new: model[old].reshape(-1, 10) for old, new in renamed.items()} for model in _models()]
    for model in models:
        model["lm_head.weight"] = model["model.embed_tokens.weight"].copy()
    _, written = _merge(tmp_path, models, etas=(0.3,), rounding="stochastic")
    head, embedding = (written[0.3][name] for name in ("lm_head.weight", "model.embed_tokens.weight"))
    assert np.array_equal(head, embedding)
    assert not np.array_equal(head, models[0]["lm_head.weight"])
    same = [(written[0.3][name] == models[0][name]).ravel() for name in models[0]]
    assert not np.array_equal(same[0], same[1])  # layers have numbers of their own


def test_stochastic_rounding_warns_of_the_whole_model_only(tmp_path):
    """Mutation: a warning of a small unit, whose share is left to chance; advice to use what is already used."""
    models = _models()
    small = [model | {NAMES[2]: model[NAMES[2]][:16]} for model in models]
    report, _ = _merge(tmp_path, small, etas=(0.3,), rounding="stochastic")
    assert abs(report["units"][2]["delivered"][0]["share"] - 1) > 0.05
    assert not any("eta" in line for line in report["warnings"])
    tiny = [{NAMES[2]: model[NAMES[2]]} for model in small]
    report, _ = _merge(tmp_path, tiny, etas=(0.3,), rounding="stochastic")
    assert report["warnings"][0].endswith("%); use --dtype=float32")


def test_in_memory_merges_round_stochastically_with_a_key():
    """Mutation: the key is not handed down; one key for all leaves; bfloat16 maths; layers of a stack rounded alike."""
    init, *policies = (
        {"layers": {"up": jnp.asarray(np.stack([m[n] for n in NAMES[:2]]))}, "norm": jnp.asarray(m[NAMES[2]])}
        for m in _models()
    )
    for leaf in jax.tree.leaves(init):
        assert leaf.dtype == jnp.bfloat16
    nearest = merging.slerp_liti(init, policies, 0.1)
    merged = merging.slerp_liti(init, policies, 0.1, rounding_key=jax.random.key(0))
    again = merging.slerp_liti(init, policies, 0.1, rounding_key=jax.random.key(0))
    models = _models()
    asked = np.concatenate([_asked(models, 0.1, name) for name in NAMES])
    flat = lambda tree: np.concatenate(  # noqa: E731
        [np.asarray(leaf, np.float64).reshape(-1) for leaf in (tree["layers"]["up"], tree["norm"])]
    )
    share = (flat(merged) - flat(init)) @ asked / (asked @ asked)
    assert share == pytest.approx(1, abs=4 * 7.6 / np.sqrt(asked.size))
    assert (flat(nearest) - flat(init)) @ asked / (asked @ asked) < 0.1
    assert np.array_equal(flat(merged), flat(again))
    changed = [
        flat(merged)[i * ELEMENTS : (i + 1) * ELEMENTS] != flat(init)[i * ELEMENTS : (i + 1) * ELEMENTS]
        for i in range(3)
    ]
    assert not np.array_equal(changed[0], changed[1])
    assert not np.array_equal(changed[0], changed[2])


def test_stochastic_rounding_works_inside_jit():
    """Mutation: uniforms of 64 bits, which cannot be lowered inside a jit of a program with 32-bit types."""
    init, *policies = ({"norm": jnp.asarray(model[NAMES[2]][:1000])} for model in _models())

    def merge(init, policies, key):
        return merging.merge(init, policies, rounding_key=key)

    want, got = (f(init, policies, jax.random.key(0))["norm"] for f in (merge, jax.jit(merge)))
    assert np.array_equal(got, want)
    assert not np.array_equal(got, merging.merge(init, policies)["norm"])


def test_the_same_policy_twice_is_a_warning(tmp_path):
    """Mutation: identical policies merge without a word; policies apart by their task vectors are warned of."""
    init, first, second = _models(0.03)
    report, _ = _merge(tmp_path, (init, first, first), etas=(1.0,))
    (line,) = report["warnings"]
    assert "model_1" in line
    assert "model_2 are closer than their rounding in 3 of 3 units (model.layers.0: 0.00 degrees)" in line
    other, _ = _merge(tmp_path / "..", (init, first, second), etas=(1.0,), dtype="float32")
    assert other["warnings"] == []


@pytest.mark.parametrize("method", ["slerp", "slerp_full_weights"])
def test_units_that_did_not_move_are_neither_the_same_policy_twice_nor_an_angle(tmp_path, method):
    """Mutation: frozen units warn of the same policy twice; their angle of 0 counts in the median; rounding of frozen
    weights counts as noise of the others in their unit.
    """
    init, first, second = _models(0.03)
    small = {"model.layers.0.q.weight": init[NAMES[0]][:50]}
    moved = [{"model.layers.0.q.weight": p[NAMES[0]][:50]} for p in (first, second)]
    models = init | small, init | moved[0], init | moved[1]
    report, _ = _merge(tmp_path, models, etas=(1.0,), method=method, dtype="float32")
    assert report["warnings"] == []
    moved_unit = report["units"][0]
    assert moved_unit["name"] == "model.layers.0"
    if method == "slerp":
        assert f"median angle {moved_unit['angles_degrees'][1][0]:.1f} degrees" in summary_line(report)
    models = init | small, init | moved[0], init | moved[0]
    report, _ = _merge(tmp_path, models, etas=(1.0,), method=method, dtype="float32")
    (line,) = report["warnings"]
    assert "in 1 of 3 units (model.layers.0: 0.00 degrees); is it the same policy twice?" in line


def test_a_result_that_overflows_the_output_is_refused(tmp_path):
    """Mutation: infinite weights are written, with exit code 0."""
    init, first, second = _models(dtype=np.float32)
    first[NAMES[0]][5] = 1e6
    with pytest.raises(ValueError, match=r"layers.0.up.weight.*overflows the output; set a wider --dtype"):
        _merge(tmp_path, (init, first, second), etas=(1.0,), dtype="float16")
