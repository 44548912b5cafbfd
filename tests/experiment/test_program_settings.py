"""Settings reach the programs: a step, a rollout and a KL of a model whose logits are a table, against hand arithmetic.

Mutations killed here: another temperature in the sampler, the scorer or the KL; top-k or top-p left out of training, or
in the evaluation; the optimizer of SFT in RL; liti_rate
as the rate of the anchor; another advantage, whitening or importance cap than that of the config.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.settings_of import settings_of
from warp_jax.experiment import architecture, programs
from warp_jax.parallel import meshes
from warp_jax.training import reinforce
from warp_jax.types import PromptBatch, Rollout

BATCH, SAMPLES, VOCABULARY, STOP, TEMPERATURE = 8, 4, 5, 2, 0.7
SETTINGS = {
    "rl.samples_per_prompt": SAMPLES,
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


def _apply_fn(params, token_ids, mask=None, cache=None, *, num_outputs=0, shared=None, method=None):
    """Logits of the next token from the last one; the head returns its argument."""
    if method == "head":
        return token_ids
    return params["embed"]["embedding"][token_ids][:, -num_outputs:], None


def _make(monkeypatch, changes=None, apply_fn=_apply_fn):
    """Programs of a table for a config with some changes."""
    monkeypatch.setattr(programs, "make_apply_fn", lambda model, mesh: apply_fn)
    monkeypatch.setattr(programs, "init_cache", lambda model, batch, capacity, mesh: None)
    settings = settings_of({**SETTINGS, **(changes or {})})
    model = architecture.policy_config(settings.model, VOCABULARY)
    mesh = meshes.make_mesh((1, 1, 1), jax.devices()[:1])
    return programs.make_programs(settings, mesh, model, trained=_table(0), frozen={}, stop_ids=(STOP,), pad_id=0)


@pytest.mark.parametrize(("changes", "copies"), [({}, SAMPLES), ({"rl.num_microbatches": 4}, 1)])
def test_an_update_computes_each_prompt_once(monkeypatch, changes, copies):
    """Fails if updates do not share prompts, or share those of 2 completions that are in other microbatches."""
    monkeypatch.setattr(reinforce, "make_programs", lambda mesh, params, rule: rule)
    rule = _make(monkeypatch, {"rl.batch_size": BATCH, **changes}).train[0]
    assert rule.score_fn.keywords["copies"] == copies


def _logps(params, temperature=TEMPERATURE, top_k=VOCABULARY):
    """Log-probability of every token after every token, float64."""
    scaled = np.asarray(params["embed"]["embedding"], np.float64) / temperature
    scaled = np.where(scaled < np.sort(scaled, 1)[:, -top_k, None], -np.inf, scaled)
    return scaled - np.log(np.exp(scaled).sum(1, keepdims=True))


def _distance(tree, other):
    return np.asarray(tree["embed"]["embedding"]) - np.asarray(other["embed"]["embedding"])


def test_one_temperature_and_the_settings_of_rl(monkeypatch):
    """Fails when sampler, scorer or KL has another temperature, RL the optimizer of SFT, or the anchor another rate."""
    policy, sft, made = _table(0), _table(1), _make(monkeypatch)
    prompts = np.arange(BATCH, dtype=np.int32)[:, None] // SAMPLES
    rollout = made.sampler(policy, PromptBatch(prompts, prompts >= 0, np.arange(BATCH)), jax.random.key(0))
    ids, mask = np.asarray(rollout.completion_ids), np.asarray(rollout.completion_mask)
    assert mask.sum(1).tolist() == [4 if STOP not in row else row.tolist().index(STOP) + 1 for row in ids]

    before = np.concatenate([prompts, ids[:, :-1]], 1)
    want = np.where(mask, _logps(policy)[before, ids], 0)
    np.testing.assert_allclose(rollout.per_token_logps, want, rtol=1e-4, atol=1e-6)

    per_token = (np.exp(_logps(policy)) * (_logps(policy) - _logps(sft))).sum(1)
    found = made.kl_to_sft(policy, sft, {}, rollout)
    np.testing.assert_allclose(found, np.where(mask, per_token[before], 0).sum(1), rtol=1e-4)

    train = made.train[0]
    state, metrics = train.update(train.init(policy), {}, rollout, jnp.arange(BATCH, dtype=jnp.float32))
    assert float(metrics["nats_per_token"]) == pytest.approx(-want.sum() / mask.sum(), rel=1e-4)
    moved = _distance(state.params, policy)
    assert np.abs(moved).max() == pytest.approx(0.03, rel=1e-2)  # the first step of Adam has the size of the rate
    np.testing.assert_allclose(_distance(state.anchor_params, policy), 0.2 * moved, atol=1e-6)


@pytest.mark.parametrize("cut", [{"sampling.top_k": 2}, {"sampling.top_p": 1e-4}])
def test_training_and_evaluation_have_their_own_distributions(monkeypatch, cut):
    """Fails when evaluation.temperature is another one in its sampler or KL, reaches training, or top-k and top-p are
    left out of the sampler or the scores of training, or reach the evaluation, or the anchor has all tokens.
    """
    policy, sft, made = _table(0), _table(1), _make(monkeypatch, {**cut, "evaluation.temperature": 2.0})
    top_k = cut.get("sampling.top_k", 1)
    prompts = np.arange(BATCH, dtype=np.int32)[:, None] // SAMPLES
    batch = PromptBatch(prompts, prompts >= 0, np.arange(BATCH))
    for sampler, wanted in ((made.sampler, _logps(policy, top_k=top_k)), (made.evaluation_sampler, _logps(policy, 2))):
        rollout = sampler(policy, batch, jax.random.key(0))
        ids, mask = np.asarray(rollout.completion_ids), np.asarray(rollout.completion_mask)
        last = np.concatenate([prompts, ids[:, :-1]], 1)
        want = wanted[last, ids][mask]
        np.testing.assert_allclose(rollout.per_token_logps[mask], want, rtol=1e-4, atol=1e-6)
        if rollout.allowed is not None:
            train = made.train[0]
            state = train.init(policy)._replace(anchor_params=_table(1))  # the update takes its buffers
            _, metrics = train.update(state, {}, rollout, jnp.arange(BATCH, dtype=jnp.float32))
            assert float(metrics["nats_per_token"]) == pytest.approx(-want.mean(), rel=1e-4, abs=1e-6)
            anchor = np.where(np.isfinite(wanted), _logps(sft), -np.inf)
            anchor -= np.log(np.exp(anchor).sum(1, keepdims=True))
            log_ratio = (want - anchor[last, ids][mask]).sum() / BATCH
            assert float(metrics["anchor_kl"]) == pytest.approx(log_ratio, rel=1e-4, abs=1e-6)
            assert float(metrics["drift/max"]) < 1e-5
    assert rollout.allowed is None
    per_token = (np.exp(_logps(policy, 2)) * (_logps(policy, 2) - _logps(sft, 2))).sum(1)
    want = np.where(mask, per_token[last], 0).sum(1)
    np.testing.assert_allclose(made.kl_to_sft(policy, sft, {}, rollout), want, rtol=1e-4)


IDS = np.array([[0, 3, 4, 1], [4, STOP, 0, 0], [1, 1, STOP, 0], [3, 0, 1, STOP]] * 2, np.int32)
LENGTHS = [4, 2, 3, 4] * 2
KL_COEF, CAP, OFFSET = 0.3, 1.5, 0.2
BASELINES = {
    "none": lambda shaped: shaped,
    "batch_mean": lambda shaped: shaped - shaped.mean(),
    "leave_one_out": lambda shaped: (shaped.reshape(-1, 2) - shaped.reshape(-1, 2)[:, ::-1]).reshape(-1),
}


def _rollout():
    """Completions whose sampler gives each token OFFSET nats less than the policy."""
    prompts, mask = np.arange(BATCH, dtype=np.int32)[:, None] // SAMPLES, np.arange(4) < np.array(LENGTHS)[:, None]
    before = np.concatenate([prompts, IDS[:, :-1]], 1)
    sampled = np.where(mask, _logps(_table(0))[before, IDS] - OFFSET, 0).astype(np.float32)
    return Rollout(prompts, prompts >= 0, np.arange(BATCH), IDS, mask, sampled), before, mask


@pytest.mark.parametrize(
    ("kind", "whiten", "cap"), [("none", True, 0.0), ("batch_mean", False, 0.0), ("leave_one_out", False, CAP)]
)
def test_the_update_is_that_of_the_settings(monkeypatch, kind, whiten, cap):
    """Fails when advantage, whitening, kl_coef, importance_cap or the stop tokens are others, or a metric of the policy
    or of the shaped reward is that of the sampler or of the raw reward.
    """
    changes = {"rl.advantage": kind, "rl.whiten": whiten, "rl.importance_cap": cap, "rl.kl_coef": KL_COEF}
    made = _make(monkeypatch, {**changes, "rl.batch_size": BATCH, "rl.samples_per_prompt": 2})
    policy, anchor = _table(0), _table(1)
    rollout, before, mask = _rollout()
    rewards = np.arange(BATCH, dtype=np.float32) ** 2
    train = made.train[0]
    state = train.init(policy)._replace(anchor_params=anchor)
    _, metrics = train.update(state, {}, rollout, jnp.asarray(rewards))

    log_ratio = np.where(mask, (_logps(policy) - _logps(_table(1)))[before, IDS], 0).sum(1)
    shaped = rewards - KL_COEF * log_ratio
    weights = BASELINES[kind](shaped)
    weights = weights / weights.std() if whiten else weights
    if cap:
        weights = weights * np.minimum(np.exp(OFFSET * mask.sum(1)), cap)  # 1.49 and 1.5
    gradient = np.zeros((VOCABULARY, VOCABULARY))
    for row, position in np.argwhere(mask):
        last = before[row, position]
        change = (np.arange(VOCABULARY) == IDS[row, position]) - np.exp(_logps(policy)[last])
        gradient[last] -= weights[row] / BATCH * change / TEMPERATURE
    want = {
        "grad_norm": np.sqrt((gradient**2).sum()),
        "anchor_kl": log_ratio.mean(),
        "shaped_reward": shaped.mean(),
        "nats_per_token": -_logps(policy)[before, IDS][mask].mean(),
        "drift/mean": -OFFSET,
        "truncated": 2 / 8,
    }
    assert {name: float(metrics[name]) for name in want} == pytest.approx(want, rel=1e-3)


def test_pieces_of_the_logits_have_the_length_of_the_settings(monkeypatch):
    """Fails when logits_chunk reaches the update or the KL to SFT no more: they would need the memory of all logits."""
    lengths = []

    def apply_fn(params, *args, method=None, **options):
        out = _apply_fn(params, *args, method=method, **options)
        if method == "head":
            lengths.append(out.shape[1])
        return out

    made = _make(monkeypatch, {"model.logits_chunk": 2}, apply_fn)
    rollout, before, mask = _rollout()
    policy, sft = _table(0), _table(1)
    per_token = (np.exp(_logps(policy)) * (_logps(policy) - _logps(sft))).sum(1)
    found = made.kl_to_sft(policy, sft, {}, rollout)
    np.testing.assert_allclose(found, np.where(mask, per_token[before], 0).sum(1), rtol=1e-4)
    assert set(lengths) == {2}
    lengths.clear()
    train = made.train[0]
    train.update(train.init(policy), {}, rollout, jnp.arange(BATCH, dtype=jnp.float32))
    assert set(lengths) == {2}


def test_runs_have_updates_of_their_own_settings(monkeypatch):
    """Fails when runs train with the settings of the config or of another run, or equal settings are compiled twice."""
    runs = {"warp.ema_rate": 0.5, "rl.learning_rate": 0.01}, {"seed": 3}, {"warp.ema_rate": 0.2}
    made = _make(monkeypatch, {"warp.num_runs": 3, "warp.runs": runs})
    assert made.train[0] is not made.train[1] is made.train[2]
    policy, rollout = _table(0), _rollout()[0]
    for train, rate, ema_rate in zip(made.train[:2], (0.01, 0.03), (0.5, 0.2), strict=True):
        state, _ = train.update(train.init(policy), {}, rollout, jnp.arange(BATCH, dtype=jnp.float32))
        moved = _distance(state.params, policy)
        assert np.abs(moved).max() == pytest.approx(rate, rel=1e-2)
        np.testing.assert_allclose(_distance(state.anchor_params, policy), ema_rate * moved, atol=1e-6)
