"""Read a LoRA adapter of the PEFT library as whole weights, those of the base model plus the update: W + scale * B A.

Format: adapter_config.json and adapter_model.safetensors (https://huggingface.co/docs/peft, checkpoint format).
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from warp_jax import files
from warp_jax.storage.model_files import ADAPTER as WEIGHTS
from warp_jax.storage.model_files import ADAPTER_CONFIG as CONFIG
from warp_jax.storage.model_files import INDEX, SINGLE
from warp_jax.storage.safetensors_header import FLOATING
from warp_jax.storage.weight_files import SafetensorsFolder, WeightFolder

PREFIX = "base_model.model."  # of every tensor in the file
FACTOR = re.compile(r"(?P<module>.+)\.(?P<kind>lora|lora_embedding)_(?P<factor>[AB])(\.weight)?")
# initialisations that leave the base model unchanged; others (PiSSA, OLoRA, LoftQ, ...) also change its weights
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
# options that change what the factors mean
REFUSED = (
    *("layer_replication", "target_parameters", "trainable_token_indices", "alora_invocation_tokens", "lora_bias"),
    *("velora_config", "monteclora_config", "kasa_config", "arrow_config", "megatron_config"),
)


class Update(NamedTuple):
    """Low-rank update of one weight: scale * B A, transposed for embeddings and for layers that store [in, out]."""

    a: str  # names of the factors: A [rank, in]
    b: str  # B [out, rank]
    scale: float
    transposed: bool


def is_adapter(path: Path) -> bool:
    """Return True if the folder holds a PEFT adapter and no whole model."""
    return (path / CONFIG).is_file() and not any((path / name).is_file() for name in (SINGLE, INDEX))


class LoraFolder(WeightFolder):
    """The weights of a base model with a LoRA adapter added, computed in float64 on request."""

    def __init__(self, path: Path, base: WeightFolder):
        """Raises ValueError if the adapter is not a plain LoRA of this base model."""
        if not (path / WEIGHTS).is_file():
            raise ValueError(f"{path}: {WEIGHTS} is missing; want it beside {CONFIG}")
        self.path = path
        self.tensors = base.tensors
        self._base = base
        self._adapter = SafetensorsFolder(path, [WEIGHTS])
        config = files.read_json(path / CONFIG)
        try:
            _check_config(config)
            self._updates, self._replaced = self._assign(config)
            self._check_not_tied()
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def view(self, name: str, start: int, stop: int) -> np.ndarray:
        """See WeightFolder. The result is float64 where the adapter changes a tensor."""
        if name in self._replaced:
            before = self._adapter.view(self._replaced[name], start, stop)
        else:
            before = self._base.view(name, start, stop)
        if name not in self._updates or start == stop:
            return before
        update = self._updates[name]
        a, b = (self._factor(factor) for factor in (update.a, update.b))
        left, right = (a.T, b.T) if update.transposed else (b, a)
        width = right.shape[1]
        first = start // width
        rows = left[first : -(-stop // width)].astype(np.float64) @ right.astype(np.float64)
        change = rows.reshape(-1)[start - first * width : stop - first * width]
        return before.astype(np.float64) + update.scale * change

    def release(self, name: str, start: int, stop: int) -> None:
        """See WeightFolder."""
        self._base.release(name, start, stop)

    def weight_paths(self) -> Sequence[Path]:
        """See WeightFolder."""
        return [*self._adapter.weight_paths(), self.path / CONFIG]

    def bytes_per_element(self) -> int:
        """See WeightFolder: float64 values of the base model, of the change and of their sum."""
        return self._base.bytes_per_element() + 3 * 8

    def _factor(self, name: str) -> np.ndarray:
        tensor = self._adapter.tensors[name]
        return self._adapter.view(name, 0, tensor.size).reshape(tensor.shape)

    def _assign(self, config: Mapping[str, Any]) -> tuple[dict[str, Update], dict[str, str]]:
        """Find the tensor of the base model that each pair of factors, or each whole tensor, belongs to."""
        updates: dict[str, Update] = {}
        replaced: dict[str, str] = {}
        for name, tensor in self._adapter.tensors.items():
            inner = name.removeprefix(PREFIX).replace(".base_layer.", ".")
            match = FACTOR.fullmatch(inner)
            if tensor.dtype not in FLOATING or not name.startswith(PREFIX):
                raise ValueError(f"tensor {name!r} is not supported, want floats named {PREFIX}...")
            if match is None:
                if inner not in self.tensors or self.tensors[inner].shape != tensor.shape:
                    raise ValueError(f"tensor {name!r} is neither a LoRA factor nor a weight of {self._base.path}")
                replaced[inner] = name
            elif match["factor"] == "A":
                target = f"{match['module']}.weight"
                partner = name.replace(f"{match['kind']}_A", f"{match['kind']}_B")
                transposed = match["kind"] == "lora_embedding" or bool(config.get("fan_in_fan_out"))
                rank = self._check_shapes(target, name, partner, transposed)
                updates[target] = Update(name, partner, _scale(config, match["module"], rank), transposed)
        factors = {factor for update in updates.values() for factor in (update.a, update.b)}
        if extra := self._adapter.tensors.keys() - factors - set(replaced.values()):
            raise ValueError(f"tensor {min(extra)!r} has no lora_A to go with it")
        return updates, replaced

    def _check_shapes(self, target: str, a_name: str, b_name: str, transposed: bool) -> int:
        """Return the rank of two factors. Raises ValueError unless B A has the shape of the target."""
        if b_name not in self._adapter.tensors:
            raise ValueError(f"tensor {a_name!r} has no lora_B to go with it")
        a, b = (self._adapter.tensors[name].shape for name in (a_name, b_name))
        fits = len(a) == len(b) == 2 and a[0] == b[1] > 0
        want = self.tensors[target].shape if target in self.tensors else None
        if not fits or want != ((a[1], b[0]) if transposed else (b[0], a[1])):
            there = "is missing" if want is None else f"has shape {want}"
            raise ValueError(
                f"factors {a} and {b} of {a_name!r} do not fit {target!r}, which {there} in {self._base.path}"
            )
        return a[0]

    def _check_not_tied(self) -> None:
        """Raise ValueError if one of embedding and head changes, and the base model has no head or a copy as head."""
        heads = {"lm_head.weight", "score.weight"} & self.tensors.keys()
        changed = self._updates.keys() | self._replaced.keys()
        for name in [name for name in self.tensors if name.endswith("embed_tokens.weight")]:
            both = changed & {name, *heads}
            if both and all(self._is_copy(head, name) for head in heads):
                raise ValueError(
                    f"changes {min(both)!r}, but embedding and head of {self._base.path} are one "
                    "(tie_word_embeddings); merge the adapter into its base model first"
                )

    def _is_copy(self, head: str, embedding: str) -> bool:
        first, second = self.tensors[head], self.tensors[embedding]
        return first.shape == second.shape and np.array_equal(
            self._base.view(head, 0, first.size), self._base.view(embedding, 0, second.size)
        )


def _check_config(config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{CONFIG}: peft_type is {config.get('peft_type')!r}, want 'LORA'")
    flags = [name for name, value in config.items() if name.startswith("use_") and name != "use_rslora" and value]
    for name in [*flags, *(name for name in REFUSED if config.get(name))]:
        raise ValueError(f"{CONFIG}: {name} is set, and is not supported; merge the adapter into its base model first")
    if config.get("init_lora_weights", True) not in PLAIN_STARTS:
        raise ValueError(
            f"{CONFIG}: init_lora_weights is {config['init_lora_weights']!r}, which also changes the base model; "
            "merge the adapter into its base model first"
        )
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"{CONFIG}: alpha_pattern is {patterns!r:.80}, want a number for each pattern of module names")


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """Return alpha / rank, or alpha / sqrt(rank) for rank-stabilised LoRA (arXiv 2312.03732)."""
    alpha = config.get("lora_alpha")
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        try:
            matches = re.match(rf"(.*\.)?({pattern})$", module)
        except re.error as error:
            raise ValueError(f"{CONFIG}: alpha_pattern: got {pattern!r:.80}, want a regular expression") from error
        if matches:
            alpha = value
            break
    if not isinstance(alpha, int | float):
        raise ValueError(f"{CONFIG}: lora_alpha or alpha_pattern is {alpha!r} for {module}, want a number")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
