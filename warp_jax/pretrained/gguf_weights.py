"""Convert GGUF files to Hugging Face folders.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The weights differ in two ways: llama.cpp
interleaves the rows of attn_q and attn_k in llama models, and adds one to the norms of gemma3 models. Unknown metadata
and tensors are rejected by name.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from warp_jax import files
from warp_jax.models.apply import param_shapes
from warp_jax.pretrained import gguf_tokenizer, hf_config, hf_weights
from warp_jax.storage.weight_files import SafetensorsWriter, Tensor

CHUNK_ELEMENTS = 1 << 22  # number of weights dequantised at a time
LLAMA_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "mlp_bias": False,
    "pretraining_tp": 1,
}
COUNTS = ("context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count")
REQUIRED = {
    "llama": (*COUNTS, "attention.layer_norm_rms_epsilon"),
    "gemma3": (*COUNTS, "attention.layer_norm_rms_epsilon", "attention.sliding_window"),
}
ROPE_DEFAULTS = {"rope.freq_base": 10_000.0, "rope.scaling.type": "linear", "rope.scaling.factor": 1.0}
DEFAULTS: dict[str, dict[str, Any]] = {  # those of llama.cpp
    "llama": ROPE_DEFAULTS,
    "gemma3": ROPE_DEFAULTS | {"rope.freq_base_swa": 10_000.0, "attention.sliding_window_pattern": 6},
}


def convert(gguf_path: Path, folder: Path) -> None:
    """Convert a GGUF file to a new folder of float32 safetensors, configs and a tokenizer, one chunk at a time.

    Raises ValueError if the file is damaged or not supported.
    """
    try:
        metadata, tensors = _read(gguf_path)
        vocabulary = gguf_tokenizer.read_vocabulary(metadata)
        backend = gguf_tokenizer.make_tokenizer(vocabulary)
        architecture = metadata["general.architecture"]
        values = _hyperparameters(metadata, architecture, len(vocabulary["ggml.tokens"]))
        tied = all(tensor.name != "output.weight" for tensor in tensors)
        config = _make_config(values, vocabulary, architecture, tied=tied)
        documents = {
            hf_config.CONFIG: config,
            "generation_config.json": gguf_tokenizer.make_generation_config(vocabulary),
            "tokenizer_config.json": gguf_tokenizer.make_tokenizer_config(vocabulary, values["context_length"]),
        }
        layout = _make_layout(config, architecture, tensors)
        folder.mkdir()
        _write_weights(folder, tensors, layout, config)
    except (ValueError, TypeError, IndexError, ZeroDivisionError) as error:
        raise ValueError(f"{gguf_path}: {error}") from error
    for name, document in documents.items():
        files.write_json(folder / name, document)
    backend.save(str(folder / "tokenizer.json"))


def _read(path: Path) -> tuple[dict[str, Any], Sequence[Any]]:
    """Read all metadata and the memory-mapped tensors. ValueError if the file is damaged or not supported."""
    try:
        import gguf  # noqa: PLC0415  an extra
    except ImportError as error:
        raise ValueError("GGUF files need the package gguf: pip install gguf") from error
    try:
        reader = gguf.GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
        got = (metadata["general.architecture"], reader.byte_order)
    except (ValueError, KeyError, IndexError, OverflowError, OSError) as error:
        raise ValueError(f"not a whole GGUF file: {error}") from error
    if got[0] not in REQUIRED or got[1] != "I":
        raise ValueError(f"architecture {got[0]!r}, byte order {got[1]!r}; want {' or '.join(REQUIRED)}, 'I'")
    for key, value in metadata.items():
        if key.startswith(("split.", "adapter.")) or (key == "general.type" and value != "model"):
            raise ValueError(f"metadata {key!r} = {value!r}: want a whole model in one file")
    return metadata, reader.tensors


def _hyperparameters(metadata: Mapping[str, Any], architecture: str, vocab_size: int) -> dict[str, Any]:
    """Metadata of the architecture, without its prefix and with llama.cpp's defaults; reject unknown fields."""
    prefix = f"{architecture}."
    given = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    required = REQUIRED[architecture]
    if missing := [key for key in required if key not in given]:
        raise ValueError(f"metadata '{architecture}.{missing[0]}' is missing")
    if lists := [key for key in given if isinstance(given[key], list)]:
        raise ValueError(f"metadata '{architecture}.{lists[0]}' differs from layer to layer, which is not supported")
    heads = given["attention.head_count"]
    optional = {"attention.head_count_kv": heads, "attention.key_length": given["embedding_length"] // heads}
    optional |= DEFAULTS[architecture]
    values = optional | given
    want = dict.fromkeys(("attention.value_length", "rope.dimension_count"), values["attention.key_length"])
    want |= {"vocab_size": vocab_size}
    for key, value in given.items():
        if key not in {*required, *optional, *want} or (key in want and value != want[key]):
            raise ValueError(f"metadata '{architecture}.{key}' = {value!r} is not supported")
    return values


def _make_layout(config: Mapping[str, Any], architecture: str, tensors: Sequence[Any]) -> dict[str, Tensor]:
    """Map GGUF tensor names to the tensors to write. ValueError if one is missing, unknown or has another shape."""
    import gguf  # noqa: PLC0415  an extra

    model = hf_config.from_json(config)
    gguf_names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], model.num_layers)
    shapes = {tensor.name: tuple(map(int, reversed(tensor.shape))) for tensor in tensors}
    layout = {}
    for name, part in hf_weights.slices_of(param_shapes(model), model).items():
        stored, want = gguf_names.get_name(name, (".weight",)) or name, part.stored_shape
        if stored not in shapes:
            raise ValueError(f"tensor {stored!r} is missing")
        if shapes[stored] != want:
            raise ValueError(f"tensor {stored!r} has shape {shapes[stored]}, want {want} as in its metadata")
        layout[stored] = Tensor(name, np.dtype(np.float32), want, "model.safetensors")
    if unknown := sorted(shapes.keys() - layout.keys()):
        raise ValueError(f"tensor {unknown[0]!r} is not supported for {architecture}")
    return layout


def _write_weights(
    folder: Path, tensors: Sequence[Any], layout: Mapping[str, Tensor], config: Mapping[str, Any]
) -> None:
    with contextlib.closing(SafetensorsWriter(folder, [layout[tensor.name] for tensor in tensors])) as writer:
        for tensor in tensors:
            for start, values in _dequantise(tensor, config["head_dim"]):
                writer.write(layout[tensor.name].name, start, _undo_llama_cpp(tensor.name, values, config).reshape(-1))


def _dequantise(tensor: Any, head_dim: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (index of the first element, float32 rows [R, columns]); R is a multiple of head_dim."""
    import gguf.quants  # noqa: PLC0415  an extra

    rows = np.atleast_2d(tensor.data)
    columns = int(tensor.n_elements) // len(rows)
    step = max(1, CHUNK_ELEMENTS // (columns * head_dim)) * head_dim
    try:
        for start in range(0, len(rows), step):
            yield start * columns, gguf.quants.dequantize(rows[start : start + step], tensor.tensor_type)
    except NotImplementedError as error:
        raise ValueError(f"tensor {tensor.name!r}: {error}") from error


def _undo_llama_cpp(name: str, values: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
    """Restore Hugging Face's order of rows [R, columns] (rotary pairs half a head apart) and its norms."""
    if config["model_type"] == "llama" and name.endswith((".attn_q.weight", ".attn_k.weight")):
        pairs = values.reshape(-1, config["head_dim"] // 2, 2, values.shape[-1])
        return pairs.swapaxes(1, 2).reshape(values.shape)
    if config["model_type"] == "gemma3_text" and name.endswith("_norm.weight"):
        return values - np.float32(1)
    return values


def _make_config(
    hyperparameters: Mapping[str, Any], vocabulary: Mapping[str, Any], architecture: str, *, tied: bool
) -> dict[str, Any]:
    """Content of config.json, in the format of transformers 4, which transformers 5 reads too."""
    return {
        **(LLAMA_CONFIG if architecture == "llama" else _gemma3_config(hyperparameters)),
        "vocab_size": len(vocabulary["ggml.tokens"]),
        "hidden_size": hyperparameters["embedding_length"],
        "intermediate_size": hyperparameters["feed_forward_length"],
        "num_hidden_layers": hyperparameters["block_count"],
        "num_attention_heads": hyperparameters["attention.head_count"],
        "num_key_value_heads": hyperparameters["attention.head_count_kv"],
        "head_dim": hyperparameters["attention.key_length"],
        "max_position_embeddings": hyperparameters["context_length"],
        "rms_norm_eps": _shortest(hyperparameters["attention.layer_norm_rms_epsilon"]),
        "rope_theta": _shortest(hyperparameters["rope.freq_base"]),
        "rope_scaling": _rope_scaling(hyperparameters),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": tied,
        "torch_dtype": "float32",
        "bos_token_id": vocabulary["ggml.bos_token_id"],
        "eos_token_id": vocabulary["ggml.eos_token_id"],
        "pad_token_id": vocabulary["ggml.padding_token_id"],
    }


def _gemma3_config(hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    layers, pattern = hyperparameters["block_count"], hyperparameters["attention.sliding_window_pattern"]
    kinds = ["full_attention" if layer % pattern == 0 else "sliding_attention" for layer in range(1, layers + 1)]
    is_27b = layers == 62  # the one size with another query scale; llama.cpp detects it in the same way
    width_per_head = hyperparameters["embedding_length"] // hyperparameters["attention.head_count"]
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": width_per_head if is_27b else hyperparameters["attention.key_length"],
        "sliding_window": hyperparameters["attention.sliding_window"],
        "sliding_window_pattern": pattern,
        "layer_types": kinds,
        "rope_local_base_freq": _shortest(hyperparameters["rope.freq_base_swa"]),
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    }


def _shortest(value: float) -> float:
    """Undo GGUF's float32 rounding: the float with the fewest digits that rounds to the same float32."""
    return float(str(np.float32(value)))


def _rope_scaling(hyperparameters: Mapping[str, Any]) -> dict[str, Any] | None:
    kind, factor = hyperparameters["rope.scaling.type"], hyperparameters["rope.scaling.factor"]
    if kind not in ("none", "linear"):
        raise ValueError(f"rope.scaling.type {kind!r} is not supported; want 'none' or 'linear'")
    return None if kind == "none" or factor in (0, 1) else {"rope_type": "linear", "factor": _shortest(factor)}
