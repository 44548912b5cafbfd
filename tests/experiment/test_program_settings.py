"""Settings reach the programs: a step, a rollout and a KL of a model whose logits are a table, against hand arithmetic.

Mutations killed here: another temperature in the sampler, the scorer or the KL; the optimizer of SFT in RL; liti_rate
as the rate of the anchor.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.settings_of import settings_of
from warp_jax.experiment import architecture, programs
from warp_jax.parallel import meshes
from warp_jax.types import PromptBatch

BATCH, VOCABULARY, STOP, TEMPERATURE = 8, 5, 2, 0.7
SETTINGS = {
    "sampling.temperature": TEMPERATURE,
    "sampling.max_new_tokens": 4,
    "rl.learning_rate": 0.03,
    "rl.warmup_steps": 0,
    "sft.learning_rate": 0.5,
    "warp.ema_rate": 0.2,
}


@pytest.fixture(autouse=True)
def _strict_promotion():
    """Overrides the strict one of conftest.py: optax raises a float to an integer power."""


def _table(seed):
    values = np.random.default_rng(seed).normal(size=(VOCABULARY, VOCABULARY))
    return {"embed": {"embedding": jnp.asarray(values, jnp.float32)}}


def _apply_fn(params, token_ids, mask, cache, num_outputs):
    """Logits of the next token from the last one."""
    return params["embed"]["embedding"][token_ids][:, -num_outputs:], None


def _logps(params):
    """Log-probability of every token after every token, float64."""
    scaled = np.asarray(params["embed"]["embedding"], np.float64) / TEMPERATURE
    return scaled - np.log(np.exp(scaled).sum(1, keepdims=True))


def _distance(tree, other):
    return np.asarray(tree["embed"]["embedding"]) - np.asarray(other["embed"]["embedding"])


def test_one_temperature_and_the_settings_of_rl(monkeypatch):
    """Fails when sampler, scorer or KL has another temperature, RL the optimizer of SFT, or the anchor another rate."""
    monkeypatch.setattr(programs, "make_apply_fn", lambda model, mesh: _apply_fn)
    monkeypatch.setattr(programs, "init_cache", lambda model, batch, capacity, mesh: None)
    mesh = meshes.make_mesh((1, 1, 1), jax.devices()[:1])
    policy, sft, settings = _table(0), _table(1), settings_of(SETTINGS)
    model = architecture.policy_config(settings.model, VOCABULARY)
    made = programs.make_programs(settings, mesh, model, trained=policy, frozen={}, stop_ids=(STOP,), pad_id=0)
    prompts = np.arange(BATCH, dtype=np.int32)[:, None] % VOCABULARY
    rollout = made.sampler(policy, PromptBatch(prompts, prompts >= 0, np.arange(BATCH)), jax.random.key(0))
    ids, mask = np.asarray(rollout.completion_ids), np.asarray(rollout.completion_mask)
    assert mask.sum(1).tolist() == [4 if STOP not in row else row.tolist().index(STOP) + 1 for row in ids]

    before = np.concatenate([prompts, ids[:, :-1]], 1)
    want = np.where(mask, _logps(policy)[before, ids], 0)
    np.testing.assert_allclose(rollout.per_token_logps, want, rtol=1e-4, atol=1e-6)

    per_token = (np.exp(_logps(policy)) * (_logps(policy) - _logps(sft))).sum(1)
    found = made.kl_to_sft(policy, sft, {}, rollout)
    np.testing.assert_allclose(found, np.where(mask, per_token[before], 0).sum(1), rtol=1e-4)

    state, metrics = made.train.update(made.train.init(policy), {}, rollout, jnp.arange(BATCH, dtype=jnp.float32))
    assert float(metrics["nats_per_token"]) == pytest.approx(-want.sum() / mask.sum(), rel=1e-4)
    moved = _distance(state.params, policy)
    assert np.abs(moved).max() == pytest.approx(0.03, rel=1e-2)  # the first step of Adam has the size of the rate
    np.testing.assert_allclose(_distance(state.anchor_params, policy), 0.2 * moved, atol=1e-6)
