"""Find a pretrained model and read its settings: a Hugging Face folder, a .gguf file or a GGUF in a Python package."""

import dataclasses
from pathlib import Path

from warp_jax.data.tokenizer import Tokenizer
from warp_jax.models.transformer import TransformerConfig
from warp_jax.pretrained import gguf_weights, hf_config

KINDS = {"language": "a language model (...ForCausalLM)", "scalar": "a reward model (...ForSequenceClassification)"}


def find(source: str) -> Path:
    """Path of the Hugging Face folder of a model source; GGUF sources are converted first (`gguf_weights.resolve`)."""
    return gguf_weights.resolve(source)


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
