"""Safetensors and Orbax folders, against the safetensors library."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from warp_jax.storage import checkpoint, weight_files
from warp_jax.storage.weight_files import SafetensorsWriter, Tensor, open_weights

VALUES = {
    "a.weight": np.arange(12, dtype=np.float32).reshape(3, 4) / 7,
    "b": np.arange(5).astype(ml_dtypes.bfloat16),
    "ids": np.array([3, 1], np.int64),
    "scalar": np.array(2.5, np.float16),
}
DTYPES = ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "bool"]
DTYPES += [f"{kind}{size}" for kind in ("int", "uint") for size in (8, 16, 32, 64)]


def _tensors(values, file="model.safetensors"):
    return [Tensor(name, value.dtype, value.shape, file) for name, value in values.items()]


def _read(folder, name):
    tensor = folder.tensors[name]
    return folder.view(name, 0, tensor.size).reshape(tensor.shape)


def test_reads_what_safetensors_writes(tmp_path):
    """Fails when an offset, a dtype or a shape is misread."""
    safetensors.numpy.save_file(VALUES, tmp_path / "model.safetensors", {"format": "pt"})
    folder = open_weights(tmp_path)
    for name, want in VALUES.items():
        got = _read(folder, name)
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
        np.testing.assert_array_equal(got, want)
    part = folder.view("a.weight", 5, 8)
    folder.release("a.weight", 5, 8)
    np.testing.assert_array_equal(part, VALUES["a.weight"].ravel()[5:8])


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_is_that_of_torch(tmp_path, name):
    """Mutation: one of the two kinds of float8 is read as the other, or a signed integer as unsigned."""
    want = torch.tensor([0, 1, 3, 200]).to(getattr(torch, name))
    safetensors.torch.save_file({"x": want}, tmp_path / "model.safetensors")
    got = _read(open_weights(tmp_path), "x")
    assert got.dtype.name == name
    np.testing.assert_array_equal(got.astype(np.float64), want.to(torch.float64))


def test_writes_what_safetensors_reads(tmp_path):
    """Fails when the header is wrong or not a multiple of eight bytes, ranges land elsewhere, or the format that
    transformers wants is missing."""
    writer = SafetensorsWriter(tmp_path, _tensors(VALUES))
    for name, value in VALUES.items():
        flat = value.reshape(-1)
        middle = len(flat) // 2
        writer.write(name, middle, flat[middle:])
        writer.write(name, 0, flat[:middle])
    writer.close()
    assert int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little") % 8 == 0
    with safetensors.safe_open(tmp_path / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(VALUES)
        for name, want in VALUES.items():
            np.testing.assert_array_equal(file.get_tensor(name), want)


def test_several_files_and_their_index(tmp_path):
    """Fails when the index is not written or not followed: files it does not name are not weights."""
    tensors = [t._replace(file=f"model-{i}.safetensors") for i, t in enumerate(_tensors(VALUES))]
    writer = SafetensorsWriter(tmp_path, tensors)
    for name, value in VALUES.items():
        writer.write(name, 0, value.reshape(-1))
    writer.close()
    index = json.loads((tmp_path / weight_files.INDEX).read_text())
    assert index["weight_map"]["ids"] == "model-2.safetensors"
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in VALUES.values())
    (tmp_path / "other.safetensors").write_bytes(b"no weights")
    folder = open_weights(tmp_path)
    np.testing.assert_array_equal(_read(folder, "b"), VALUES["b"])
    assert [p.name for p in folder.weight_paths()] == [f"model-{i}.safetensors" for i in range(4)]


def test_orbax_checkpoints(tmp_path):
    """Fails when leaves are renamed, or stacked layers are not seen."""
    params = {"embed": {"embedding": jnp.ones((4, 2))}, "layers": {"mlp": jnp.arange(24.0).reshape(3, 4, 2)}}
    checkpoint.save_params(tmp_path / "params", params)
    folder = open_weights(tmp_path / "params")
    assert {name: t.num_layers for name, t in folder.tensors.items()} == {"embed/embedding": 1, "layers/mlp": 3}
    np.testing.assert_array_equal(_read(folder, "layers/mlp"), params["layers"]["mlp"])
    assert folder.view("layers/mlp", 9, 11).tolist() == [9.0, 10.0]


def _damage(path, kind):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length]
    path.write_bytes(
        {
            "cut in the data": data[:-3],
            "cut in the header": data[: 8 + length // 2],
            "empty": b"",
            "no JSON": data[:8] + b"?" + data[9:],
            "huge header": (2**60).to_bytes(8, "little") + data[8:],
            "wrong shape": data.replace(b"[3,4]", b"[3,5]"),
            "a list": data[:8] + b"[]".ljust(len(header)) + data[8 + length :],
        }[kind]
    )


KINDS = ["cut in the data", "cut in the header", "empty", "no JSON", "huge header", "wrong shape"]


@pytest.mark.parametrize("kind", [*KINDS, "a list"])
def test_damaged_files_are_refused(tmp_path, kind):
    """Fails when a truncated or corrupted file is read as weights."""
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(VALUES, path)
    _damage(path, kind)
    with pytest.raises(ValueError, match=r"model.safetensors: (truncated|corrupted)"):
        open_weights(tmp_path)


def test_folders_without_weights_are_refused(tmp_path):
    """Fails when a pickle is read, a missing file passes, or an index names a file that is not there."""
    with pytest.raises(ValueError, match="no such folder"):
        open_weights(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"contains no .safetensors file"):
        open_weights(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"pytorch_model.bin, a pickle"):
        open_weights(tmp_path)
    (tmp_path / weight_files.INDEX).write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(ValueError, match=r"gone.safetensors is missing"):
        open_weights(tmp_path)
    (tmp_path / weight_files.INDEX).write_text("[1]")
    with pytest.raises(ValueError, match=r"index\.json: broken JSON: got list"):
        open_weights(tmp_path)


FP8 = np.ones((2, 2), ml_dtypes.float8_e4m3fn)
ONES = np.ones((2, 2), np.float32)


@pytest.mark.parametrize(
    "tensors",
    [
        {"logit_scale": ONES, "logit_bias": ONES, "text_model.embeddings.position_ids": np.arange(4)},
        {"h.0.attn.scale": ONES, "h.0.attn.qkv.weight": ONES, "h.0.attn.mask": np.ones(3, bool)},
        {"layers.0.router.scale": ONES, "layers.0.layer_scale_1": ONES, "layers.0.per_expert_scales": ONES},
        {"transformer_blocks": ONES},
        {"x.weight": FP8},
    ],
)
def test_scales_of_sound_models_are_weights(tmp_path, tensors):
    """Mutation: a tensor is taken for a scale of codes by its name alone."""
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    assert open_weights(tmp_path).tensors.keys() == tensors.keys()


@pytest.mark.parametrize(
    "tensors",
    [
        {"x.weight": ONES, "x.weight_scale": ONES},
        {"x.weight": ONES, "x.input_scale": ONES},
        {"x.weight": FP8, "x.scale": ONES},
        {"x.weight": FP8, "x.scale_weight": ONES},
        {"experts.up": FP8, "experts.up_scale_inv": ONES},
        {"experts.up_blocks": ONES.astype(np.uint8), "experts.up_scales": ONES.astype(np.uint8)},
    ],
)
def test_scales_of_codes_are_refused(tmp_path, tensors):
    """Mutation: codes are read as numbers, without their scales."""
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"scale.* quantised weights are not supported"):
        open_weights(tmp_path)
