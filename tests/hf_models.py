"""Small random transformers models of every supported family: the reference for the Hugging Face tests.

The weights are random, and chosen so that an error changes the outputs:
- Matrices have standard deviation 1.5 / sqrt(fan-in). The layers then outweigh the embedding in the residual;
  otherwise a tied head repeats the last token for ever.
- Embedding and head have standard deviation 1 / sqrt(width), so that logits have about 1. Over 64 greedy tokens the two
  largest logits differ by at least 10^-3 of the scale, a thousand times the float32 error.
- Norm scales are uniform in 0.5 .. 1.5 (Gemma stores scale - 1) and biases have standard deviation 0.5; untrained ones
  would be constant.
- Rotary bases are small, so that every pair rotates visibly within the 24 tokens of IDS.
"""

import copy
import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import GenerationConfig

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

VOCAB = 80
PADS = (0, 5, 11)  # left padding of each row of IDS
LENGTH = 24
MASK = np.arange(LENGTH)[None] >= np.array(PADS)[:, None]
IDS = np.where(MASK, np.random.default_rng(7).integers(3, VOCAB - 6, MASK.shape), 0).astype(np.int32)

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 0,
}
LLAMA = {**SIZES, "tie_word_embeddings": False, "rope_parameters": {"rope_type": "default", "rope_theta": 300.0}}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 300.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 48,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 300.0, "factor": 4.0}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 300.0, "factor": 4.0, "original_max_position_embeddings": 24}
TIED = {"tie_word_embeddings": True}
GEMMA = {**SIZES, "head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 200.0}}
GEMMA2 = {
    **GEMMA,
    "num_hidden_layers": 3,
    "query_pre_attn_scalar": 24,
    "sliding_window": 5,
    "attn_logit_softcapping": 3.0,
    "final_logit_softcapping": 0.8,
}
GEMMA3 = {
    **SIZES,
    "head_dim": 16,
    "num_hidden_layers": 7,
    "query_pre_attn_scalar": 24,
    "sliding_window": 5,
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 200.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
    },
}
GEMMA3_LINEAR = {
    **GEMMA3,
    "num_hidden_layers": 5,
    "sliding_window_pattern": 3,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 200.0, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
    },
}
QWEN2 = {**LLAMA, "use_sliding_window": False, "sliding_window": 5, "max_window_layers": 1}
QWEN3 = {**QWEN2, "head_dim": 16}
MISTRAL = {**LLAMA, "head_dim": 16, "sliding_window": 5}
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
MULTIMODAL = {
    "text_config": {**GEMMA3_LINEAR, "num_hidden_layers": 3},
    "vision_config": VISION,
    "mm_tokens_per_image": 4,
    "image_token_index": VOCAB - 1,
    "boi_token_index": VOCAB - 2,
    "eoi_token_index": VOCAB - 3,
}


@dataclasses.dataclass(frozen=True)
class Family:
    """A transformers class, the settings of its config, the seed of its weights and the mesh of its tests.

    seed: one whose 3 x 64 greedy tokens are each decided by at least 10^-3 of the logit scale and do not just repeat.
    mesh: sizes of (data, fsdp, tensor).
    """

    architecture: str
    settings: Mapping[str, Any]
    seed: int = 0
    mesh: tuple[int, int, int] = (2, 2, 2)


FAMILIES = {
    "gemma": Family("GemmaForCausalLM", {**GEMMA, "num_key_value_heads": 1}, 13, mesh=(2, 4, 1)),
    "gemma2": Family("Gemma2ForCausalLM", GEMMA2, 7),
    "gemma3": Family("Gemma3ForCausalLM", GEMMA3, 4),
    "gemma3_linear": Family("Gemma3ForCausalLM", GEMMA3_LINEAR, 9),
    "gemma3_multimodal": Family("Gemma3ForConditionalGeneration", MULTIMODAL, 8),
    "llama2": Family("LlamaForCausalLM", LLAMA, 4),
    "llama3": Family("LlamaForCausalLM", {**LLAMA, "rope_parameters": LLAMA3_ROPE}, 12, mesh=(1, 4, 2)),
    "llama3_tied": Family("LlamaForCausalLM", {**LLAMA, "rope_parameters": LLAMA3_ROPE, **TIED}, 4),
    "llama_linear_gelu": Family("LlamaForCausalLM", {**LLAMA, "rope_parameters": LINEAR_ROPE, "hidden_act": "gelu"}, 7),
    "smollm2": Family("LlamaForCausalLM", {**LLAMA, "num_hidden_layers": 4, **TIED}, 1),
    "qwen2": Family("Qwen2ForCausalLM", QWEN2, 1),
    "qwen2_tied": Family("Qwen2ForCausalLM", {**QWEN2, **TIED}, 3),
    "qwen2_sliding": Family("Qwen2ForCausalLM", {**QWEN2, "num_hidden_layers": 3, "use_sliding_window": True}, 17),
    "qwen2_yarn": Family("Qwen2ForCausalLM", {**QWEN2, "rope_parameters": YARN_ROPE}, 13),
    "qwen3": Family("Qwen3ForCausalLM", QWEN3, 3),
    "qwen3_tied": Family("Qwen3ForCausalLM", {**QWEN3, **TIED}, 13),
    "mistral": Family("MistralForCausalLM", MISTRAL, 1),
    "mistral_global": Family("MistralForCausalLM", {**MISTRAL, "sliding_window": None}, 7),
}
REWARD_MODELS = {
    name: Family(f"{architecture}ForSequenceClassification", {**settings, "num_labels": 1})
    for name, architecture, settings in (
        ("llama_reward", "Llama", LLAMA),
        ("gemma_reward", "Gemma", GEMMA),
        ("gemma2_reward", "Gemma2", GEMMA2),
        ("gemma3_reward", "Gemma3Text", {**GEMMA3, "num_hidden_layers": 6}),
        ("qwen2_reward", "Qwen2", QWEN2),
        ("qwen3_reward", "Qwen3", QWEN3),
        ("mistral_reward", "Mistral", MISTRAL),
    )
}
ALL = {**FAMILIES, **REWARD_MODELS}


@functools.cache
def make_model(name: str) -> Any:
    """The transformers model of a family with fixed random weights, float32."""
    family = ALL[name]
    architecture = getattr(transformers, family.architecture)
    config = architecture.config_class(**json.loads(json.dumps(family.settings)))
    model = architecture._from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(family.seed)
    for path, parameter in model.named_parameters():
        parameter.data = _random(path, parameter.shape, "gemma" in name, generator)
    return model


def _random(path: str, shape: torch.Size, gemma: bool, generator: torch.Generator) -> torch.Tensor:
    if path.endswith("bias"):
        return 0.5 * torch.randn(shape, generator=generator)
    if len(shape) == 1:
        return 0.5 + torch.rand(shape, generator=generator) - (1.0 if gemma else 0.0)
    if "embed" in path:
        return (0.3 if gemma else 1.0) * torch.randn(shape, generator=generator) / shape[1] ** 0.5
    return 1.5 * torch.randn(shape, generator=generator) / shape[1:].numel() ** 0.5


def make_folder(name: str, folder: Path, *, dtype: str = "float32", max_shard_size: str = "50GB") -> Path:
    """Save a family's model with transformers."""
    model = copy.deepcopy(make_model(name)).to(getattr(torch, dtype))
    model.config.dtype = dtype
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def edit_config(folder: Path, **changes: Any) -> Path:
    """Set fields of config.json; a change of `...` removes the field."""
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in {**config, **changes}.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def load_model(folder: Path) -> tuple[Any, dict[str, Any]]:
    """Load a folder with transformers in float32, by the class in its config; also return the loading report."""
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, report = getattr(transformers, architecture).from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    return model.eval(), report


def outputs(model: Any, ids: np.ndarray = IDS, mask: np.ndarray = MASK) -> np.ndarray:
    """Logits [B, S, V] of a language model, or scores [B] of a reward model."""
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    ids, mask, positions = (torch.from_numpy(np.asarray(x, np.int64)) for x in (ids, mask, positions))
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    return logits.numpy() if logits.ndim == 3 else logits[:, 0].numpy()


def generate(model: Any, num_tokens: int, ids: np.ndarray = IDS, mask: np.ndarray = MASK) -> np.ndarray:
    """Greedy completions [B, num_tokens], without an end token."""
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=num_tokens, pad_token_id=0)
    ids, mask = (torch.from_numpy(np.asarray(x, np.int64)) for x in (ids, mask))
    completed = model.generate(input_ids=ids, attention_mask=mask)
    return completed[:, ids.shape[1] :].numpy()


# config.json of released models, as they were published
RELEASED = {
    "gemma-2-2b": """
        {"architectures": ["Gemma2ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": 1,
        "final_logit_softcapping": 30.0, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "hidden_activation":
        "gelu_pytorch_tanh", "hidden_size": 2304, "initializer_range": 0.02, "intermediate_size": 9216,
        "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 8, "num_hidden_layers": 26,
        "num_key_value_heads": 4, "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_theta":
        10000.0, "sliding_window": 4096, "torch_dtype": "float32", "transformers_version": "4.42.4", "use_cache": true,
        "vocab_size": 256000}
    """,
    "gemma-2b": """
        {"architectures": ["GemmaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 2,
        "eos_token_id": 1, "head_dim": 256, "hidden_act": "gelu", "hidden_activation": null, "hidden_size": 2048,
        "initializer_range": 0.02, "intermediate_size": 16384, "max_position_embeddings": 8192, "model_type": "gemma",
        "num_attention_heads": 8, "num_hidden_layers": 18, "num_key_value_heads": 1, "pad_token_id": 0, "rms_norm_eps":
        1e-06, "rope_scaling": null, "rope_theta": 10000.0, "torch_dtype": "bfloat16", "transformers_version":
        "4.38.0.dev0", "use_cache": true, "vocab_size": 256000}
    """,
    "gemma-3-4b": """
        {"architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999, "eoi_token_index": 256000,
        "eos_token_id": [1, 106], "image_token_index": 262144, "initializer_range": 0.02, "mm_tokens_per_image": 256,
        "model_type": "gemma3", "text_config": {"hidden_size": 2560, "intermediate_size": 10240, "model_type":
        "gemma3_text", "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024}, "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0", "vision_config":
        {"hidden_size": 1152, "model_type": "siglip_vision_model"}}
    """,
    "Llama-3.2-1B": """
        {"architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id":
        128000, "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
        "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": false,
        "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0,
        "low_freq_factor": 1.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"}, "rope_theta":
        500000.0, "tie_word_embeddings": true, "torch_dtype": "bfloat16", "transformers_version": "4.45.0.dev0",
        "use_cache": true, "vocab_size": 128256}
    """,
    "SmolLM2-135M": """
        {"architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 0,
        "eos_token_id": 0, "hidden_act": "silu", "hidden_size": 576, "initializer_range": 0.041666666666666664,
        "intermediate_size": 1536, "is_llama_config": true, "max_position_embeddings": 8192, "mlp_bias": false,
        "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": false, "rope_scaling": null, "rope_theta":
        100000, "tie_word_embeddings": true, "torch_dtype": "bfloat16", "transformers.js_config": {"kv_cache_dtype":
        {"q4f16": "float16", "fp16": "float16"}}, "transformers_version": "4.40.1", "use_cache": true, "vocab_size":
        49152}
    """,
    "Qwen2.5-7B": """
        {"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id":
        151643, "hidden_act": "silu", "hidden_size": 3584, "initializer_range": 0.02, "intermediate_size": 18944,
        "max_position_embeddings": 131072, "max_window_layers": 28, "model_type": "qwen2", "num_attention_heads": 28,
        "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
        "sliding_window": 131072, "tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version":
        "4.40.1", "use_cache": true, "use_mrope": false, "use_sliding_window": false, "vocab_size": 152064}
    """,
    "Mistral-7B-v0.1": """
        {"architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
        "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": false,
        "torch_dtype": "bfloat16", "transformers_version": "4.34.0.dev0", "use_cache": true, "vocab_size": 32000}
    """,
}


def released_config(name: str, folder: Path) -> Path:
    """Write the config.json of a released model into a folder."""
    (folder / "config.json").write_text(json.dumps(json.loads(RELEASED[name])))
    return folder
