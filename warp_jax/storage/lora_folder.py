"""Read a LoRA adapter of the PEFT library as the weights that it makes of a base model: W + scale * B A.

Format: adapter_config.json and adapter_model.safetensors (https://huggingface.co/docs/peft, checkpoint format).
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from warp_jax import files
from warp_jax.storage.weight_files import FLOATING, SafetensorsFolder, WeightFolder

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every tensor in the file
FACTOR = re.compile(r"(?P<module>.+)\.(?P<kind>lora|lora_embedding)_(?P<factor>[AB])(\.weight)?")
# initialisations that leave the base model unchanged; the others (PiSSA, OLoRA, LoftQ, ...) also change its weights
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
    """True if the folder holds a PEFT adapter."""
    return (path / CONFIG).is_file()


class LoraFolder(WeightFolder):
    """The weights of a base model with a LoRA adapter added, computed in float64 on request."""

    def __init__(self, path: Path, base: WeightFolder):
        """Raises ValueError if the adapter is not a plain LoRA of this base model; the message says why."""
        if not (path / WEIGHTS).is_file():
            raise ValueError(f"{path}: {WEIGHTS} is missing; want it beside {CONFIG}")
        self.path = path
        self.tensors = base.tensors
        self._base = base
        self._adapter = SafetensorsFolder(path, [WEIGHTS])
        try:
            config = files.read_json(path / CONFIG)
            _check_config(config)
            self._updates, self._replaced = self._assign(config)
        except (ValueError, KeyError, TypeError, AttributeError, re.error) as error:
            raise ValueError(f"{path}: {error}") from error

    def view(self, name: str, start: int, stop: int) -> np.ndarray:
        """See WeightFolder. The result is float64 where the adapter changes a tensor."""
        if name in self._replaced:
            return self._adapter.view(self._replaced[name], start, stop)
        before = self._base.view(name, start, stop)
        if name not in self._updates or start == stop:
            return before
        update = self._updates[name]
        a, b = (self._factor(factor) for factor in (update.a, update.b))
        left, right = (a.T, b.T) if update.transposed else (b, a)
        width = right.shape[1]
        first = start // width
        rows = left[first : -(-stop // width)] @ right
        change = rows.reshape(-1)[start - first * width : stop - first * width]
        return before.astype(np.float64) + update.scale * change

    def release(self, name: str, start: int, stop: int) -> None:
        """See WeightFolder."""
        self._base.release(name, start, stop)

    def weight_paths(self) -> Sequence[Path]:
        """See WeightFolder."""
        return self._adapter.weight_paths()

    def _factor(self, name: str) -> np.ndarray:
        tensor = self._adapter.tensors[name]
        return self._adapter.view(name, 0, tensor.size).astype(np.float64).reshape(tensor.shape)

    def _assign(self, config: Mapping[str, Any]) -> tuple[dict[str, Update], dict[str, str]]:
        """Find the tensor of the base model that each pair of factors, or each whole tensor, belongs to."""
        updates: dict[str, Update] = {}
        replaced: dict[str, str] = {}
        for name, tensor in self._adapter.tensors.items():
            inner = name.removeprefix(PREFIX)
            match = FACTOR.fullmatch(inner)
            if tensor.dtype not in FLOATING or inner == name:
                raise ValueError(f"tensor {name!r} is not supported, want floats named {PREFIX}...")
            if match is None:
                if inner not in self.tensors or self.tensors[inner].shape != tensor.shape:
                    raise ValueError(f"tensor {name!r} is neither a LoRA factor nor a weight of {self._base.path}")
                replaced[inner] = name
            elif match["factor"] == "A":
                target = f"{match['module']}.weight"
                partner = name.replace(f"{match['kind']}_A", f"{match['kind']}_B")
                transposed = match["kind"] == "lora_embedding" or bool(config.get("fan_in_fan_out"))
                scale = _scale(config, match["module"], tensor.shape[0])
                updates[target] = Update(name, partner, scale, transposed)
                self._check_shapes(target, updates[target])
        factors = {factor for update in updates.values() for factor in (update.a, update.b)}
        if extra := self._adapter.tensors.keys() - factors - set(replaced.values()):
            raise ValueError(f"tensor {min(extra)!r} has no lora_A beside it")
        return updates, replaced

    def _check_shapes(self, target: str, update: Update) -> None:
        if update.b not in self._adapter.tensors:
            raise ValueError(f"tensor {update.a!r} has no lora_B beside it")
        a, b = (self._adapter.tensors[name].shape for name in (update.a, update.b))
        got = (b[0], a[1]) if len(a) == len(b) == 2 and a[0] == b[1] else None
        got = got[::-1] if got and update.transposed else got
        want = self.tensors[target].shape if target in self.tensors else None
        if want is None or got != want:
            there = "is missing" if want is None else f"has shape {want}"
            raise ValueError(
                f"factors {a} and {b} of {update.a!r} do not fit {target!r}, which {there} in {self._base.path}"
            )


def _check_config(config: Mapping[str, Any]) -> None:
    if config["peft_type"] != "LORA":
        raise ValueError(f"{CONFIG}: peft_type is {config['peft_type']!r}, want 'LORA'")
    flags = [name for name, value in config.items() if name.startswith("use_") and name != "use_rslora" and value]
    for name in [*flags, *(name for name in REFUSED if config.get(name))]:
        raise ValueError(f"{CONFIG}: {name} is set, and is not supported; merge the adapter into its base model first")
    if config.get("init_lora_weights", True) not in PLAIN_STARTS:
        raise ValueError(
            f"{CONFIG}: init_lora_weights is {config['init_lora_weights']!r}, which also changes the base model; "
            "merge the adapter into its base model first"
        )


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """Return alpha / rank, or alpha / sqrt(rank) for rank-stabilised LoRA (arXiv 2312.03732)."""
    alpha = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
