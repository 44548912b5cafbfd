"""Damaged and foreign Hugging Face folders: one line that names the file and the tensor, and no traceback."""

import json
import pickle
import re

import hf_models
import jax
import pytest
from hf_models import IDS, MASK
from safetensors.torch import load_file, save_file

from warp_jax.models import partitioning
from warp_jax.models.transformer import Transformer
from warp_jax.parallel import meshes
from warp_jax.pretrained import hf_weights
from warp_jax.pretrained.hf_config import read_config

WEIGHTS = "model.safetensors"
QUERY, KEY = (f"model.layers.1.self_attn.{x}_proj.weight" for x in "qk")


@pytest.fixture
def folder(tmp_path):
    """A sound Llama with an untied head: width 32, 4 heads of 8, 2 key-value heads, 2 layers."""
    return hf_models.make_folder("llama2", tmp_path / "model")


def load(folder, config=None):
    config = config or read_config(folder)
    shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0), IDS, MASK)["params"]
    places = partitioning.param_shardings(meshes.make_mesh((1, 1, 1), jax.devices()[:1]), shapes)
    like = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places)
    return hf_weights.load_params(folder, config, like)


def refusal(folder):
    """The one line with which a folder is refused."""
    with pytest.raises(ValueError, match=re.escape(str(folder))) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def change_weights(folder, change):
    """Save the weights again, changed in place by a function of {name: tensor}."""
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, {"format": "pt"})


def test_a_sound_folder_loads(folder):
    """Fails if the folder that the other tests damage is refused as it is."""
    assert load(folder)["embed"]["embedding"].shape == (80, 32)


def test_missing_tensor(folder):
    """Fails if a missing tensor is left at its initial value."""
    change_weights(folder, lambda weights: weights.pop(KEY))
    assert f"tensor {KEY!r} is missing, want shape (16, 32)" in refusal(folder)


def test_surplus_tensor(folder):
    """Fails if a tensor that the model has no place for is dropped."""
    name = "model.layers.1.self_attn.q_proj.bias"
    change_weights(folder, lambda weights: weights.update({name: hf_models.torch.ones(32)}))
    assert f"{folder / WEIGHTS}: tensor {name!r} is unexpected" in refusal(folder)


@pytest.mark.parametrize("name", ["vision_tower.x", "language_model.model.norm.weight"])
def test_tensors_of_images_in_a_model_of_text(folder, name):
    """Fails if a text model's file may hold what only models with images have."""
    change_weights(folder, lambda weights: weights.update({name: hf_models.torch.ones(32)}))
    assert f"tensor {name!r} is unexpected" in refusal(folder)


@pytest.mark.parametrize(
    ("name", "change", "got", "want"),
    [
        (KEY, lambda x: x.T.contiguous(), "(32, 16)", "(16, 32)"),
        (QUERY, lambda x: x.reshape(4, 8, 32), "(4, 8, 32)", "(32, 32)"),
        ("model.norm.weight", lambda x: x[:31].clone(), "(31,)", "(32,)"),
        ("model.embed_tokens.weight", lambda x: x.T.contiguous(), "(32, 80)", "(80, 32)"),
        ("lm_head.weight", lambda x: x[:79].clone(), "(79, 32)", "(80, 32)"),
    ],
)
def test_wrong_shape(folder, name, change, got, want):
    """Fails if a tensor of the right size but another shape is reshaped into place."""
    change_weights(folder, lambda weights: weights.update({name: change(weights[name])}))
    assert f"{folder / WEIGHTS}: tensor {name!r} has shape {got}, want {want}" in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"vocab_size": 96}, "'model.embed_tokens.weight' has shape (80, 32), want (96, 32)"),
        ({"num_hidden_layers": 3}, "'model.layers.2."),
        ({"num_hidden_layers": 1}, "'model.layers.1."),
        ({"num_key_value_heads": 4}, "k_proj.weight' has shape (16, 32), want (32, 32)"),
        ({"tie_word_embeddings": True}, "'lm_head.weight' differs"),
    ],
    ids=lambda x: x if isinstance(x, str) else "-",
)
def test_config_of_another_model(folder, changes, named):
    """Fails if weights are loaded that config.json does not fit."""
    assert named in refusal(hf_models.edit_config(folder, **changes))


def test_untied_config_without_a_head(folder):
    """Fails if a missing lm_head is replaced by the embedding although the config says that they differ."""
    change_weights(folder, lambda weights: weights.pop("lm_head.weight"))
    assert "tensor 'lm_head.weight' is missing" in refusal(folder)


def test_quantised_weights(folder):
    """Fails if integer codes are read as numbers."""
    change_weights(folder, lambda weights: weights.update({KEY: (10 * weights[KEY]).to(hf_models.torch.int8)}))
    assert f"{folder / WEIGHTS}: tensor {KEY!r} is int8" in refusal(folder)


@pytest.mark.parametrize("cut", [10, 20_000, 60_000])
def test_truncated_file(folder, cut):
    """Fails if the end of a file is not checked against its header; the last cut leaves a piece of the header."""
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: max(len(content) - cut, 100)])
    assert f"{folder / WEIGHTS}: truncated or corrupted" in refusal(folder)


@pytest.mark.parametrize("content", [b"", b"\x05", b"\xff" * 64, (8).to_bytes(8, "little") + b"{'no': 1"])
def test_no_safetensors_inside(folder, content):
    """Fails if a header that is no header leads to a traceback."""
    (folder / WEIGHTS).write_bytes(content)
    assert str(folder / WEIGHTS) in refusal(folder)


def test_missing_shard(tmp_path):
    """Fails if the folder is loaded from the shards that are there."""
    folder = hf_models.make_folder("llama2", tmp_path, max_shard_size="20KB")
    lost = sorted(folder.glob("*.safetensors"))[1]
    lost.unlink()
    assert f"{lost.name} is missing" in refusal(folder)


def test_tensor_missing_from_its_shard(tmp_path):
    """Fails if a tensor that the index promises and no shard holds goes unnoticed."""
    folder = hf_models.make_folder("llama2", tmp_path, max_shard_size="20KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    shard = folder / index[KEY]
    save_file({name: x for name, x in load_file(shard).items() if name != KEY}, shard, {"format": "pt"})
    assert f"tensor {KEY!r} is missing" in refusal(folder)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 3}'])
def test_damaged_index(tmp_path, content):
    """Fails if an index that is no index leads to a traceback."""
    folder = hf_models.make_folder("llama2", tmp_path, max_shard_size="20KB")
    (folder / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json" in refusal(folder)


def test_pickles_are_not_opened(folder):
    """Fails if a pickle is loaded, or a folder that holds nothing else is refused without saying why."""
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"model.norm.weight": 1}))
    assert "pytorch_model.bin, a pickle" in refusal(folder)


def test_no_weights(folder):
    """Fails if a folder without weights gives anything else than a line that says so."""
    (folder / WEIGHTS).unlink()
    assert "no .safetensors" in refusal(folder)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "3", '{"architectures": []}', '{"architectures": "LlamaForCausalLM"}', '{"architectures": [3]}'],
)
def test_config_that_is_no_config(folder, content):
    """Fails if a config.json of another kind leads to a traceback."""
    (folder / "config.json").write_text(content)
    assert str(folder / "config.json") in refusal(folder)


def test_no_config(folder):
    """Fails if a folder without config.json leads to a traceback."""
    (folder / "config.json").unlink()
    assert "no config.json" in refusal(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["MambaForCausalLM"]},
        {"architectures": ["Gemma3ForConditionalGeneration"]},
        {"num_attention_heads": 0},
        {"num_attention_heads": 3},
        {"num_key_value_heads": 3},
        {"hidden_size": "32"},
        {"hidden_size": None},
        {"vocab_size": -80},
        {"num_hidden_layers": 1.5},
        {"head_dim": 7},
        {"rms_norm_eps": "small"},
        {"rope_parameters": "yarn"},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 300.0}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 300.0, "factor": 8.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": "far"}},
        {"hidden_act": 3},
    ],
    ids=json.dumps,
)
def test_config_with_impossible_values(folder, changes):
    """Fails if a value of the wrong type or size is found by a traceback, or not at all."""
    message = refusal(hf_models.edit_config(folder, **changes))
    assert str(folder / "config.json") in message
