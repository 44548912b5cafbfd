"""Export of a change of weights as a PEFT adapter: read by this project and by PEFT, against the change itself."""

import dataclasses

import jax
import numpy as np
import peft
import pytest
import safetensors.numpy
import transformers

from warp_jax import files, trees
from warp_jax.merging.on_disk import Settings, merge_folders
from warp_jax.models import apply, freezing, lora
from warp_jax.models.transformer import TransformerConfig
from warp_jax.pretrained import hf_adapter, hf_weights
from warp_jax.storage.lora_folder import LoraFolder
from warp_jax.storage.weight_files import open_weights

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of PEFT
CONFIG = TransformerConfig(
    vocab_size=50, width=24, num_layers=3, num_heads=3, num_kv_heads=1, head_dim=8, mlp_dim=40, tied_head=False
)
RANK = 2


def _model(seed=0):
    return jax.tree.map(np.asarray, apply.init_params(CONFIG, jax.random.key(seed)))


def _moved(base, *patterns, seed=1):
    """The base model with a change of rank 2 in every kernel that matches all patterns."""
    trained, frozen = freezing.split(base, *patterns, "/kernel$")
    factors = lora.init(jax.random.key(seed), trained, RANK)
    rng = np.random.default_rng(seed)
    factors = jax.tree.map(lambda x: np.asarray(x) + 0.1 * rng.normal(size=x.shape).astype(np.float32), factors)
    return jax.tree.map(np.asarray, trees.join(lora.expand(trained, factors, 3.0), frozen))


def _export(out, params, base, rank=RANK, dtype="float32"):
    base_is = {"base_model_name_or_path": None}
    return hf_adapter.export_adapter(params, base, CONFIG, out, rank=rank, dtype=dtype, base_is=base_is)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of a base model and of an adapter of rank 2 for the layers, and both models."""
    path, base = tmp_path_factory.mktemp("folders"), _model()
    hf_weights.export_params(base, CONFIG, path / "base", dtype="float32")
    policy = _moved(base, "layers/")
    _export(path / "adapter", policy, base)
    hf_weights.export_params(policy, CONFIG, path / "policy", dtype="float32")
    return path, base, policy


def test_an_adapter_is_read_back(folders):
    """Fails when A and B are exchanged or transposed, the scale is not 1, a layer gets another's factors, or the axes
    of the heads are in another order.
    """
    path, *_ = folders
    read = LoraFolder(path / "adapter", open_weights(path / "base"))
    policy, base = (safetensors.numpy.load_file(path / name / "model.safetensors") for name in ("policy", "base"))
    changed = 0
    for name, tensor in read.tensors.items():
        np.testing.assert_allclose(read.view(name, 0, tensor.size), policy[name].reshape(-1), rtol=0, atol=1e-6)
        changed += np.abs(policy[name] - base[name]).max() > 1e-2
    assert changed == 7 * 3


def test_peft_reads_the_same_weights(folders):
    """Fails when a name, the scale, the rank or a field of adapter_config.json is not as PEFT writes it."""
    path, *_ = folders
    model = transformers.AutoModelForCausalLM.from_pretrained(path / "base", dtype="float32")
    adapted = peft.PeftModel.from_pretrained(model, path / "adapter")  # it warns, an error here, of missing keys
    merged = adapted.merge_and_unload().state_dict()
    for name, want in safetensors.numpy.load_file(path / "policy" / "model.safetensors").items():
        np.testing.assert_allclose(merged[name].numpy(), want, rtol=0, atol=1e-6, err_msg=name)


def test_what_a_smaller_rank_lacks(folders, tmp_path):
    """Fails when the error is of another kernel or not squared, the rounding to the dtype is left out, or the returned
    weights are not those of the folder.
    """
    path, base, _ = folders
    both = _moved(_moved(base, "layers/"), "layers/", seed=2)  # of rank 4
    for rank, dtype in ((3, "float32"), (8, "bfloat16")):
        out = tmp_path / str(rank)
        found = _export(out, both, base, rank, dtype)
        read, slices = LoraFolder(out, open_weights(path / "base")), hf_weights.slices_of(both, CONFIG)
        flat = {name: np.asarray(leaf) for name, leaf in _flat(both).items()}
        returned = _flat(found.params)
        assert len(found.errors) == 21
        for module, error in found.errors.items():
            part = slices[f"{module}.weight"]
            want = part.to_stored(flat[part.leaf][part.layer]).astype(np.float64)
            got = read.view(f"{module}.weight", 0, want.size)
            start = open_weights(path / "base").view(f"{module}.weight", 0, want.size)
            assert error == pytest.approx(((got - want) ** 2).sum(), rel=1e-3)
            assert found.lengths[module] == pytest.approx(((want - start) ** 2).sum(), rel=1e-5)
            assert 1e-4 < (error / found.lengths[module]) ** 0.5 < 0.8
            np.testing.assert_allclose(part.to_stored(returned[part.leaf][part.layer]), got, atol=1e-6)


def _flat(tree):
    return {trees.path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def test_an_adapter_of_some_layers_and_the_head(folders, tmp_path):
    """Fails when a kernel without a change gets factors, or the head has none."""
    base = folders[1]
    config = dataclasses.replace(CONFIG, layer_groups=(1, 2))
    cut = freezing.restacked(base, apply.init_params(config, jax.random.key(5)))
    policy = _moved(jax.tree.map(np.asarray, cut), "layers/[12]/attention/[qv]|lm_head")
    base_is = {"base_model_name_or_path": "x/y", "revision": "v1"}
    hf_adapter.export_adapter(policy, cut, config, tmp_path / "a", rank=RANK, dtype="float32", base_is=base_is)
    content = files.read_json(tmp_path / "a" / "adapter_config.json")
    names = [f"model.layers.{i}.self_attn.{x}_proj" for i in (1, 2) for x in "qv"]
    assert content["target_modules"] == ["lm_head", *names]
    assert content.items() > {"r": RANK, **base_is}.items()
    assert len(safetensors.numpy.load_file(tmp_path / "a" / "adapter_model.safetensors")) == 2 * len(names) + 2


def test_what_no_adapter_can_hold_is_refused(folders, tmp_path):
    """Fails when a change of a norm or of the embedding is left out without a word."""
    base = folders[1]
    for leaf, name in ((("final_norm", "scale"), "model.norm.weight"), (("embed", "embedding"), "embed_tokens")):
        other = {**base, leaf[0]: {leaf[1]: base[leaf[0]][leaf[1]] + 0.01}}
        with pytest.raises(ValueError, match=f"^lora_rank: got 2, but weight '.*{name}.*' changes and is no kernel"):
            _export(tmp_path / "out", other, base)
    with pytest.raises(ValueError, match="no weight differs from the base model"):
        _export(tmp_path / "out", base, base)
    assert not (tmp_path / "out").exists()


def test_merging_adapters_is_merging_their_weights_not_their_factors(folders, tmp_path):
    """Fails when adapters are merged by their factors, or an adapter is taken for the whole model that init must be."""
    path, base, _ = folders
    other = _moved(base, "layers/", seed=3)
    _export(tmp_path / "other", other, base)
    hf_weights.export_params(other, CONFIG, tmp_path / "whole", dtype="float32")
    settings = Settings(method="slerp", weights=(0.2,), etas=(0.3,), dtype="float32")
    merge_folders(path / "base", [path / "adapter", tmp_path / "other"], tmp_path / "of_adapters", settings)
    merge_folders(path / "base", [path / "policy", tmp_path / "whole"], tmp_path / "of_weights", settings)
    found, want = (
        safetensors.numpy.load_file(tmp_path / name / "eta_0.3" / "model.safetensors")
        for name in ("of_adapters", "of_weights")
    )
    for name in want:
        np.testing.assert_allclose(found[name], want[name], rtol=0, atol=1e-6, err_msg=name)
    with pytest.raises(ValueError, match="is a LoRA adapter, not a whole model"):
        merge_folders(path / "adapter", [tmp_path / "other", path / "policy"], tmp_path / "wrong", settings)
