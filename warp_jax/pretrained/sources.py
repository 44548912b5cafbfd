"""Where a pretrained model comes from: a Hugging Face folder, a .gguf file or a packaged GGUF."""

import dataclasses
from pathlib import Path

from warp_jax.data.tokenizer import Tokenizer
from warp_jax.models.transformer import TransformerConfig
from warp_jax.pretrained import gguf_weights, hf_config

KINDS = {"language": "a language model (...ForCausalLM)", "scalar": "a reward model (...ForSequenceClassification)"}


def find(source: str) -> Path:
    """The folder of a model: a Hugging Face folder, or what a .gguf file or package:NAME was converted to."""
    return gguf_weights.resolve(source)


def read_settings(folder: Path, head: str, dtype: str) -> TransformerConfig:
    """Settings of the model in a folder. ValueError if it has another head, or more tokens than embeddings."""
    config = hf_config.read_config(folder)
    if config.head != head:
        raise ValueError(f"{folder}: is {KINDS[config.head]}, want {KINDS[head]}")
    tokens = Tokenizer.from_folder(folder).text_vocab_size
    if tokens > config.vocab_size:
        raise ValueError(
            f"{folder / 'tokenizer.json'}: has {tokens} tokens, but model.embed_tokens.weight only {config.vocab_size} "
            "rows; want the tokenizer of this model"
        )
    return dataclasses.replace(config, dtype=dtype)
