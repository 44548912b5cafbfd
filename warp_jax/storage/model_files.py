"""Choose the files that make up a model in a folder, as transformers does: for loading, merging and fingerprints."""

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from warp_jax import files

SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
ADAPTER_CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"
EXPORT_REPORT = "warp_export.json"  # says how a folder was exported from a workdir; belongs to this folder only
SIDECARS = (".json", ".txt", ".model", ".jinja", ".tiktoken")  # suffixes of config and tokenizer files
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
HINTS = {  # patterns of other names: what such a file is
    r"model\.safetensors": "a folder or a broken link, not a file",
    r"model-\d+-of-\d+\.safetensors": f"a part of a model without its {INDEX}; download the index too",
    r"consolidated.*": "weights with the names of Mistral's own library; download the files that transformers reads",
    r"model\..+\.safetensors": f"a variant; rename it to {SINGLE} if you want it",
    r"adapter.*": f"a LoRA adapter without its {ADAPTER_CONFIG}",
    r".*": f"a file that transformers does not read; rename it to {SINGLE} if it is the model",
}


class ModelFiles(NamedTuple):
    """Files of a model; names are relative to the folder."""

    folder: Path
    weights: tuple[str, ...]  # safetensors files
    weight_map: Mapping[str, str] | None  # file of each tensor by the index; None = one file, without an index

    @property
    def sidecars(self) -> list[Path]:
        """The other files of the model: config, tokenizer."""
        found = (path for path in sorted(self.folder.iterdir()) if path.suffix in SIDECARS and path.is_file())
        return [path for path in found if not path.name.endswith(".index.json")]


def find(folder: Path) -> ModelFiles:
    """Return the files of a model: model.safetensors, else the files in model.safetensors.index.json.

    Raises ValueError if the folder has neither, is a LoRA adapter, or the index and the files disagree.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; want a safetensors folder or an Orbax checkpoint")
    whole = [name for name in (SINGLE, INDEX) if (folder / name).is_file()]
    if (folder / ADAPTER_CONFIG).is_file():
        raise ValueError(f"{folder}: {_adapter_reason(whole)}")
    if read_config(folder).get("transformers_weights") not in (None, *whole[:1]):
        raise ValueError(f"{folder / CONFIG}: field 'transformers_weights' is not supported; remove it")
    if not whole:
        raise ValueError(f"{folder}: {_reason_without_weights(folder)}")
    if whole[0] == SINGLE:
        return ModelFiles(folder, (SINGLE,), None)
    weight_map = _read_index(folder)
    return ModelFiles(folder, tuple(sorted(set(weight_map.values()))), weight_map)


def read_config(folder: Path) -> dict[str, Any]:
    """Content of config.json; {} if it is missing. Raises ValueError if it is not a JSON object."""
    path = folder / CONFIG
    return files.read_json(path) if path.is_file() else {}


def fingerprint(folder: Path) -> str:
    """Hash name, size and pieces of every file of a model. Fast at any size; further training changes the hash."""
    chosen = find(folder)
    return files.fingerprint(folder, sorted([*chosen.weights, *(path.name for path in chosen.sidecars)]))


def _read_index(folder: Path) -> dict[str, str]:
    path = folder / INDEX
    weight_map = files.read_json(path).get("weight_map")
    if not (isinstance(weight_map, dict) and weight_map and all(isinstance(x, str) for x in weight_map.values())):
        raise ValueError(f"{path}: weight_map is {weight_map!r:.80}, want a file for each tensor; download it again")
    for name in sorted(set(weight_map.values())):
        inside = PurePosixPath(name)
        if inside.is_absolute() or ".." in inside.parts or inside.suffix != ".safetensors" or "\0" in name:
            raise ValueError(f"{path}: names the file {name!r}, want .safetensors files inside the folder")
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: {name} is missing; {INDEX} lists it")
    return weight_map


def _adapter_reason(whole: list[str]) -> str:
    if whole:
        return (
            f"holds a whole model ({whole[0]}) and a LoRA adapter ({ADAPTER_CONFIG}); remove the files of one of them"
        )
    return (
        "is a LoRA adapter, not a whole model; scripts/merge.py takes it as one of --policies, with its base model as "
        "--init; otherwise merge it into its base model first"
    )


def _reason_without_weights(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    if inside := [path.parent for depth in ("*", "*/*", "*/*/*") for path in folder.glob(f"{depth}/_METADATA")]:
        best = max(inside, key=lambda path: (path.name == "params", [int(x) for x in path.parts if x.isdecimal()]))
        return f"is no checkpoint itself, but contains {len(inside)}; give the folder of one, such as {best}"
    stored = [name for name in names if name.endswith(".safetensors")]
    for pattern, meaning in HINTS.items():
        if matching := [name for name in stored if re.fullmatch(pattern, name)]:
            return f"contains neither {SINGLE} nor {INDEX}; {matching[0]} is {meaning}"
    if pickled := [name for name in names if name.endswith(PICKLED)]:
        return f"contains {pickled[0]}, a pickle that can run code; want .safetensors files; convert it first"
    return "contains no .safetensors file and is no Orbax checkpoint; want one of the two"
