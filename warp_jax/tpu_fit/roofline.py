"""What a step of RL takes at least: operations and bytes from sizes alone, and the time of each at a chip's peaks.

A lower bound from published figures, never a measurement. S = P + C tokens a row; N parameters in products of matrices
(the embedding's lookup is none, a tied head is one). All weights are taken as trained: with `model.trainable`, whose
update does less, it is no lower bound.
"""

from typing import NamedTuple

from warp_jax.models.transformer import TransformerConfig
from warp_jax.tpu_fit.chips import Chip


class Work(NamedTuple):
    """Of one program on one chip. flops: floating-point operations; hbm: bytes from and to its memory."""

    flops: float
    hbm: float


class Sizes(NamedTuple):
    """Of one step: completions, tokens of prompt and completion, and chips along data x fsdp and along tensor."""

    batch: int
    prompt: int
    completion: int
    batch_chips: int
    tensor: int

    @property
    def chips(self) -> int:
        """All chips of the mesh."""
        return self.batch_chips * self.tensor


def matmul_parameters(model: TransformerConfig) -> int:
    """N: weights that a token is multiplied by."""
    heads = 2 * model.num_heads + 2 * model.num_kv_heads
    layer = model.width * model.head_dim * heads + 3 * model.width * model.mlp_dim
    return model.num_layers * layer + head_parameters(model)


def head_parameters(model: TransformerConfig) -> int:
    """Those of N that only a token with an output is multiplied by."""
    return model.width * (model.vocab_size if model.head == "language" else 1)


def forward_flops(model: TransformerConfig, batch: int, length: int, outputs: int) -> float:
    """One forward pass over whole sequences: 2 N a token, and causal attention; the head at `outputs` tokens a row."""
    head = head_parameters(model)
    products = 2.0 * batch * ((matmul_parameters(model) - head) * length + head * outputs)
    return products + _attention_flops(model, batch * length, length / 2)


def generation(model: TransformerConfig, sizes: Sizes, weight_bytes: int = 2) -> Work:
    """A prefill, which gives the first token; then for every token the chip's part of all weights and of the keys and
    values so far is read.
    """
    tokens, seen = sizes.batch * (sizes.completion - 1), sizes.prompt + sizes.completion / 2
    flops = forward_flops(model, sizes.batch, sizes.prompt, 1)
    flops += 2.0 * matmul_parameters(model) * tokens + _attention_flops(model, tokens, seen)
    weights = weight_bytes * matmul_parameters(model) / sizes.tensor
    heads = model.num_kv_heads / min(sizes.tensor, model.num_kv_heads)
    cache = sizes.batch / sizes.batch_chips * seen * 2 * weight_bytes * model.num_layers * heads * model.head_dim
    return Work(flops / sizes.chips, sizes.completion * (weights + cache))


def scoring(model: TransformerConfig, sizes: Sizes) -> Work:
    """One forward pass over prompt and completion, as the reward model makes."""
    length = sizes.prompt + sizes.completion
    flops = forward_flops(model, sizes.batch, length, length)
    return Work(flops / sizes.chips, 4 * matmul_parameters(model) / sizes.chips)


def update(model: TransformerConfig, sizes: Sizes, *, remat: bool, in_pieces: bool) -> Work:
    """Scores of policy and anchor (2 forward passes), the gradient (3), of the completion's tokens; Adam and EMA, which
    read policy, anchor, two moments and gradient, and write all but the gradient, in float32.

    remat: the layers are computed once more for the gradient; in_pieces: so is the head, a piece of the logits at once.
    """
    length = sizes.prompt + sizes.completion
    layers = forward_flops(model, sizes.batch, length, 0)
    head = forward_flops(model, sizes.batch, length, sizes.completion) - layers
    flops = (5 + remat) * layers + (5 + in_pieces) * head
    return Work(flops / sizes.chips, 4 * 9 * matmul_parameters(model) / sizes.chips)


def seconds(work: Work, sent: float, chip: Chip) -> dict[str, float]:
    """Time that each resource alone would take; sent: bytes that the chip sends to others."""
    return {
        "compute": work.flops / chip.bf16_flops,
        "memory": work.hbm / chip.hbm_bandwidth,
        "network": sent / chip.ici_bandwidth,
    }


def _attention_flops(model: TransformerConfig, queries: float, keys: float) -> float:
    """Scores and weighted sums of queries that see `keys` keys on average."""
    return 4.0 * queries * keys * model.num_heads * model.head_dim * model.num_layers
