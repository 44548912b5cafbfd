"""Operations and bytes of a step, by hand."""

import jax
import pytest

from warp_jax import roofline
from warp_jax.chips import CHIPS
from warp_jax.models import functions, published
from warp_jax.models.transformer import TransformerConfig
from warp_jax.roofline import Sizes

TINY = TransformerConfig(
    vocab_size=10, width=4, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=6, mlp_dim=8, tied_head=False
)
N = 2 * (4 * 6 * (2 + 1 + 1 + 2) + 3 * 4 * 8) + 4 * 10
SIZES = Sizes(batch=8, prompt=3, completion=5, batch_chips=2, tensor=2)


def test_parameters_are_those_of_the_model():
    """Fails when a projection is left out: norms and the lookup table are all that is not multiplied."""
    shapes = functions.param_shapes(TINY)
    kernels = [x.size for path, x in jax.tree_util.tree_leaves_with_path(shapes) if "kernel" in str(path)]
    assert roofline.matmul_parameters(TINY) == N == sum(kernels)


def test_gemma_7b_has_its_size():
    """Fails when a published size is wrong: 8.54 billion weights (arXiv 2403.08295, table 2), the embedding shared."""
    assert roofline.matmul_parameters(published.MODELS["gemma_7b"]) / 1e9 == pytest.approx(8.54, rel=2e-3)
    assert roofline.matmul_parameters(published.MODELS["llama3_70b"]) / 1e9 == pytest.approx(70.6 - 1.05, rel=2e-3)


def test_forward_pass_by_hand():
    """Fails when attention is not causal, or a multiplication and its addition count once."""
    assert roofline.forward_flops(TINY, 8, 8) == 2 * N * 64 + 4 * 64 * 4 * 12 * 2


def test_update_is_six_passes_with_remat():
    """Fails when the anchor's pass, or the second forward pass of remat, is forgotten."""
    once = roofline.forward_flops(TINY, 8, 8) / 4
    assert roofline.update(TINY, SIZES, remat=True).flops == pytest.approx(6 * once)
    assert roofline.update(TINY, SIZES, remat=False).flops == pytest.approx(5 * once)


def test_generation_reads_weights_and_cache_for_each_token():
    """Fails when weights are taken as split over the batch's chips too, or the cache as full from the start."""
    weights, cache = 2 * N / 2, 4 * 5.5 * 2 * 2 * 2 * 1 * 6
    assert roofline.generation(TINY, SIZES).hbm == pytest.approx(5 * (weights + cache))


def test_the_limit_is_the_slowest_resource():
    """Fails when times are added, or the fastest is taken."""
    chip = CHIPS["v5e"]
    work = roofline.Work(flops=chip.bf16_flops, hbm=3 * chip.hbm_bandwidth)
    assert roofline.seconds(work, 2 * chip.ici_bandwidth, chip) == {"compute": 1, "memory": 3, "network": 2}
    assert "| 3e+03 | memory |" in roofline.table({"update": work}, {"update": 0.0}, chip)
