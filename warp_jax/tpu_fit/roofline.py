"""Lower bound on the time of an RL step: operations and bytes from the model's sizes, divided by a chip's peak rates.

The peaks are published figures; nothing is measured. A row has S = P + C tokens. N counts the parameters in matrix
products: a tied head counts, the embedding lookup does not. All weights are assumed to be trained, so with
`model.trainable` or `model.lora`, which make the update cheaper, the result is not a lower bound.
"""

import math
from typing import NamedTuple

from jax.sharding import AbstractMesh

from warp_jax.models.transformer import TransformerConfig
from warp_jax.parallel import meshes
from warp_jax.settings import Settings
from warp_jax.tpu_fit.chips import Chip
from warp_jax.training import reinforce


class Work(NamedTuple):
    """Work of one program on one chip."""

    flops: float  # floating-point operations
    hbm: float  # bytes read from and written to the chip's memory


def matmul_parameters(model: TransformerConfig) -> int:
    """N, the number of parameters in matrix products."""
    heads = 2 * model.num_heads + 2 * model.num_kv_heads
    layer = model.width * model.head_dim * heads + 3 * model.width * model.mlp_dim
    return model.num_layers * layer + head_parameters(model)


def head_parameters(model: TransformerConfig) -> int:
    """The part of N that is in the head, which only tokens with an output pass through."""
    return model.width * (model.vocab_size if model.head == "language" else 1)


def forward_flops(model: TransformerConfig, batch: int, length: int, outputs: int) -> float:
    """FLOPs of a forward pass: 2 N per token plus causal attention; the head runs on `outputs` tokens per row."""
    head = head_parameters(model)
    products = 2.0 * batch * ((matmul_parameters(model) - head) * length + head * outputs)
    return products + _attention_flops(model, batch * length, length / 2)


def generation(model: TransformerConfig, settings: Settings) -> Work:
    """Work of sampling in bfloat16: a prefill gives the first token; each token reads weights, keys and values.

    Samples of a prompt share its prefill as in training.
    """
    batch, prompt, completion = (
        settings.rl.batch_size,
        settings.sampling.prompt_tokens,
        settings.sampling.max_new_tokens,
    )
    chips, tensor = math.prod(settings.mesh), settings.sampling.tensor or settings.mesh[2]
    tokens, seen = batch * (completion - 1), prompt + completion / 2
    prompts = batch // reinforce.shared_samples(settings.rl, AbstractMesh(settings.mesh, meshes.AXES))
    flops = forward_flops(model, prompts, prompt, 1)
    flops += 2.0 * matmul_parameters(model) * tokens + _attention_flops(model, tokens, seen)
    weights = 2 * matmul_parameters(model) / tensor
    heads = model.num_kv_heads / (1 if model.num_kv_heads % tensor else tensor)
    cache = batch * tensor / chips * seen * 2 * 2 * model.num_layers * heads * model.head_dim
    return Work(flops / chips, completion * (weights + cache))


def scoring(model: TransformerConfig, settings: Settings) -> Work:
    """Work of the reward model: one forward pass over prompt and completion."""
    length, chips = settings.sampling.prompt_tokens + settings.sampling.max_new_tokens, math.prod(settings.mesh)
    flops = forward_flops(model, settings.rl.batch_size, length, length)
    return Work(flops / chips, 4 * matmul_parameters(model) / chips)


def update(model: TransformerConfig, settings: Settings) -> Work:
    """Work of the update: forward passes of policy and anchor, gradient (2 passes more), Adam and EMA.

    The policy has a second forward pass if advantages need other microbatches (`reinforce.scores_once`). The gradient
    needs one more of the layers with full remat, and of the head if its logits are made in pieces. Samples of a prompt
    share its tokens, if they can (`reinforce.shared_samples`). Adam and EMA read policy, anchor, two moments and
    gradient, and write all but the gradient, in float32.
    """
    rl, chips, mesh = settings.rl, math.prod(settings.mesh), AbstractMesh(settings.mesh, meshes.AXES)
    batch, prompt, completion = rl.batch_size, settings.sampling.prompt_tokens, settings.sampling.max_new_tokens
    prompts = batch // reinforce.shared_samples(rl, mesh, rl.num_microbatches)
    head = 2.0 * batch * completion * head_parameters(model)
    layers = forward_flops(model, batch, prompt + completion, 0) - forward_flops(model, batch - prompts, prompt, 0)
    in_pieces = 0 < settings.model.logits_chunk < completion
    passes = 4 + (not reinforce.scores_once(rl, batch))
    flops = (passes + (model.remat == "full")) * layers + (passes + in_pieces) * head
    return Work(flops / chips, 4 * 9 * matmul_parameters(model) / chips)


def seconds(work: Work, sent: float, chip: Chip) -> dict[str, float]:
    """Seconds that each resource alone would take, if the chip sends `sent` bytes to other chips."""
    return {
        "compute": work.flops / chip.bf16_flops,
        "memory": work.hbm / chip.hbm_bandwidth,
        "network": sent / chip.ici_bandwidth,
    }


def _attention_flops(model: TransformerConfig, queries: float, keys: float) -> float:
    """FLOPs of scores and weighted sums, for queries that attend to `keys` keys on average."""
    return 4.0 * queries * keys * model.num_heads * model.head_dim * model.num_layers
