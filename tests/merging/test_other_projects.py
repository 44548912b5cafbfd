"""Merging the parameter trees of MaxText, Tunix and Hugging Face, against the same weights as one dict per layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from warp_jax import merging
from warp_jax.merging import on_disk
from warp_jax.storage import checkpoint

LAYERS, WIDTH = 3, 4


def _layer_by_layer(seed, start=None):
    """Weights by Hugging Face name, float32; moved a little from `start`."""
    rng = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (7, WIDTH), "model.norm.weight": (WIDTH,)}
    for i in range(LAYERS):
        shapes[f"model.layers.{i}.mlp.up_proj.weight"] = (2 * WIDTH, WIDTH)
        shapes[f"model.layers.{i}.input_layernorm.weight"] = (WIDTH,)
    scale = 1.0 if start is None else 0.1
    return {
        name: np.float32(rng.normal(0, scale, shape) + (0 if start is None else start[name]))
        for name, shape in shapes.items()
    }


def _exact(init, policies, weight, rate):
    """SLERP of two policies per layer in float64, by Hugging Face name."""
    merged = {}
    units = [["model.embed_tokens.weight"], ["model.norm.weight"]]
    units += [[name for name in init if f".{i}." in name] for i in range(LAYERS)]
    for names in units:
        start, first, second = (np.concatenate([np.float64(w[n]).ravel() for n in names]) for w in (init, *policies))
        a, b = first - start, second - start
        angle = np.arccos(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
        moved = rate * (np.sin((1 - weight) * angle) * a + np.sin(weight * angle) * b) / np.sin(angle)
        parts = np.split(start + moved, np.cumsum([init[n].size for n in names])[:-1])
        merged |= {n: part.reshape(init[n].shape) for n, part in zip(names, parts, strict=True)}
    return merged


def _stack(weights, kind, axis):
    rows = [weights[f"model.layers.{i}.{kind}.weight"] for i in range(LAYERS)]
    return jnp.asarray(np.stack([row.T for row in rows], axis))


def _maxtext(weights):
    """MaxText with scan_layers: kernels [in, L, out] and scales [D, L] (param_scan_axis=1)."""
    layers = {
        "mlp": {"wi_0": {"kernel": _stack(weights, "mlp.up_proj", 1)}},
        "pre_self_attention_layer_norm": {"scale": _stack(weights, "input_layernorm", 1)},
    }
    decoder = {"layers": layers, "decoder_norm": {"scale": jnp.asarray(weights["model.norm.weight"])}}
    embedder = {"embedding": jnp.asarray(weights["model.embed_tokens.weight"])}
    return {"params": {"decoder": decoder, "token_embedder": embedder}}


@pytest.mark.parametrize("in_jit", [False, True])
def test_maxtext(in_jit):
    """Fails when the first axis of a stack is taken for the layers, in the sums or in the mixture."""
    init = _layer_by_layer(0)
    policies = [_layer_by_layer(seed, init) for seed in (1, 2)]
    trees = [_maxtext(weights) for weights in (init, *policies)]
    inner = merging.gram(trees[0], trees[1:], layer_axis=1)
    layers = {f"params/decoder/layers/{i}" for i in range(LAYERS)}
    assert set(inner.names) == {*layers, "params/decoder/decoder_norm", "params/token_embedder"}
    merge = lambda *trees: merging.slerp_liti(trees[0], trees[1:], 0.3, weights=[0.2], layer_axis=1)  # noqa: E731
    merged = (jax.jit(merge) if in_jit else merge)(*trees)
    want = _maxtext(_exact(init, policies, 0.2, 0.3))
    jax.tree.map(lambda got, exact: np.testing.assert_allclose(got, exact, rtol=0, atol=1e-6), merged, want)


def _three():
    """Init and two policies, as MaxText trees with a second kernel, whose input has another size."""
    init = _layer_by_layer(0)
    found = [_maxtext(weights) for weights in (init, _layer_by_layer(1, init), _layer_by_layer(2, init))]
    for tree in found:
        mlp = tree["params"]["decoder"]["layers"]["mlp"]
        mlp["wo"] = jax.tree.map(lambda kernel: jnp.swapaxes(kernel, 0, 2), mlp["wi_0"])
    return found


def test_a_forgotten_axis_is_refused():
    """Fails when the rows of a MaxText kernel are taken for its layers."""
    first, second, third = _three()
    with pytest.raises(ValueError, match=r"^layer_axis: got 0, .* has 4 layers .* has 8; .*: 1$"):
        merging.slerp(first, [second, third])


def test_a_merge_without_units_needs_no_axis():
    """Fails when LERP, whose coefficients are the same in every layer, refuses a tree without its axis."""
    first, second, third = _three()
    found, want = (merging.lerp(first, [second, third], layer_axis=axis) for axis in (0, 1))
    jax.tree.map(np.testing.assert_array_equal, found, want)


def test_a_forgotten_axis_is_refused_on_disk(tmp_path):
    """Fails when scripts/merge.py takes the rows of a MaxText kernel for its layers."""
    for number, tree in enumerate(_three()):
        checkpoint.save_params(tmp_path / str(number), tree)
    with pytest.raises(ValueError, match=r"0: layer_axis: got 0, .*: 1; merge such weights in memory"):
        on_disk.merge_folders(tmp_path / "0", [tmp_path / "1", tmp_path / "2"], tmp_path / "out", on_disk.Settings())


def test_a_leaf_without_the_axis_is_refused():
    """Fails when a vector for each layer, stacked on axis 0, ends in an IndexError."""
    tree = {"layers": {"scale": jnp.ones(3)}}
    with pytest.raises(ValueError, match=r"layer_axis: got 1, want an axis of leaf 'layers/scale' of shape \(3,\)"):
        merging.slerp(tree, [tree, tree], layer_axis=1)


class _Norm(nnx.Module):
    def __init__(self, weights):
        self.w = nnx.Param(jnp.asarray(weights))


class _DecoderLayer(nnx.Module):
    def __init__(self, weights, number, rngs):
        self.input_layernorm = _Norm(weights[f"model.layers.{number}.input_layernorm.weight"])
        self.mlp = nnx.Linear(WIDTH, 2 * WIDTH, use_bias=False, rngs=rngs)
        self.mlp.kernel[...] = jnp.asarray(weights[f"model.layers.{number}.mlp.up_proj.weight"].T)


class _TunixModel(nnx.Module):
    """The tree of Tunix's Llama: a list of layers, `w` for norms, and a stream of random numbers."""

    def __init__(self, weights):
        rngs = nnx.Rngs(0)
        self.embedder = _Norm(weights["model.embed_tokens.weight"])
        self.layers = nnx.List([_DecoderLayer(weights, i, rngs) for i in range(LAYERS)])
        self.final_norm = _Norm(weights["model.norm.weight"])
        self.dropout = nnx.Dropout(0.1, rngs=rngs)


def test_tunix():
    """Fails when nnx's paths hide the layers, the random numbers are merged, or the state does not fit its module."""
    init = _layer_by_layer(0)
    policies = [_layer_by_layer(seed, init) for seed in (1, 2)]
    graph, start, rest = nnx.split(_TunixModel(init), nnx.Param, ...)
    states = [nnx.state(_TunixModel(weights), nnx.Param) for weights in policies]
    layers = {f"layers/{i}" for i in range(LAYERS)}
    assert set(merging.gram(start, states).names) == {*layers, "embedder/w", "final_norm/w"}
    model = nnx.merge(graph, merging.slerp_liti(start, states, 0.3, weights=[0.2]), rest)
    want = _exact(init, policies, 0.2, 0.3)
    for i, layer in enumerate(model.layers):
        np.testing.assert_allclose(layer.mlp.kernel[...], want[f"model.layers.{i}.mlp.up_proj.weight"].T, atol=1e-6)
        np.testing.assert_allclose(
            layer.input_layernorm.w[...], want[f"model.layers.{i}.input_layernorm.weight"], atol=1e-6
        )
    np.testing.assert_allclose(model.final_norm.w[...], want["model.norm.weight"], atol=1e-6)


def test_hugging_face(tmp_path):
    """Fails when dots in flat names hide the layers, or numpy arrays are not merged."""
    init = _layer_by_layer(0)
    models = [init, *(_layer_by_layer(seed, init) for seed in (1, 2))]
    for number, weights in enumerate(models):
        safetensors.numpy.save_file(weights, tmp_path / f"{number}.safetensors")
    start, *policies = (safetensors.numpy.load_file(tmp_path / f"{number}.safetensors") for number in range(3))
    layers = {f"model.layers.{i}" for i in range(LAYERS)}
    names = {*layers, "model.embed_tokens.weight", "model.norm.weight"}
    assert set(merging.gram(start, policies).names) == names
    merged = merging.slerp_liti(start, policies, 0.3, weights=[0.2])
    safetensors.numpy.save_file(jax.tree.map(np.asarray, merged), tmp_path / "merged.safetensors")
    for name, want in _exact(models[0], models[1:], 0.2, 0.3).items():
        np.testing.assert_allclose(merged[name], want, rtol=0, atol=1e-6)
