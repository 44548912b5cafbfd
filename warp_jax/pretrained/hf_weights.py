"""Load the weights of a Hugging Face safetensors folder onto a mesh, and export them.

NAMES maps our leaf paths to tensor names; POST_NORM_NAMES does so for Gemma 2 and 3. A stored linear layer is a matrix
[outputs, inputs]; ours are [*inputs, *outputs], stacked over layers.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from warp_jax import files, naming, trees
from warp_jax.models.transformer import TransformerConfig
from warp_jax.pretrained import hf_config
from warp_jax.storage.safetensors_header import FLOATING, Tensor
from warp_jax.storage.weight_files import OUTPUT_DTYPES, SafetensorsWriter, WeightFolder, open_weights
from warp_jax.types import Params

NAMES = {
    "embed/embedding": "model.embed_tokens.weight",
    "final_norm/scale": "model.norm.weight",
    "lm_head/kernel": "lm_head.weight",
    "score/kernel": "score.weight",
    "attention_norm/scale": "input_layernorm.weight",
    "mlp_norm/scale": "post_attention_layernorm.weight",
    **{f"attention/{x}/kernel": f"self_attn.{x}_proj.weight" for x in "qkvo"},
    **{f"attention/{x}/bias": f"self_attn.{x}_proj.bias" for x in "qkv"},
    **{f"attention/{x}_norm/scale": f"self_attn.{x}_norm.weight" for x in "qk"},
    **{f"mlp/{x}/kernel": f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")},
}
POST_NORM_NAMES = {  # for models with `post_norms`
    **NAMES,
    "attention_post_norm/scale": "post_attention_layernorm.weight",
    "mlp_norm/scale": "pre_feedforward_layernorm.weight",
    "mlp_post_norm/scale": "post_feedforward_layernorm.weight",
}
# in models with images: the part of a text tensor's name that models without images lack, and the other tensors
TEXT_TOWER = re.compile(r"^(model\.)?language_model\.")
NOT_TEXT = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
COMPUTED = "rotary_emb.inv_freq"  # suffix of tensors in old files that are computed from the config
SHARD_BYTES = 5_000_000_000


class Slice(NamedTuple):
    """One layer of a stacked leaf, or a whole leaf that is not stacked."""

    leaf: str  # our leaf path
    layer: int | None  # index in the stack; None = not stacked
    shape: tuple[int, ...]  # our shape
    num_inputs: int  # number of leading input axes of a linear layer; 0 = not a linear layer

    @property
    def stored_shape(self) -> tuple[int, ...]:
        if not self.num_inputs:
            return self.shape if self.leaf == "embed/embedding" else (math.prod(self.shape),)
        inputs, outputs = self.shape[: self.num_inputs], self.shape[self.num_inputs :]
        return math.prod(outputs), math.prod(inputs)

    def from_stored(self, values: np.ndarray) -> np.ndarray:
        """View a stored tensor with our axes."""
        k, n = self.num_inputs, len(self.shape)
        return values.reshape(*self.shape[k:], *self.shape[:k]).transpose(*range(n - k, n), *range(n - k))

    def to_stored(self, values: np.ndarray) -> np.ndarray:
        """Values in the stored order, flattened: the inverse of `from_stored`."""
        k, n = self.num_inputs, len(self.shape)
        return values.transpose(*range(k, n), *range(k)).reshape(-1)


def load_params(folder: Path, config: TransformerConfig, like: Params) -> Params:
    """Load parameters from a folder, with the shapes, dtypes and shardings of `like` (jax.ShapeDtypeStruct).

    Each device reads only its own part of each tensor, from a memory-mapped file. Raises as `check_weights`.
    """
    weights, slices = check_weights(folder, config, like)

    def load_leaf(path: tuple[Any, ...], leaf: Any) -> jax.Array:
        parts = {part.layer: (name, part) for name, part in slices.items() if part.leaf == trees.path_name(path)}

        def read(index: Any) -> np.ndarray:
            if None in parts:
                return _read(weights, *parts[None], index, leaf.dtype)
            layers = range(leaf.shape[0])[index[0]]
            return np.stack([_read(weights, *parts[layer], index[1:], leaf.dtype) for layer in layers])

        return jax.make_array_from_callback(leaf.shape, leaf.sharding, read)

    return jax.tree_util.tree_map_with_path(load_leaf, like)


def check_weights(folder: Path, config: TransformerConfig, like: Params) -> tuple[WeightFolder, dict[str, Slice]]:
    """Check that a folder has exactly the tensors of a model. Returns the open files, and our slices by tensor name.

    Raises ValueError, naming file and tensor, if one is missing, unexpected, of another shape or not floating-point.
    """
    weights = open_weights(folder)
    kind = files.read_json(folder / hf_config.CONFIG)["architectures"][0]
    stored = _stored_names(weights, has_images=kind.endswith("ForConditionalGeneration"))
    slices = slices_of(like, config)
    for name, part in slices.items():
        if name not in stored:
            raise ValueError(f"{weights.path}: tensor {name!r} is missing, want shape {part.stored_shape}")
        tensor, where = weights.tensors[stored[name]], _place(weights, stored[name])
        if tensor.shape != part.stored_shape:
            raise ValueError(f"{where} has shape {tensor.shape}, want {part.stored_shape} by {hf_config.CONFIG}")
        if tensor.dtype not in FLOATING:
            raise ValueError(
                f"{where} is {tensor.dtype}, want a floating-point type: quantised weights are not supported"
            )
    if config.tied_head and "lm_head.weight" in stored:
        _check_tied(weights, stored.pop("lm_head.weight"), stored["model.embed_tokens.weight"])
    for name in stored.keys() - slices.keys():
        raise ValueError(f"{_place(weights, stored[name])} is unexpected: the model has no such weight")
    return weights, {stored[name]: part for name, part in slices.items()}


def export_params(
    params: Params,
    config: TransformerConfig,
    out: Path,
    *,
    dtype: str,
    config_json: Mapping[str, Any] | None = None,
    sidecars: Sequence[Path] = (),
) -> None:
    """Write a model folder for transformers and vLLM, copying one tensor at a time from the devices.

    out: a new folder. dtype: of the written weights, 'float32', 'bfloat16' or 'float16'. config_json: content of
    config.json, by default made from `config`. sidecars: files to copy, such as the tokenizer's.
    Raises ValueError for a weight that is not finite in dtype.
    """
    if dtype not in OUTPUT_DTYPES:
        raise ValueError(f"dtype: got {dtype!r}, want one of {', '.join(OUTPUT_DTYPES)}")
    content = dict(config_json or hf_config.to_json(config, dtype))
    content.update({key: dtype for key in ("dtype", "torch_dtype") if key in content})
    slices = slices_of(params, config)
    tensors = _shard([(name, s.stored_shape) for name, s in slices.items()], OUTPUT_DTYPES[dtype])
    leaves = {trees.path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    out.mkdir(parents=True)
    writer = SafetensorsWriter(out, tensors)
    for name, part in slices.items():
        leaf = leaves[part.leaf]
        values = np.asarray(jax.device_get(leaf if part.layer is None else leaf[part.layer]))
        with np.errstate(over="ignore"):
            stored = part.to_stored(values).astype(OUTPUT_DTYPES[dtype])
        if not np.isfinite(stored).all():
            raise ValueError(f"weight {name!r} holds NaN or Inf as {dtype}, want finite numbers; set a wider --dtype")
        writer.write(name, 0, stored)
    writer.close()
    files.write_json(out / hf_config.CONFIG, content)
    for path in sidecars:
        files.write_bytes(out / path.name, path.read_bytes())


def slices_of(tree: Params, config: TransformerConfig) -> dict[str, Slice]:
    """Map the standard tensor name of every layer to its slice; `tree` holds arrays or shapes."""
    table = POST_NORM_NAMES if config.post_norms else NAMES
    slices: dict[str, Slice] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = trees.path_name(path)
        inputs = naming.num_inputs(name)
        if not naming.is_stacked(name):
            slices[table[name]] = Slice(name, None, leaf.shape, inputs)
            continue
        for layer, layer_name in enumerate(naming.layer_names(name, leaf.shape[0])):
            _, number, rest = layer_name.split("/", 2)
            slices[f"model.layers.{number}.{table[rest]}"] = Slice(name, layer, leaf.shape[1:], inputs)
    return slices


def _read(weights: WeightFolder, name: str, part: Slice, index: tuple[slice, ...], dtype: Any) -> np.ndarray:
    tensor = weights.tensors[name]
    values = part.from_stored(weights.view(name, 0, tensor.size))[index].astype(dtype)
    weights.release(name, 0, tensor.size)
    return values


def _stored_names(weights: WeightFolder, *, has_images: bool) -> dict[str, str]:
    """Map the standard name (that of a text-only model) of each text tensor to its name in the file."""
    names: dict[str, str] = {}
    for stored in weights.tensors:
        if stored.endswith(COMPUTED) or (has_images and stored.startswith(NOT_TEXT)):
            continue
        name = TEXT_TOWER.sub(r"\1", stored) if has_images else stored
        if name in names:
            raise ValueError(
                f"{weights.path}: {names[name]!r} and {stored!r} are the same weight, want only one of them"
            )
        names[name] = stored
    return names


def _place(weights: WeightFolder, name: str) -> str:
    return f"{weights.path / weights.tensors[name].file}: tensor {name!r}"


def _check_tied(weights: WeightFolder, head: str, embedding: str) -> None:
    """Raise ValueError if the output head that some files of tied models store is not the embedding."""
    first, second = (weights.view(name, 0, weights.tensors[name].size) for name in (head, embedding))
    if not np.array_equal(first, second):
        raise ValueError(f"{_place(weights, head)} differs from {embedding!r}, but tie_word_embeddings is true")


def _shard(tensors: Sequence[tuple[str, tuple[int, ...]]], dtype: np.dtype) -> list[Tensor]:
    """Assign (name, shape) tensors, in order, to files of at most SHARD_BYTES."""
    numbers, total, number = [], 0, 0
    for _, shape in tensors:
        size = math.prod(shape) * dtype.itemsize
        if total and total + size > SHARD_BYTES:
            number, total = number + 1, 0
        total += size
        numbers.append(number)
    count = number + 1
    numbered = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    names = numbered if count > 1 else ["model.safetensors"]
    return [Tensor(name, dtype, shape, names[i]) for (name, shape), i in zip(tensors, numbers, strict=True)]
