"""Damaged and foreign Hugging Face folders: one line that names the file and the tensor, and no traceback."""

import json
import os
import pickle
import re
import shutil

import hf_models
import jax
import pytest
from hf_models import IDS, MASK
from safetensors.torch import load_file, save_file

from warp_jax.merging.on_disk import Settings, merge_folders
from warp_jax.models import partitioning
from warp_jax.models.transformer import Transformer
from warp_jax.parallel import meshes
from warp_jax.pretrained import hf_weights
from warp_jax.pretrained.hf_config import read_config
from warp_jax.storage.model_files import INDEX
from warp_jax.storage.weight_files import open_weights

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
    assert f"{folder / WEIGHTS}: tensor {KEY!r} (int8): quantised weights are not supported" in refusal(folder)


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


# ---------------------------------------------------------------- folders that no door accepts


def header(folder, entries, data=b"", text=None):
    """Write model.safetensors with this header (an object, or a text of its own) and data."""
    text = json.dumps(entries).encode() if text is None else text
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data)


def entry(dtype="F32", shape=(2,), data_offsets=(0, 8), **others):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(data_offsets), **others}


def one(name="x", data=bytes(8), **fields):
    """A file of one tensor whose entry has these fields."""
    return lambda folder: header(folder, {name: {**entry(), **fields}}, data)


def two(*offsets):
    """A file of two tensors of 8 bytes each at these offsets."""
    return lambda folder: header(folder, {str(i): entry(data_offsets=x) for i, x in enumerate(offsets)}, bytes(16))


def raw(text):
    return lambda folder: header(folder, None, bytes(8), text)


def renamed(name):
    """Another name for model.safetensors."""
    return lambda folder: (folder / WEIGHTS).rename(folder / name)


def replaced(name, content):
    """A folder with this file: bytes, or what becomes JSON."""
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    return lambda folder: (folder / name).write_bytes(content)


def added(**tensors):
    return lambda folder: change_weights(folder, lambda weights: weights.update(tensors))


def index(change):
    """Two shards and an index, whose weight_map is changed in place by a function."""

    def damage(folder):
        weights = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        shards = {name: f"{'b' if name == KEY else 'a'}.safetensors" for name in weights}
        for shard in ("a.safetensors", "b.safetensors"):
            save_file({name: x for name, x in weights.items() if shards[name] == shard}, folder / shard)
        content = change({"metadata": {}, "weight_map": shards})
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / INDEX).write_bytes(content)

    return damage


def mapped(**changes):
    """The index with other files for these tensors; None removes a tensor."""

    def change(content):
        weight_map = {**content["weight_map"], **changes}
        return {**content, "weight_map": {name: file for name, file in weight_map.items() if file}}

    return index(change)


def twice(folder):
    mapped()(folder)
    weights = load_file(folder / "b.safetensors")
    save_file({**load_file(folder / "a.safetensors"), **weights}, folder / "a.safetensors")


def adapter(*names):
    """Files of an adapter; `names` are removed."""

    def damage(folder):
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": 1}')
        save_file({"x": hf_models.torch.ones(2)}, folder / "adapter_model.safetensors")
        for name in names:
            (folder / name).unlink()

    return damage


def orbax(metadata, place="."):
    def damage(folder):
        (folder / WEIGHTS).unlink(missing_ok=True)
        (folder / place).mkdir(parents=True, exist_ok=True)
        text = metadata if isinstance(metadata, bytes) else json.dumps({"tree_metadata": metadata}).encode()
        (folder / place / "_METADATA").write_bytes(text)

    return damage


def both(*damages):
    """One damage after another."""
    return lambda folder: [damage(folder) for damage in damages]


def sparse(folder):
    """A file that is large enough for its header, which is larger than that of any model."""
    (folder / WEIGHTS).write_bytes((2**27).to_bytes(8, "little"))
    os.truncate(folder / WEIGHTS, 2**28)


def link(folder):
    renamed("blob")(folder)
    (folder / WEIGHTS).symlink_to("nowhere")


def directory(folder):
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()


NESTED = b'{"a":' + b"[" * 100_000
LEAF = {"('a',)": {"key_metadata": [{"key": "a", "key_type": 2}]}}
STATE = {"(...)": {"key_metadata": [{"key": "opt_state", "key_type": 2}, {"key": "a", "key_type": 2}]}}
ONES = hf_models.torch.ones(2, 2)
MALFORMED = {
    # the header
    "seven bytes": (replaced(WEIGHTS, b"7 bytes"), "truncated or corrupted"),
    "a header of 2^63 bytes": (replaced(WEIGHTS, bytes(7) + b"\x80" + bytes(64)), "truncated or corrupted"),
    "a header of 2^27 bytes": (sparse, "the header does not fit into 268435456 bytes"),
    "a header longer than the file": (
        replaced(WEIGHTS, b"\x64" + bytes(7) + b"{}"),
        "header does not fit into 10 bytes",
    ),
    "a header that is a number": (raw(b"3       "), "corrupted safetensors header: got int, want a JSON object"),
    "a header in latin-1": (raw(b'{"\xe9": 3}'), "corrupted safetensors header: it is not UTF-8"),
    "a deep header": (raw(NESTED), "corrupted safetensors header: it is nested too deeply"),
    "a deep __metadata__": (raw(b'{"__metadata__":' + NESTED), "nested too deeply"),
    "a tensor twice": (raw(b'{"x": 1, "x": 2}'), "'x' is given twice"),
    "a dtype twice": (raw(b'{"x": {"dtype": "F32", "dtype": "F16"}}'), "'dtype' is given twice"),
    "an entry that is null": (lambda folder: header(folder, {"x": None}), "tensor 'x' has None, want dtype"),
    "an entry without dtype": (lambda folder: header(folder, {"x": {"shape": []}}), "want dtype, shape and data_off"),
    "a field too many": (one(strides=[1]), "want dtype, shape and data_offsets"),
    "a shape of texts": (one(shape=["2"]), "want a name, whole numbers"),
    "a shape of floats": (one(shape=[2.0]), "want a name, whole numbers"),
    "a shape of booleans": (one(shape=[True, 2]), "want a name, whole numbers"),
    "a negative shape": (one(shape=[-2]), "want a name, whole numbers"),
    "a number as shape": (one(shape=2), "want a name, whole numbers"),
    "negative offsets": (one(data_offsets=[-8, 0]), "two whole numbers"),
    "three offsets": (one(data_offsets=[0, 8, 8]), "two whole numbers"),
    "offsets that are texts": (one(data_offsets=["0", "8"]), "two whole numbers"),
    "reversed offsets": (one(data_offsets=[8, 0]), r"has data_offsets \[8, 0\], want \[0, 8\]"),
    "overlapping offsets": (two((0, 8), (4, 12)), r"has data_offsets \[4, 12\], want \[8, 16\]"),
    "equal offsets": (two((0, 8), (0, 8)), r"has data_offsets \[0, 8\], want \[8, 16\]"),
    "a gap": (two((0, 8), (12, 20)), r"has data_offsets \[12, 20\], want \[8, 16\]"),
    "bytes missing": (one(data=bytes(7)), "truncated or corrupted: got"),
    "bytes too many": (one(data=bytes(9)), "truncated or corrupted: got"),
    "no tensors": (lambda folder: header(folder, {}), "contains no tensors"),
    # dtypes
    **{
        f"dtype {x}": (one(dtype=x), f"dtype '{x}', which is not supported")
        for x in ("F8_E8M0", "F4", "F6_E2M3", "C64")
    },
    "an unknown dtype": (one(dtype="X1"), "dtype 'X1', which is not supported"),
    "a number as dtype": (one(dtype=32), "want a name, whole numbers"),
    # the choice of files
    "consolidated": (renamed("consolidated.safetensors"), "names of Mistral's own library"),
    "a variant": (renamed("model.fp16.safetensors"), "model.fp16.safetensors is a variant; rename it"),
    "a shard alone": (renamed("model-00001-of-00002.safetensors"), f"a part of a model without its {INDEX}"),
    "an adapter's weights": (renamed("adapter_model.safetensors"), "a LoRA adapter without its adapter_config.json"),
    "another name": (renamed("weights.safetensors"), "a file that transformers does not read"),
    "a pickle": (renamed("pytorch_model.bin"), "pytorch_model.bin, a pickle"),
    "a broken link": (link, "a folder or a broken link"),
    "a folder as file": (directory, "a folder or a broken link"),
    "an adapter beside a model": (adapter(), r"holds a whole model \(model.safetensors\) and a LoRA adapter"),
    "an adapter": (
        adapter(WEIGHTS),
        "is a LoRA adapter, not a whole model; scripts/merge.py takes it|not supported, want",
    ),
    "a file of one's own choice": (
        replaced("config.json", {"transformers_weights": "y.safetensors"}),
        "'transformers_we",
    ),
    "the index beside the model": (
        both(
            replaced(INDEX, {"weight_map": {KEY: WEIGHTS}}),
            replaced("config.json", {"transformers_weights": INDEX}),
        ),
        "field 'transformers_weights' is not supported",
    ),
    # the index
    "an index of nothing": (index(lambda content: {"weight_map": {}}), "weight_map is {}, want a file"),
    "an index that is a list": (index(lambda content: [content]), f"{INDEX}: broken JSON: got list"),
    "an index of numbers": (index(lambda content: {"weight_map": {KEY: 3}}), "weight_map is .*want a file"),
    "a deep index": (index(lambda content: NESTED), f"{INDEX}: broken JSON: it is nested too deeply"),
    "an index with a key twice": (index(lambda content: b'{"weight_map": {"a": "a", "a": "b"}}'), "'a' is given twice"),
    "an absolute path": (mapped(**{KEY: "/etc/x.safetensors"}), "names the file '/etc/x.safetensors', want"),
    "a path out of the folder": (mapped(**{KEY: "s/../../x.safetensors"}), "want .safetensors files inside the folder"),
    "a pickle in the index": (mapped(**{KEY: "b.bin"}), "names the file 'b.bin', want .safetensors files"),
    "a missing shard": (mapped(**{KEY: "c.safetensors"}), "c.safetensors is missing; model.safetensors.index"),
    "a tensor that no file has": (mapped(extra="b.safetensors"), "b.safetensors: tensor 'extra' is missing"),
    "a tensor that the index lacks": (mapped(**{QUERY: None}), f"tensor '{QUERY}': {INDEX} does not list it"),
    "a tensor elsewhere": (
        mapped(**{QUERY: "b.safetensors"}),
        f"a.safetensors: tensor '{QUERY}': {INDEX} says that it is",
    ),
    "a tensor in two files": (twice, f"a.safetensors: tensor '{KEY}': {INDEX} says that it is in b.safetensors"),
    # quantised weights
    "FP8 with scales": (added(**{f"{KEY}_scale_inv": ONES}), "_scale_inv' .*quantised weights are not supported"),
    "compressed tensors": (added(**{f"{KEY}_scale": ONES}), "_scale' .*quantised weights are not supported"),
    "GPTQ": (added(**{"model.x.qweight": ONES.int()}), "qweight' .*quantised weights are not supported"),
    "bitsandbytes": (added(**{f"{KEY}.quant_state.bitsandbytes__nf4": ONES}), "quantised weights are not supported"),
    "packed codes": (added(**{KEY: ONES.to(hf_models.torch.uint8)}), "uint8.*quantised weights are not supported"),
    "a quantised config": (
        replaced("config.json", {"quantization_config": {"bits": 4}}),
        "'quantization_config' is set",
    ),
    # config.json
    "a config that is a list": (replaced("config.json", []), "config.json: broken JSON: got list"),
    "a deep config": (replaced("config.json", NESTED), "config.json: broken JSON: it is nested"),
    "a config in latin-1": (replaced("config.json", b'{"\xe9": 1}'), "config.json: broken JSON: it is not UTF-8"),
    # Orbax
    "a step folder": (orbax(LEAF, "100/default"), "is no checkpoint itself, but contains 1; give .*100/default"),
    "step folders": (
        both(orbax(LEAF, "20/default"), orbax(LEAF, "100/default"), orbax(LEAF, "3/default")),
        "contains 3; give the folder of one, such as .*/100/default",
    ),
    "a run with steps": (
        both(orbax(LEAF, "100/default"), orbax(LEAF, "params")),
        "contains 2; give the folder of one, such as .*/params",
    ),
    "a run": (
        orbax(LEAF, "params"),
        "is no checkpoint itself, but contains 1; give the folder of one, such as .*params",
    ),
    "a training state": (orbax(STATE), "it is a training state; give the folder of its parameters"),
    "an array that is gone": (orbax(LEAF), "not an Orbax checkpoint of parameters: NOT_FOUND"),
    "a deep _METADATA": (orbax(NESTED), "not an Orbax checkpoint of parameters: it is nested too deeply"),
    "a _METADATA of another kind": (orbax(["a"]), "not an Orbax checkpoint of parameters"),
    "an empty checkpoint": (orbax({}), "contains no tensors"),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A sound folder, its settings and the shapes of its parameters."""
    folder = hf_models.make_folder("llama2", tmp_path_factory.mktemp("sound"))
    config = read_config(folder)
    return folder, config, jax.eval_shape(Transformer(config).init, jax.random.key(0), IDS, MASK)["params"]


@pytest.mark.parametrize("kind", MALFORMED)
def test_no_door_accepts_a_malformed_folder(sound, tmp_path, kind):
    """Fails when opening, merging or loading such a folder raises anything but one line that says where and why."""
    good, config, shapes = sound
    damage, message = MALFORMED[kind]
    bad = shutil.copytree(good, tmp_path / "bad")
    damage(bad)
    doors = [
        lambda: open_weights(bad),
        lambda: merge_folders(good, [bad], tmp_path / "out", Settings()),
        lambda: merge_folders(bad, [good], tmp_path / "out", Settings()),
        lambda: hf_weights.check_weights(bad, config, shapes),
    ]
    for door in doors:
        with pytest.raises(ValueError, match=message) as caught:
            door()
        assert str(caught.value).startswith(str(bad))
        assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"bad"}
