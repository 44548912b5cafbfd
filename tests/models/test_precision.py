"""Dtypes and precision of the products that log-probabilities are made of, in the program that a TPU would get."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from warp_jax.models import apply
from warp_jax.models.transformer import Transformer, TransformerConfig

SIZES = {
    "vocab_size": 96,
    "width": 32,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 16,
    "mlp_dim": 64,
}
DOT = re.compile(r"stablehlo\.dot_general.*?(?:precision = \[(\w+), \w+\])?\s*:.*-> tensor<([\dx]*)x(\w+)>")

# operations whose result has the shape of the scores of 3 rows, 2 heads, 5 queries and keys, in either order
OF_SCORES = re.compile(r"= stablehlo\.(\w+) .*tensor<3x1x(?:5x5x2|2x5x5)x(\w+)>$")


def _lowered(config):
    """The lines of the forward pass of 3 x 5 tokens, as lowered for a TPU."""
    shapes = {"params": apply.param_shapes(config)}
    ids = jax.ShapeDtypeStruct((3, 5), jnp.int32)
    mask = jax.ShapeDtypeStruct((3, 5), jnp.bool_)
    text = jax.jit(Transformer(config).apply).trace(shapes, ids, mask).lower(lowering_platforms=("tpu",)).as_text()
    return text.splitlines()


def _products(config):
    """(output shape, output dtype, precision) of every product in the forward pass."""
    found = [DOT.search(line).groups() for line in _lowered(config) if "dot_general" in line]
    return [(shape, dtype, precision) for precision, shape, dtype in found]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "lm_head"])
def test_head_and_scores_come_out_in_float32(tied):
    """Fails when the head's product, or q k, is rounded to bfloat16 and widened after."""
    products = _products(TransformerConfig(**SIZES, dtype="bfloat16", tied_head=tied))
    assert ("15x96", "f32") in [p[:2] for p in products]  # logits of 3 x 5 tokens
    assert not [p for p in products if p[0].endswith("96") and p[1] != "f32"]
    assert ("3x1x5x5x2", "f32") in [p[:2] for p in products]  # scores of 5 queries and keys, 2 heads
    assert ("15x64", "bf16") in [p[:2] for p in products]  # the mlp stays in bfloat16


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_attention_rounds_its_weights_once_and_nothing_before(softcap):
    """Fails when scores, the softcap, or the softmax (its difference, exponential, sum or quotient) are in bfloat16, or
    scores are narrowed and widened again."""
    lines = _lowered(TransformerConfig(**SIZES, dtype="bfloat16", attention_softcap=softcap))
    of_scores = [match.groups() for line in lines if (match := OF_SCORES.search(line))]
    assert [name for name, dtype in of_scores if dtype == "bf16"] == ["convert"]
    assert {"dot_general", "exponential", "divide"} <= {name for name, dtype in of_scores if dtype == "f32"}


@pytest.mark.parametrize("head", ["language", "scalar"])
def test_float32_means_float32_on_a_tpu(head):
    """Fails when a product of float32 factors leaves its precision to the backend, which takes bfloat16 passes."""
    products = _products(TransformerConfig(**SIZES, dtype="float32", head=head))
    assert {precision for _, dtype, precision in products if dtype == "f32"} == {"HIGHEST"}
    assert {dtype for _, dtype, _ in products} == {"f32"}


def test_the_score_head_of_a_bfloat16_model_is_float32():
    """Fails when the score's product leaves its precision to the backend."""
    products = _products(TransformerConfig(**SIZES, dtype="bfloat16", head="scalar"))
    assert ("15x1", "f32", "HIGHEST") in products


def test_bfloat16_logits_are_near_those_of_float32_products():
    """Fails when logits are rounded to bfloat16: their error is then 2^-9 of the largest logits."""
    config = TransformerConfig(**SIZES, dtype="bfloat16")
    hidden = jax.random.normal(jax.random.key(0), (2, 3, 32), jnp.bfloat16)
    params = {"params": {"embed": {"embedding": jax.random.normal(jax.random.key(1), (96, 32)).astype(jnp.bfloat16)}}}
    got = Transformer(config).apply(params, hidden, method="head")
    table = np.asarray(params["params"]["embed"]["embedding"], np.float64)
    np.testing.assert_allclose(got, np.asarray(hidden, np.float64) @ table.T, atol=1e-4)
