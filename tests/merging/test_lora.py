"""Merging LoRA adapters, against the PEFT library's own merge into full weights."""

import json

import numpy as np
import peft
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import transformers

from warp_jax.merging.on_disk import Settings, merge_folders
from warp_jax.storage.lora_folder import LoraFolder
from warp_jax.storage.weight_files import open_weights

SIZES = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
PLAIN = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
ADAPTERS = {
    "plain": {**PLAIN, "r": 4, "lora_alpha": 6},
    "rslora": {**PLAIN, "r": 3, "lora_alpha": 5, "use_rslora": True},
    "patterns": {
        **PLAIN,
        "r": 2,
        "lora_alpha": 8,
        "rank_pattern": {"q_proj": 5},
        "alpha_pattern": {"layers.1.*v_proj": 3},
    },
    "whole": {"target_modules": ["embed_tokens", "up_proj"], "r": 4, "lora_alpha": 7, "modules_to_save": ["lm_head"]},
}


def _base_model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=False)
    return transformers.LlamaForCausalLM(config)


def _adapter(path, seed, **options):
    """Save a random adapter in `path`; return the full weights that PEFT makes of it, in float64."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(_base_model(), peft.LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(path)
    merged = model.double().merge_and_unload()
    return {name: value.numpy().astype(np.float64) for name, value in merged.state_dict().items()}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Folder of the base model, float32."""
    path = tmp_path_factory.mktemp("base")
    _base_model().save_pretrained(path)
    return path


def _save_full(path, weights):
    path.mkdir()
    safetensors.numpy.save_file(
        {name: np.ascontiguousarray(x) for name, x in weights.items()}, path / "model.safetensors"
    )


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_reads_as_the_full_weights(base, tmp_path, kind):
    """Mutation: alpha / rank for rsLoRA; patterns ignored; embeddings not transposed; saved modules left out."""
    want = _adapter(tmp_path / "adapter", 1, **ADAPTERS[kind])
    folder = LoraFolder(tmp_path / "adapter", open_weights(base))
    changed = 0
    before = safetensors.numpy.load_file(base / "model.safetensors")
    for name, tensor in folder.tensors.items():
        got = folder.view(name, 0, tensor.size)
        np.testing.assert_allclose(got, want[name].reshape(-1), atol=1e-7, err_msg=name)
        pieces = [folder.view(name, start, min(start + 37, tensor.size)) for start in range(0, tensor.size, 37)]
        np.testing.assert_array_equal(np.concatenate(pieces), got)
        changed += not np.array_equal(got, before[name].reshape(-1))
    assert changed == {"plain": 6, "rslora": 6, "patterns": 6, "whole": 4}[kind]


@pytest.mark.parametrize(("dtype", "rounding"), [("float64", 1e-12), ("bfloat16", 2**-8)])
def test_merging_adapters_is_merging_their_full_weights(base, tmp_path, dtype, rounding):
    """Mutation: the change rounded to the base model's dtype before the merge."""
    base_weights = open_weights(base)
    for number, kind in enumerate(("plain", "rslora", "patterns")):
        _adapter(tmp_path / f"adapter_{number}", number + 1, **ADAPTERS[kind])
        folder = LoraFolder(tmp_path / f"adapter_{number}", base_weights)
        full = {n: folder.view(n, 0, t.size).astype(np.float64).reshape(t.shape) for n, t in folder.tensors.items()}
        _save_full(tmp_path / f"full_{number}", full)
    results = []
    for kind in ("adapter", "full"):
        policies = [tmp_path / f"{kind}_{number}" for number in range(3)]
        merge_folders(base, policies, tmp_path / f"out_{kind}", Settings(etas=(0.3,), dtype=dtype))
        results.append(safetensors.torch.load_file(tmp_path / f"out_{kind}" / "eta_0.3" / "model.safetensors"))
    start = safetensors.torch.load_file(base / "model.safetensors")
    for name, got in results[0].items():
        np.testing.assert_allclose(got.double(), results[1][name].double(), rtol=2 * rounding, atol=1e-12, err_msg=name)
    assert not torch.equal(
        results[0]["model.layers.0.mlp.down_proj.weight"].float(), start["model.layers.0.mlp.down_proj.weight"]
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora is set, and is not supported"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3', want 'LORA'"),
        ({"init_lora_weights": "pissa_niter_4"}, "also changes the base model"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is set"),
        ({"lora_alpha": None}, "float"),
        ({"alpha_pattern": {"(": 3}}, "unterminated|missing"),
    ],
)
def test_other_adapters_are_refused_by_name(base, tmp_path, changes, message):
    """Mutation: an option that changes what the factors mean is ignored."""
    _adapter(tmp_path / "adapter", 1, **ADAPTERS["plain"])
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        LoraFolder(tmp_path / "adapter", open_weights(base))


def _rename(old, new):
    return lambda tensors: {name.replace(old, new): value for name, value in tensors.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_rename("down_proj", "other"), "which is missing in"),
        (_rename("base_model.model.", ""), "want floats named base_model.model"),
        (_rename("lora_A", "lora_C"), "neither a LoRA factor nor a weight"),
        (lambda tensors: {n: x for n, x in tensors.items() if "1.mlp.down_proj.lora_B" not in n}, "has no lora_B"),
        (lambda tensors: {n: x for n, x in tensors.items() if "1.mlp.down_proj.lora_A" not in n}, "has no lora_A"),
        (lambda tensors: {n: x[:, :-1].copy() for n, x in tensors.items()}, "do not fit"),
    ],
)
def test_factors_that_do_not_fit_are_refused(base, tmp_path, change, message):
    """Mutation: a factor without a place, or without its partner, is left out in silence."""
    _adapter(tmp_path / "adapter", 1, **ADAPTERS["plain"])
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    safetensors.numpy.save_file(change(safetensors.numpy.load_file(path)), path)
    with pytest.raises(ValueError, match=message):
        LoraFolder(tmp_path / "adapter", open_weights(base))
