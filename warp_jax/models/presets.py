"""Sizes of published models, to check a model's files and to compile a program without them.

Sources: config.json in each model's repository and, for Gemma, table 1 of arXiv 2403.08295.
"""

import dataclasses

from warp_jax.models.transformer import TransformerConfig

_GEMMA_7B = TransformerConfig(
    vocab_size=256_000,
    width=3072,
    num_layers=28,
    num_heads=16,
    num_kv_heads=16,
    head_dim=256,
    mlp_dim=24_576,
    activation="gelu",
    norm_offset=1.0,
    scale_embedding=True,
)
_LLAMA_3_8B = TransformerConfig(
    vocab_size=128_256,
    width=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    mlp_dim=14_336,
    norm_eps=1e-5,
    tied_head=False,
    rope_theta=500_000.0,
)
MODELS = {
    "gemma_2b": dataclasses.replace(_GEMMA_7B, width=2048, num_layers=18, num_heads=8, num_kv_heads=1, mlp_dim=16_384),
    "gemma_7b": _GEMMA_7B,
    "llama3_8b": _LLAMA_3_8B,
    "llama3_70b": dataclasses.replace(_LLAMA_3_8B, width=8192, num_layers=80, num_heads=64, mlp_dim=28_672),
}
SIZES = ("vocab_size", "width", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_dim")


def check_name(name: str) -> None:
    """Raise ValueError if the name is not in MODELS."""
    if name not in MODELS:
        raise ValueError(f"config.model.size: got {name!r}, want one of {', '.join(MODELS)}, or '' for any model")


def check_size(settings: TransformerConfig, name: str) -> None:
    """Raise ValueError if a model's sizes differ from those of the published model; name '' = no check."""
    if not name:
        return
    check_name(name)
    for size in SIZES:
        got, want = getattr(settings, size), getattr(MODELS[name], size)
        if got != want:
            raise ValueError(f"config.model.size: {name!r} has {size} {want}, but the model has {got}; '' = any model")
