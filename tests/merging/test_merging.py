"""EMA, SLERP and LITI against float64 numpy and hand arithmetic."""

import itertools
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from warp_jax import merging

SHAPES = {"embed": (24, 16), "final_norm": (300,), "head": (24, 16)}
LAYER_SHAPES = {"attn": (16, 24), "mlp": (16, 24), "norm": (16,)}
LAYERS = 3
PIECE_SHAPES = SHAPES | {f"{i}/{name}": shape for i in range(LAYERS) for name, shape in LAYER_SHAPES.items()}
SIZES = {name: math.prod(shape) for name, shape in PIECE_SHAPES.items()}
BY_LAYER = [["embed"], ["final_norm"], ["head"], *([f"{i}/{name}" for name in LAYER_SHAPES] for i in range(LAYERS))]

DEGREES = (0.01, 1, 30, 90, 150, 179)  # one for each unit
EQUAL, UNEQUAL = (1, 1, 1, 1, 1), (1, 1.7, 0.4, 1.2, 0.8)
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


def tree_of(pieces, dtype):
    """A transformer's tree, layers stacked, from flat float64 vectors by name."""
    shaped = {name: np.reshape(vector, PIECE_SHAPES[name]) for name, vector in pieces.items()}
    layers = {name: np.stack([shaped[f"{i}/{name}"] for i in range(LAYERS)]) for name in LAYER_SHAPES}
    tree = {name: {"kernel": shaped[name]} for name in SHAPES}
    tree["layers"] = {name: {"kernel": stacked} for name, stacked in layers.items()}
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def pieces_of(tree):
    """The values of `tree_of`'s result as flat float64 vectors by name."""
    flat = {name: wide(tree[name]["kernel"]).ravel() for name in SHAPES}
    for i, name in itertools.product(range(LAYERS), LAYER_SHAPES):
        flat[f"{i}/{name}"] = wide(tree["layers"][name]["kernel"][i]).ravel()
    return flat


def wide(x):
    return np.asarray(x).astype(np.float64)


def join(pieces, names):
    return np.concatenate([pieces[name] for name in names])


def size_of(pieces):
    return np.linalg.norm(join(pieces, pieces))


def minus(a, b):
    return {name: a[name] - b[name] for name in a}


def split(vector, like, names):
    return dict(zip(names, np.split(vector, np.cumsum([like[n].size for n in names])[:-1]), strict=True))


def make_policies(count, degrees, *, lengths=EQUAL, drift=0.01, dtype=jnp.float32, seed=0):
    """Init and policies. In unit u, neighbours in the list are degrees[u] apart, and lengths are drift * |init|."""
    rng = np.random.default_rng(seed)
    init = {name: rng.normal(0, 0.02, size) for name, size in SIZES.items()}
    policies = [{} for _ in range(count)]
    for unit, (names, angle) in enumerate(zip(BY_LAYER, np.radians(degrees), strict=True)):
        start = join(init, names)
        direction, *axes = np.linalg.qr(rng.normal(size=(start.size, count)))[0].T
        for m, policy in enumerate(policies):
            if m > 0:
                direction = np.cos(angle) * direction + np.sin(angle) * axes[m - 1]
            length = drift * np.linalg.norm(start) * lengths[(m + unit) % 5]
            policy.update(split(start + length * direction, init, names))
    return tree_of(init, dtype), [tree_of(policy, dtype) for policy in policies]


def exact_slerp(first, second, weight):
    """Spherical interpolation of two float64 vectors; the angle is taken from chords, not from a cosine."""
    u, v = first / np.linalg.norm(first), second / np.linalg.norm(second)
    angle = 2 * np.arctan2(np.linalg.norm(u - v), np.linalg.norm(u + v))
    if angle < 1e-9:
        return (1 - weight) * first + weight * second
    return (np.sin((1 - weight) * angle) * first + np.sin(weight * angle) * second) / np.sin(angle)


def exact_merge(init_params, policies, groups=BY_LAYER, weights=None, rate=1.0):
    """Pieces of the merge in float64, one angle for each group of pieces."""
    init, merged = pieces_of(init_params), {}
    for names in groups:
        start = join(init, names)
        deltas = [join(pieces_of(policy), names) - start for policy in policies]
        total = deltas[0]
        for m, delta in enumerate(deltas[1:], start=2):
            total = exact_slerp(total, delta, 1 / m if weights is None else weights[m - 2])
        merged |= split(start + rate * total, init, names)
    return merged


def errors(merged, exact, dtype):
    """|merged - exact| and |exact rounded to dtype - exact|, for each unit."""
    error = minus(pieces_of(merged), exact)
    rounding = minus({name: wide(vector.astype(np.dtype(dtype))) for name, vector in exact.items()}, exact)
    return np.array([[np.linalg.norm(join(x, names)) for names in BY_LAYER] for x in (error, rounding)])


def assert_trees_equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(wide(a), wide(b)), got, want)


def assert_trees_close(got, want, atol):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(wide(a), wide(b), rtol=0, atol=atol), got, want)


def vectors(*rows, init=(0.5, -1.0)):
    """A tree of one leaf at `init`, and policies whose task vectors are the rows. Dyadic numbers stay exact."""
    start = np.array(init)
    return {"w": jnp.array(start, jnp.float32)}, [{"w": jnp.array(start + row, jnp.float32)} for row in rows]


def displacement(merged, init):
    return wide(merged["w"]) - wide(init["w"])


# ---------------------------------------------------------------- accuracy

STORED = [
    ("float32", 0.001, UNEQUAL),
    ("float32", 0.01, EQUAL),
    ("float32", 0.01, UNEQUAL),
    ("bfloat16", 0.004, UNEQUAL),
    ("float16", 0.002, EQUAL),
]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize(("dtype", "drift", "lengths"), STORED)
def test_slerp_is_exact_up_to_one_rounding(dtype, drift, lengths, count):
    """Mutation: inner products summed in float32; the weighted sum in float32."""
    init, policies = make_policies(count, DEGREES, lengths=lengths, drift=drift, dtype=DTYPES[dtype])
    error, rounding = errors(merging.slerp(init, policies), exact_merge(init, policies), DTYPES[dtype])
    assert (error <= 1.001 * rounding).all(), error / rounding


# ---------------------------------------------------------------- weights of SLERP


@pytest.mark.parametrize(
    ("count", "table"),
    [
        (2, (0.7071, 0.7071)),
        (3, (0.6124, 0.6124, 0.5000)),
        (4, (0.5658, 0.5658, 0.4619, 0.3827)),
        (5, (0.5381, 0.5381, 0.4393, 0.3640, 0.3090)),
    ],
)
def test_recursion_over_orthogonal_policies(count, table):
    """Mutation: slerp weight 1 / M at every merge in place of 1 / m."""
    init, policies = vectors(*np.eye(5)[:count], init=(0.5, -1, 0.25, 2, -0.75))
    got = displacement(merging.slerp(init, policies), init)
    np.testing.assert_allclose(got[:count], table, rtol=0, atol=5.1e-5)
    np.testing.assert_allclose(merging.slerp_coefficients(np.eye(count)[None])[0], table, rtol=0, atol=5.1e-5)


ENDS = {"one": (1, {}, 0), "first": (2, {"weights": [0.0]}, 0), "second": (2, {"weights": [1.0]}, 1)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("end", ENDS)
def test_ends_are_the_policies(dtype, end):
    """Mutation: slerp weight w swapped with 1 - w; the weighted sum in float32."""
    count, options, which = ENDS[end]
    init, policies = make_policies(count, [70] * 6, lengths=UNEQUAL, dtype=DTYPES[dtype])
    assert_trees_equal(merging.slerp(init, policies, **options), policies[which])


@pytest.mark.parametrize(
    ("second", "weight", "want"),
    [
        ((0, 3), 0.2, (2 * 0.9510565, 3 * 0.3090170)),  # sin 72, sin 18 degrees
        ((0, 3), 0.8, (2 * 0.3090170, 3 * 0.9510565)),
        # 60 degrees: (sin 48, sin 12) / sin 60 = .8581095, .2400757
        ((1.5, 1.5 * math.sqrt(3)), 0.2, (2 * 0.8581095 + 1.5 * 0.2400757, 1.5 * math.sqrt(3) * 0.2400757)),
    ],
)
def test_slerp_weight_by_hand(second, weight, want):
    """Mutation: task vectors scaled to unit length, or w swapped with 1 - w."""
    init, policies = vectors((2, 0), second)
    got = displacement(merging.slerp(init, policies, weights=[weight]), init)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_weights_of_the_recursion_in_order():
    """Mutation: slerp weights taken in reverse order."""
    init, policies = vectors((2, 0, 0), (0, 2, 0), (0, 0, 2), init=(0.5, -1, 4))
    got = displacement(merging.slerp(init, policies, weights=[0.2, 0.6]), init)
    cosines = np.cos(np.radians([18, 72, 54, 36]))  # sin 72, sin 18; sin 36, sin 54
    want = (2 * cosines[0] * cosines[2], 2 * cosines[1] * cosines[2], 2 * cosines[3])
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("degrees", [20, 70, 130])
def test_equal_lengths_are_kept(degrees):
    """Mutation: LERP in place of SLERP."""
    radians = math.radians(degrees)
    init, policies = vectors((3, 0), (3 * math.cos(radians), 3 * math.sin(radians)), init=(0, 0))
    for weight in (0.2, 0.5, 0.7):
        merged = merging.slerp(init, policies, weights=[weight])
        np.testing.assert_allclose(np.linalg.norm(displacement(merged, init)), 3, rtol=3e-7)


@pytest.mark.parametrize("degrees", [40, 90, 130])
def test_slerp_at_half_is_lerp_over_cos_of_half_the_angle(degrees):
    """Mutation: the angle halved or doubled; LERP weights that do not add up to 1."""
    radians = math.radians(degrees)
    init, policies = vectors((1, 0), (3 * math.cos(radians), 3 * math.sin(radians)), init=(0, 0))
    slerp, lerp = merging.slerp(init, policies), merging.lerp(init, policies)
    want = displacement(lerp, init) / math.cos(radians / 2)
    np.testing.assert_allclose(displacement(slerp, init), want, rtol=1e-6)


@pytest.mark.parametrize(
    ("weights", "want"), [(None, (1, 3)), ([0.25, 0.75], (0.5, 4.5)), ([0.5, 0.25], (1, 1.5)), ([0, 0], (0, 0))]
)
def test_lerp_by_hand(weights, want):
    """Mutation: weights in reverse order, or scaled to add up to 1."""
    init, policies = vectors((2, 0), (0, 6))
    np.testing.assert_allclose(displacement(merging.lerp(init, policies, weights), init), want, rtol=1e-6)


# ---------------------------------------------------------------- units

TOKEN_MIXING = ["0/attn", "1/attn", "2/attn"]
GROUPS = {
    "layer": BY_LAYER,
    "tensor": [[name] for name in SIZES],
    "model": [list(SIZES)],
    "function": [TOKEN_MIXING, [name for name in SIZES if name not in TOKEN_MIXING]],
}


def two_policies_with_an_angle_for_each_piece():
    rng = np.random.default_rng(3)
    init, first, second = {}, {}, {}
    for k, (name, size) in enumerate(SIZES.items()):
        init[name], a, b = rng.normal(size=(3, size))
        first[name] = init[name] + (1 + 0.1 * k) * a
        second[name] = init[name] + a * math.cos(0.3 * k) + b * math.sin(0.3 * k)
    return [tree_of(x, jnp.float32) for x in (init, first, second)]


@pytest.mark.parametrize("kind", GROUPS)
def test_a_unit_shares_one_angle(kind):
    """Mutation: another grouping of the leaves; the first layer's angle for all layers of a stacked leaf."""
    init, *policies = two_policies_with_an_angle_for_each_piece()
    unit = (lambda name: "attn" in name) if kind == "function" else kind
    merged = pieces_of(merging.slerp(init, policies, weights=[0.3], unit=unit))
    distance = {
        other: size_of(minus(merged, exact_merge(init, policies, groups, [0.3]))) for other, groups in GROUPS.items()
    }
    size = size_of(merged)
    assert distance.pop(kind) < 1e-7 * size
    assert min(distance.values()) > 1e-3 * size


def test_the_layer_is_the_default_unit():
    """Mutation: default unit 'tensor' or 'model'."""
    init, *policies = two_policies_with_an_angle_for_each_piece()
    merged = pieces_of(merging.slerp(init, policies))
    assert size_of(minus(merged, exact_merge(init, policies))) < 1e-7 * size_of(merged)
    names = merging.gram(init, policies).names
    assert sorted(names) == ["embed", "final_norm", "head", "layers/0", "layers/1", "layers/2"]


def unstacked(tree):
    layers = [jax.tree.map(lambda x, i=i: x[i], tree["layers"]) for i in range(LAYERS)]
    return tree | {"layers": {str(i): layer for i, layer in enumerate(layers)}}


@pytest.mark.parametrize("unit", ["layer", "tensor", "model"])
def test_stacked_layers_merge_as_unstacked(unit):
    """Mutation: a stacked leaf taken as one unit."""
    init, *policies = two_policies_with_an_angle_for_each_piece()
    options = {"unit": unit, "weights": [0.3]}
    stacked = merging.slerp_liti(init, policies, 0.7, **options)
    apart = merging.slerp_liti(unstacked(init), [unstacked(p) for p in policies], 0.7, **options)
    assert_trees_close(unstacked(stacked), apart, atol=5e-7)  # 1e-7 of weights that reach 6


def test_gram_norms_and_angles_by_hand():
    """Mutation: angle of the unnormalised product; length without the square root; full weights for task vectors."""
    init, policies = vectors((3, 0), (2, 2), (0, 0))
    matrix, names = merging.gram(init, policies)
    assert names == ("w",)
    np.testing.assert_array_equal(matrix, [[[9, 6, 0], [6, 8, 0], [0, 0, 0]]])
    np.testing.assert_allclose(merging.norms(matrix), [[3, math.sqrt(8), 0]], rtol=1e-7)
    angles = np.degrees(merging.angles(matrix))
    np.testing.assert_allclose(angles, [[[0, 45, 0], [45, 0, 0], [0, 0, 0]]], rtol=1e-6, atol=1e-5)


def test_task_vector_in_float32():
    """Mutation: init - params; the difference taken in bfloat16."""
    init = {"w": jnp.array([256.0, -2], jnp.bfloat16)}
    params = {"w": jnp.array([0.5, 1], jnp.bfloat16)}
    got = merging.task_vector(params, init)["w"]
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, [-255.5, 3])


# ---------------------------------------------------------------- the symmetric variant


def test_symmetric_at_two_equal_lengths_is_slerp():
    """Mutation: LERP's coefficients 1 / M."""
    init, policies = make_policies(2, [50] * 6, drift=0.01)
    got = merging.symmetric_slerp(init, policies)
    assert_trees_close(got, merging.slerp(init, policies), atol=1e-8)


@pytest.mark.parametrize("order", [(1, 2, 0), (2, 1, 0)])
def test_symmetric_has_no_order(order):
    """Mutation: `symmetric` ignored; the length of the first policy for the mean length."""
    init, policies = vectors((3, 0), (0, 1), (-1, 1))
    got = displacement(merging.symmetric_slerp(init, [policies[m] for m in order]), init)
    np.testing.assert_allclose(np.linalg.norm(got), (3 + 1 + math.sqrt(2)) / 3, rtol=1e-6)
    np.testing.assert_allclose(got[0], got[1], rtol=1e-6)  # along the sum, (2, 2)
    recursion = displacement(merging.slerp(init, policies), init)
    assert abs(recursion[0] - recursion[1]) > 0.1


# ---------------------------------------------------------------- LITI

LITI_BY_HAND = [(0.0, (1, -2)), (0.3, (1.3, -0.2)), (1.0, (2, 4)), (1.41, (2.41, 6.46))]


@pytest.mark.parametrize(("rate", "want"), LITI_BY_HAND)
def test_liti_by_hand(rate, want):
    """Mutation: rate swapped with 1 - rate; rate clipped to 1."""
    init, merged = {"w": jnp.array([1.0, -2])}, {"w": jnp.array([2.0, 4])}
    np.testing.assert_allclose(merging.liti(init, merged, rate)["w"], want, rtol=1e-6)
    np.testing.assert_allclose(merging.slerp_liti(init, [merged], rate)["w"], want, rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ends_of_liti_and_lerp_are_the_trees(dtype):
    """Mutation: the sum of `liti`, or of `lerp`, in float32."""
    init, (first, second) = make_policies(2, [70] * 6, lengths=UNEQUAL, dtype=DTYPES[dtype])
    assert_trees_equal(merging.liti(init, first, 0.0), init)
    assert_trees_equal(merging.liti(init, first, 1.0), first)
    assert_trees_equal(merging.lerp(init, [first, second], [0, 1]), second)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("rate", [0.3, 1.41])
def test_slerp_liti_is_liti_after_slerp(rate, symmetric):
    """Mutation: the rate applied to the first policy only, or twice."""
    init, policies = make_policies(3, [80] * 6, lengths=UNEQUAL)
    method = "slerp_symmetric" if symmetric else "slerp"
    merged = merging.merge(init, policies, method)
    got = merging.merge(init, policies, method, liti_rate=rate)
    assert_trees_close(got, merging.liti(init, merged, rate), atol=1.5e-8)  # 2 ulp of the largest weight


@pytest.mark.parametrize("rate", [0.3, 1.41])
def test_slerp_liti_is_exact_up_to_one_rounding(rate):
    """Mutation: the rate applied to init too."""
    init, policies = make_policies(3, [80] * 6, lengths=UNEQUAL, dtype=jnp.bfloat16)
    merged = merging.slerp_liti(init, policies, rate)
    error, rounding = errors(merged, exact_merge(init, policies, rate=rate), jnp.bfloat16)
    assert (error <= 1.001 * rounding).all(), error / rounding


# ---------------------------------------------------------------- EMA


def test_ema_closed_form():
    """Mutation: rate swapped with 1 - rate; an anchor that never moves."""
    rate, steps = 0.01, 200
    rng = np.random.default_rng(1)
    start, goal = rng.normal(0, 0.02, (2, 500))
    policies = [start + 0.02 * t / steps * goal + rng.normal(0, 1e-5, 500) for t in range(1, steps + 1)]
    policies = [np.float32(p) for p in [start, *policies]]
    anchor = {"w": jnp.array(policies[0])}
    for policy in policies[1:]:
        anchor = merging.ema_update(anchor, {"w": jnp.array(policy)}, rate)
    past = (1 - rate) ** np.arange(steps, -1, -1) * np.where(np.arange(steps + 1) > 0, rate, 1)
    want = past @ wide(policies)
    assert np.linalg.norm(wide(anchor["w"]) - want) < 1e-6 * np.linalg.norm(want)
    assert np.linalg.norm(want - wide(policies[0])) > 1e-3 * np.linalg.norm(want)  # it has moved


@pytest.mark.parametrize(("rate", "want"), [(0.01, 1.02), (0.3, 1.6), (1.0, 3.0)])
def test_ema_rate_weighs_the_new_weights(rate, want):
    """Mutation: rate swapped with 1 - rate."""
    old, new = {"w": jnp.array([1.0])}, {"w": jnp.array([3.0])}
    np.testing.assert_allclose(merging.ema_update(old, new, rate)["w"], [want], rtol=1e-6)
    np.testing.assert_allclose(jax.jit(merging.ema_update)(old, new, jnp.float32(rate))["w"], [want], rtol=1e-6)


def test_ema_rate_zero_freezes():
    """Mutation: a floor of 1e-6 under the rate."""
    anchor, (policy,) = make_policies(1, [0] * 6)
    assert_trees_equal(merging.ema_update(anchor, policy, 0.0), anchor)
    assert_trees_equal(jax.jit(merging.ema_update)(anchor, policy, jnp.float32(0)), anchor)


def test_float32_anchor_follows_bfloat16_params():
    """Mutation: the result in the dtype of params, where 1.000625 rounds to 1; the sum in bfloat16."""
    anchor, params = {"w": jnp.ones(3, jnp.float32)}, {"w": jnp.full(3, 1.0625, jnp.bfloat16)}
    for _ in range(100):
        anchor = merging.ema_update(anchor, params, 0.01)
    assert anchor["w"].dtype == jnp.float32
    np.testing.assert_allclose(anchor["w"], np.full(3, 1 + 0.0625 * (1 - 0.99**100)), rtol=2e-6)


# ---------------------------------------------------------------- degenerate task vectors


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(
    ("first", "second", "want"),
    [
        ((0, 0), (2, -1), (0.4, -0.2)),
        ((2, -1), (0, 0), (1.6, -0.8)),
        ((0, 0), (0, 0), (0, 0)),
        ((2, -1), (2, -1), (2, -1)),
        ((1, 0.5), (3, 1.5), (1.4, 0.7)),
    ],
)
def test_zero_and_parallel_task_vectors_are_lerped(first, second, want, jit):
    """Mutation: no guard on a zero sine or on a zero length."""
    init, policies = vectors(first, second)
    merge = lambda a, b: merging.slerp(a, b, weights=[0.2])  # noqa: E731
    merged = jax.jit(merge)(init, policies) if jit else merge(init, policies)
    np.testing.assert_allclose(displacement(merged, init), want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("rows", [[(0, 0)] * 3, [(3, 1.5)] * 3, [(0, 0), (3, 1.5), (6, 3)]])
def test_zero_and_parallel_task_vectors_are_averaged_when_symmetric(rows):
    """Mutation: no guard on a zero length."""
    init, policies = vectors(*rows)
    got = displacement(merging.symmetric_slerp(init, policies), init)
    np.testing.assert_allclose(got, np.mean(rows, axis=0), rtol=1e-6, atol=1e-7)


OPPOSITE = {
    "pair": (((1, 0.5), (-2, -1)), False),
    "third": (((1, 0), (0, 0), (-0.5, 0)), False),
    "symmetric": (((3, 0), (-1, 2), (-2, -2)), True),  # they add up to zero
}


def opposite_in_one_unit(kind):
    rows, symmetric = OPPOSITE[kind]
    init, policies = vectors(*rows)
    ordinary = [{"v": jnp.array([1.0, m])} for m in range(len(rows))]
    init, policies = init | {"v": jnp.zeros(2)}, [a | b for a, b in zip(policies, ordinary, strict=True)]
    return init, policies, symmetric


@pytest.mark.parametrize("kind", OPPOSITE)
def test_opposite_task_vectors_raise_with_the_unit(kind):
    """Mutation: the check left out; all units named."""
    init, policies, symmetric = opposite_in_one_unit(kind)
    with pytest.raises(ValueError, match=r"opposite .* in w, where"):
        (merging.symmetric_slerp if symmetric else merging.slerp)(init, policies)


@pytest.mark.parametrize("kind", OPPOSITE)
def test_opposite_task_vectors_give_nan_inside_jit(kind):
    """Mutation: opposite task vectors merged by LERP; NaN for all units."""
    init, policies, symmetric = opposite_in_one_unit(kind)
    merged = jax.jit(merging.symmetric_slerp if symmetric else merging.slerp)(init, policies)
    assert np.isnan(merged["w"]).all()
    assert np.isfinite(merged["v"]).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_raise_with_the_unit(bad):
    """Mutation: the Gram matrix not checked."""
    init, policies = vectors((1, bad), (0, 2))
    with pytest.raises(ValueError, match=r"NaN or Inf in .* of w;"):
        merging.slerp(init, policies)


# ---------------------------------------------------------------- wrong input

MERGES = {
    "slerp": lambda init, policy: merging.slerp(init, [init, policy]),
    "lerp": lambda init, policy: merging.lerp(init, [init, policy]),
    "liti": lambda init, policy: merging.liti(init, policy, 0.3),
    "gram": lambda init, policy: merging.gram(init, [init, policy]),
    "task_vector": lambda init, policy: merging.task_vector(policy, init),
}
WRONG = {
    "missing": ({"a": {"x": jnp.ones(2)}}, "'b' is missing"),
    "extra": ({"a": {"x": jnp.ones(2)}, "b": jnp.ones((2, 3)), "c": jnp.ones(1)}, "'c' is not in"),
    "renamed": ({"a": {"y": jnp.ones(2)}, "b": jnp.ones((2, 3))}, "'a/x' is missing"),
    "transposed": ({"a": {"x": jnp.ones(2)}, "b": jnp.ones((3, 2))}, r"'b' has shape \(3, 2\), want \(2, 3\)"),
    "broadcastable": ({"a": {"x": jnp.ones(1)}, "b": jnp.ones((2, 3))}, r"'a/x' has shape \(1,\), want \(2,\)"),
}


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("wrong", WRONG)
def test_trees_that_differ_raise_with_the_leaf(merge, wrong):
    """Mutation: the check of one function left out."""
    init = {"a": {"x": jnp.zeros(2)}, "b": jnp.zeros((2, 3))}
    policy, message = WRONG[wrong]
    with pytest.raises(ValueError, match=message):
        MERGES[merge](init, policy)


def test_the_wrong_policy_is_named():
    """Mutation: the policies counted from 1, or only the first one checked."""
    init, policies = vectors((1, 0), (0, 1), (1, 1))
    policies[2] = {"w": jnp.zeros(3)}
    with pytest.raises(ValueError, match="policy 2: leaf 'w'"):
        merging.slerp(init, policies)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": [0.2]}, "weights: got 1 for 3 policies, want 2"),
        ({"weights": [0.2, 0.3, 0.5]}, "weights: got 3 for 3 policies, want 2"),
        ({"unit": "head"}, "unit: got 'head'"),
    ],
)
def test_wrong_options_raise(options, message):
    """Mutation: surplus weights dropped; an unknown unit taken as 'layer'."""
    init, policies = vectors((1, 0), (0, 1), (1, 1))
    with pytest.raises(ValueError, match=message):
        merging.slerp(init, policies, **options)


@pytest.mark.parametrize("weights", [[0.5], [0.2, 0.3, 0.5]])
def test_wrong_lerp_weights_raise(weights):
    """Mutation: the count of weights not checked."""
    init, policies = vectors((1, 0), (0, 1))
    with pytest.raises(ValueError, match=f"weights: got {len(weights)} for 2 policies"):
        merging.lerp(init, policies, weights)


@pytest.mark.parametrize("merge", [merging.slerp, merging.lerp, merging.gram])
def test_no_policy_raises(merge):
    """Mutation: the count of policies not checked."""
    with pytest.raises(ValueError, match="policies: got none"):
        merge({"w": jnp.zeros(2)}, [])


# ---------------------------------------------------------------- structure, dtype, sharding, purity

FUNCTIONS = {
    "slerp": lambda init, a, b: merging.slerp(init, [a, b], weights=[0.3]),
    "symmetric": lambda init, a, b: merging.symmetric_slerp(init, [a, b]),
    "karcher": lambda init, a, b: merging.karcher(init, [a, b, merging.lerp(init, [a, b], [0.9, 0.4])]),
    "full_weights": lambda init, a, b: merging.slerp_full_weights(init, [a, b], weights=[0.3], liti_rate=0.3),
    "slerp_liti": lambda init, a, b: merging.slerp_liti(init, [a, b], 0.3),
    "lerp": lambda init, a, b: merging.lerp(init, [a, b], [0.2, 0.7]),
    "liti": lambda init, a, b: merging.liti(init, b, 0.3),
    "ema": lambda init, a, b: merging.ema_update(a, b, 0.01),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_structure_and_dtypes_are_kept(name):
    """Mutation: the result in float32, or in the dtype of init_params."""
    tree = lambda x: {"a": (jnp.full(2, x, jnp.bfloat16), [jnp.full((2, 3), x)]), "b": jnp.float16([x, 1])}  # noqa: E731
    init = jax.tree.map(lambda x: x.astype(jnp.float32), tree(0.5))
    merged = FUNCTIONS[name](init, tree(2.0), tree(3.0))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), merged) == jax.tree.map(lambda x: (x.shape, x.dtype), tree(2.0))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_jit_changes_nothing(name):
    """Mutation: the float64 sums only outside jit."""
    init, (a, b) = make_policies(2, [0.01] * 6, lengths=UNEQUAL, drift=0.01)
    got, want = jax.jit(FUNCTIONS[name])(init, a, b), FUNCTIONS[name](init, a, b)
    assert_trees_close(got, want, atol=1.5e-8)


def test_traced_rate():
    """Mutation: float(liti_rate)."""
    init, (a, b) = make_policies(2, [80] * 6)
    got = jax.jit(lambda rate: merging.slerp_liti(init, [a, b], rate))(jnp.float32(0.3))
    assert_trees_close(got, merging.slerp_liti(init, [a, b], 0.3), atol=1.5e-8)


def place(tree):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))
    specs = {1: P("model"), 2: P("data", "model"), 3: P(None, "data", "model")}
    specs = jax.tree.map(lambda x: specs[x.ndim], tree)
    specs["layers"]["norm"]["kernel"] = P(None, "data")
    return jax.device_put(tree, jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs))


@pytest.mark.parametrize(("name", "jit"), [*((name, False) for name in FUNCTIONS), ("slerp", True), ("ema", True)])
def test_sharding_is_kept_and_changes_nothing(name, jit):
    """Mutation: the result on one device; inner products of the first shard only."""
    assert jax.device_count() == 8
    init, (a, b) = make_policies(2, [80] * 6, lengths=UNEQUAL, drift=0.01)
    function = jax.jit(FUNCTIONS[name]) if jit else FUNCTIONS[name]
    merged = function(place(init), place(a), place(b))
    jax.tree.map(lambda x, like: x.sharding.is_equivalent_to(like.sharding, x.ndim) or pytest.fail(x), merged, place(a))
    assert_trees_close(merged, FUNCTIONS[name](init, a, b), atol=1.5e-8)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_inputs_are_left_alone(name):
    """Mutation: the first policy's or the anchor's buffer donated; a numpy leaf changed in place."""
    init, (a, b) = make_policies(2, [80] * 6)
    before = jax.tree.map(np.array, (init, a, b))
    numpy = jax.tree.map(np.array, (init, a, b))
    FUNCTIONS[name](init, a, b)
    FUNCTIONS[name](*numpy)
    assert_trees_equal((init, a, b), before)
    assert_trees_equal(numpy, before)


@pytest.mark.parametrize(
    ("use", "unwanted"),
    [
        ("", "jax flax orbax warp_jax.storage warp_jax.parallel"),
        ("merging.slerp", "flax orbax warp_jax.storage warp_jax.parallel"),
        ("import warp_jax.merging.on_disk", "jax flax orbax"),
    ],
)
def test_imports_are_light(use, unwanted):
    """Mutation: merging imports on_disk; its package imports in_memory at once, or coefficients imports jax.numpy."""
    program = f"import sys; from warp_jax import merging; {use}\nprint(*sys.modules.keys() & set('{unwanted}'.split()))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []
