"""The files of a model: those that transformers chooses, and the same ones for loading, merging and fingerprints."""

import json
import shutil

import hf_models
import numpy as np
import pytest
import safetensors.numpy
from safetensors.torch import load_file, save_file

from warp_jax import files
from warp_jax.experiment import workdir
from warp_jax.merging.on_disk import Settings, merge_folders
from warp_jax.storage import model_files
from warp_jax.storage.model_files import INDEX, SINGLE
from warp_jax.storage.weight_files import open_weights

NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A Llama of two layers in one file."""
    return hf_models.make_folder("llama2", tmp_path_factory.mktemp("sound"))


@pytest.fixture
def folder(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "model")


def _other_weights(path):
    path.parent.mkdir(exist_ok=True)
    return save_file({NORM: hf_models.torch.full((32,), 7.0)}, path, {"format": "pt"})


def _move(folder, name):
    """Move all weights to another file, and write an index that says so."""
    weights = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    (folder / name).parent.mkdir(exist_ok=True)
    save_file(weights, folder / name, {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, name)}
    (folder / INDEX).write_text(json.dumps(index))


def _with_stale_index(folder):
    _other_weights(folder / "model-00001-of-00001.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {NORM: "model-00001-of-00001.safetensors"}}))


LAYOUTS = {
    "one file": lambda folder: None,
    "a stale index": _with_stale_index,
    "consolidated": lambda folder: _other_weights(folder / "consolidated.safetensors"),
    "an adapter's weights": lambda folder: _other_weights(folder / "adapter_model.safetensors"),
    "a variant": lambda folder: _other_weights(folder / "model.fp16.safetensors"),
    "a pickle": lambda folder: (folder / "pytorch_model.bin").write_bytes(b"?"),
    "one shard": lambda folder: _move(folder, "model-00001-of-00001.safetensors"),
    "a shard in a folder": lambda folder: _move(folder, "shards/x.safetensors"),
    "a link": lambda folder: (folder / SINGLE).rename(folder / "blob") and (folder / SINGLE).symlink_to("blob"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_are_those_that_transformers_chooses(sound, folder, layout):
    """Fails when another file's tensors are read, the merge of it cannot be loaded, or they change the fingerprint."""
    before = model_files.fingerprint(folder)
    LAYOUTS[layout](folder)
    assert (model_files.fingerprint(folder) == before) == (SINGLE in model_files.find(folder).weights)
    want = hf_models.load_model(folder)[0].state_dict()
    weights = open_weights(folder)
    assert weights.tensors.keys() == want.keys()
    np.testing.assert_array_equal(weights.view(NORM, 0, 32), want[NORM])
    merge_folders(folder, [_moved_policy(sound, folder.parent / "policy")], folder.parent / "out", Settings())
    merged, report = hf_models.load_model(folder.parent / "out" / "eta_1")
    assert not report["missing_keys"]
    np.testing.assert_allclose(merged.state_dict()[NORM], want[NORM] + 0.5, rtol=1e-6)


def _moved_policy(sound, path):
    shutil.copytree(sound, path)
    save_file({name: x + 0.5 for name, x in load_file(sound / SINGLE).items()}, path / SINGLE, {"format": "pt"})
    return path


def test_a_shard_in_a_folder_changes_the_fingerprint(folder):
    """Fails when only the files at the top of a folder are hashed."""
    _move(folder, "shards/x.safetensors")
    before = model_files.fingerprint(folder)
    _other_weights(folder / "shards" / "x.safetensors")
    assert model_files.fingerprint(folder) != before


@pytest.mark.parametrize("size", [10, 5 * files.PIECE])
def test_fingerprint_changes_with_the_weights(tmp_path, size):
    """Fails when the beginning, middle or end of a file, its size or a tokenizer is not hashed, or a note is."""
    file = tmp_path / SINGLE
    content = bytes(size)
    hashes = set()
    for position in (0, size // 2, size - 1):
        file.write_bytes(content[:position] + b"x" + content[position + 1 :])
        hashes.add(model_files.fingerprint(tmp_path))
    file.write_bytes(content)
    original = model_files.fingerprint(tmp_path)
    (tmp_path / "README.md").write_text("a note")
    assert model_files.fingerprint(tmp_path) == original
    file.write_bytes(content + b"\0")
    hashes.add(model_files.fingerprint(tmp_path))
    (tmp_path / "merges.txt").write_text("a b")
    hashes.add(model_files.fingerprint(tmp_path))
    assert len(hashes | {original}) == 6


def test_a_workdir_accepts_its_older_fingerprint(folder, tmp_path, monkeypatch):
    """Fails when a workdir whose fingerprints count unused files cannot be resumed, or changed weights are accepted."""
    _with_stale_index(folder)
    older = workdir._older_fingerprint(folder)
    assert older != model_files.fingerprint(folder)
    (tmp_path / workdir.FINGERPRINTS).write_text(json.dumps({"gold": older}))
    settings = _Settings(str(folder))
    (tmp_path / workdir.FINGERPRINTS).write_text(json.dumps({str(folder): older}))
    assert workdir.check_models_unchanged(settings, tmp_path) == {str(folder): model_files.fingerprint(folder)}
    _other_weights(folder / SINGLE)
    with pytest.raises(ValueError, match="was made with other files of"):
        workdir.check_models_unchanged(settings, tmp_path)


class _Settings:
    def __init__(self, source):
        self.all_reward_parts = {}
        self.gold = self.model = type("Part", (), {"source": source})


def test_empty_tensors_are_fine(tmp_path):
    """Fails when a tensor without elements is refused, or shifts its neighbours."""
    values = {"a": np.ones((2, 3), np.float32), "b": np.zeros((0, 4), np.float32), "c": np.arange(3.0)}
    safetensors.numpy.save_file(values, tmp_path / SINGLE)
    weights = open_weights(tmp_path)
    for name, want in values.items():
        np.testing.assert_array_equal(weights.view(name, 0, want.size).reshape(want.shape), want)
