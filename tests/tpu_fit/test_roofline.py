"""Operations and bytes of a step, by hand."""

import dataclasses

import jax
import pytest

from tests.settings_of import settings_of
from warp_jax.models import apply, presets
from warp_jax.models.transformer import TransformerConfig
from warp_jax.tpu_fit import roofline
from warp_jax.tpu_fit.chips import CHIPS

TINY = TransformerConfig(
    vocab_size=10, width=4, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=6, mlp_dim=8, tied_head=False
)
N = 2 * (4 * 6 * (2 + 1 + 1 + 2) + 3 * 4 * 8) + 4 * 10
SETTINGS = settings_of(
    {"mesh": (2, 1, 2), "rl.batch_size": 8, "sampling.prompt_tokens": 3, "sampling.max_new_tokens": 5}
)


def test_parameters_are_those_of_the_model():
    """Fails when a projection is left out: norms and the lookup table are all that is not multiplied."""
    shapes = apply.param_shapes(TINY)
    kernels = [x.size for path, x in jax.tree_util.tree_leaves_with_path(shapes) if "kernel" in str(path)]
    assert roofline.matmul_parameters(TINY) == N == sum(kernels)


def test_gemma_7b_has_its_size():
    """Fails when a published size is wrong: 8.54 billion weights (arXiv 2403.08295, table 2), the embedding shared."""
    assert roofline.matmul_parameters(presets.MODELS["gemma_7b"]) / 1e9 == pytest.approx(8.54, rel=2e-3)
    assert roofline.matmul_parameters(presets.MODELS["llama3_70b"]) / 1e9 == pytest.approx(70.6 - 1.05, rel=2e-3)


HEAD = 4 * 10
LAYERS = 2 * (N - HEAD) * 8 * 8 + 4 * 8 * 8 * 4 * 12 * 2  # one pass over 8 rows of 3 + 5 tokens, FLOPs
PROMPT = 2 * (N - HEAD) * 3 + 4 * 3 * 1.5 * 12 * 2  # one pass over a prompt


def test_forward_pass_by_hand():
    """Fails when attention is not causal, a multiplication and its addition count once, or the head counts at tokens
    whose logits nobody asks for.
    """
    assert roofline.forward_flops(TINY, 8, 8, 8) == 2 * N * 64 + 4 * 64 * 4 * 12 * 2
    assert roofline.forward_flops(TINY, 8, 8, 3) == LAYERS + 2 * HEAD * 8 * 3


def test_the_head_of_a_reward_model_is_one_number():
    """Fails when the reward model is taken to have logits over the vocabulary."""
    model = dataclasses.replace(TINY, head="scalar")
    work = roofline.scoring(model, SETTINGS)
    assert work.flops == (LAYERS + 2 * 4 * 64) / 4
    assert work.hbm == 4 * (N - HEAD + 4) / 4


def test_update_by_hand():
    """Fails when the anchor's pass or a pass of the gradient is forgotten, the policy is scored before its gradient,
    the head counts at the prompt too, or the 8 completions do not share 2 prompts.
    """
    head, layers = 2 * HEAD * 8 * 5, LAYERS - 6 * PROMPT
    passes = {(True, True): (5, 5), (True, False): (5, 4), (False, True): (4, 5), (False, False): (4, 4)}
    for (remat, in_pieces), (layer_passes, head_passes) in passes.items():
        model = dataclasses.replace(TINY, remat="full" if remat else "dots")
        work = roofline.update(model, SETTINGS.replace({"model.logits_chunk": 4 if in_pieces else 5}))
        assert work.flops == (layer_passes * layers + head_passes * head) / 4
        assert work.hbm == 4 * 9 * N / 4  # policy, anchor, two moments: read and written; the gradient: read


@pytest.mark.parametrize(
    ("changes", "passes", "prompts"),
    [
        ({}, 4, 8),  # one prompt a microbatch does not divide by two devices
        ({"mesh": (1, 1, 4)}, 4, 2),
        ({"rl.whiten": True}, 5, 8),
        ({"rl.advantage": "batch_mean"}, 5, 8),
        ({"rl.num_microbatches": 4}, 5, 8),  # of two rows each, half of a prompt's samples
        ({"rl.num_microbatches": 4, "rl.advantage": "none"}, 4, 8),
        ({"rl.num_microbatches": 1, "rl.whiten": True}, 4, 2),
    ],
)
def test_advantages_of_other_microbatches_cost_a_pass(changes, passes, prompts):
    """Fails when the update is taken to score the policy once, or twice, or each prompt once, whatever the settings."""
    settings = SETTINGS.replace({"rl.num_microbatches": 2, "model.logits_chunk": 0, **changes})
    layers = LAYERS - (8 - prompts) * PROMPT
    assert roofline.update(TINY, settings).flops == passes * (layers + 2 * HEAD * 8 * 5) / 4


@pytest.mark.parametrize(("mesh", "prompts"), [((2, 1, 2), 2), ((4, 1, 1), 8)])
def test_generation_by_hand(mesh, prompts):
    """Fails when the prefill has logits of the whole prompt, the first token costs a pass of its own, or samples of a
    prompt do not share its prefill; two prompts cannot be split over four chips, so there they do not.
    """
    prefill = 2 * (N - HEAD) * prompts * 3 + 2 * HEAD * prompts + 4 * prompts * 3 * 1.5 * 12 * 2
    tokens = 2 * N * 8 * 4 + 4 * 8 * 4 * 5.5 * 12 * 2
    assert roofline.generation(TINY, SETTINGS.replace({"mesh": mesh})).flops == (prefill + tokens) / 4


def test_generation_reads_weights_and_cache_for_each_token():
    """Fails when weights are taken as split over the batch's chips too, or the cache as full from the start."""
    weights, cache = 2 * N / 2, 4 * 5.5 * 2 * 2 * 2 * 1 * 6
    assert roofline.generation(TINY, SETTINGS).hbm == pytest.approx(5 * (weights + cache))


def test_chips_that_share_the_weights_while_sampling():
    """Fails when weights and cache are split as in training, or key-value heads that do not divide are split: each chip
    reads a quarter of the weights and, of all 8 rows, the only key-value head.
    """
    settings = SETTINGS.replace({"mesh": (1, 2, 2), "sampling.tensor": 4})
    weights, cache = 2 * N / 4, 8 * 5.5 * 2 * 2 * 2 * 1 * 6
    assert roofline.generation(TINY, settings).hbm == pytest.approx(5 * (weights + cache))
    model = dataclasses.replace(TINY, num_heads=16, num_kv_heads=8)
    settings = settings.replace({"mesh": (1, 8, 2), "sampling.tensor": 16})
    whole, split = (roofline.generation(model, settings.replace({"sampling.tensor": t})).hbm for t in (16, 8))
    weights, head = 2 * roofline.matmul_parameters(model) / 16, 5.5 * 2 * 2 * 2 * 6
    assert whole == pytest.approx(5 * (weights + 8 * 8 * head))
    assert split == pytest.approx(5 * (2 * weights + 4 * 1 * head))


def test_the_limit_is_the_slowest_resource():
    """Fails when times are added, or the fastest is taken."""
    chip = CHIPS["v5e"]
    work = roofline.Work(flops=chip.bf16_flops, hbm=3 * chip.hbm_bandwidth)
    assert roofline.seconds(work, 2 * chip.ici_bandwidth, chip) == {"compute": 1, "memory": 3, "network": 2}
