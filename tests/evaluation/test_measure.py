"""The horizontal axis of every front (KL of whole completions to SFT), saved evaluations, and their statistics."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from warp_jax.data import batches
from warp_jax.evaluation import measure, points
from warp_jax.generation import sampling
from warp_jax.parallel import meshes
from warp_jax.rewards import reward_functions
from warp_jax.training import scoring
from warp_jax.types import PromptBatch, RewardError, Rewards, Rollout, StorageError

# a model of order 1: a table gives the logits of the next token from the last one
VOCABULARY, STOP, LENGTH = 3, 2, 3
TEMPERATURE = 0.7


def _apply_fn(params, token_ids, mask, cache, num_outputs):
    return params[token_ids][:, -num_outputs:], None


def _completions():
    """All completions: up to and including the stop token, else LENGTH tokens."""
    for length in range(1, LENGTH + 1):
        for ids in itertools.product(range(VOCABULARY), repeat=length):
            if STOP not in ids[:-1] and (ids[-1] == STOP or length == LENGTH):
                yield ids


def _log_prob(table, prompt, ids):
    scaled = np.asarray(table, np.float64) / TEMPERATURE
    logps = scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))
    return sum(logps[a, b] for a, b in zip((prompt, *ids[:-1]), ids, strict=True))


def test_expected_sequence_kl_is_that_of_the_two_distributions():
    """Fails when the KL is reversed, the temperature is dropped, or tokens after the stop are counted."""
    generator = np.random.default_rng(0)
    policy, reference = (generator.normal(size=(VOCABULARY, VOCABULARY)).astype(np.float32) for _ in range(2))
    completions = list(_completions())
    ids = np.array([c + (0,) * (LENGTH - len(c)) for c in completions], np.int32)
    mask = np.arange(LENGTH) < np.array([len(c) for c in completions])[:, None]
    count = len(completions)
    prompt = np.ones((count, 1), np.int32)
    rollout = Rollout(prompt, prompt == 1, np.arange(count), ids, mask, np.zeros(ids.shape, np.float32))
    found = scoring.sequence_kl(_apply_fn, jnp.asarray(policy), jnp.asarray(reference), rollout, TEMPERATURE)
    p, q = (np.array([_log_prob(table, 1, c) for c in completions]) for table in (policy, reference))
    assert np.exp(p).sum() == pytest.approx(1)
    assert np.exp(p) @ np.asarray(found) == pytest.approx(np.exp(p) @ (p - q), rel=1e-5)
    assert (np.asarray(found) >= 0).all()
    assert scoring.sequence_kl(_apply_fn, policy, policy, rollout, TEMPERATURE).tolist() == [0.0] * count


def test_stored_evaluations_are_not_made_again(tmp_path):
    """Fails when a saved evaluation is ignored, or saved under another name."""
    made = []

    def evaluate(params):
        made.append(params)
        values = np.array([params, params], np.float32)
        ids = values[:, None]
        return measure.Evaluation(*[values] * 4, np.array(0.5), ids, ids > 0, np.arange(2))

    told = []
    store = measure.EvaluationStore(tmp_path, evaluate, lambda name, found, _: told.append((name, found.reward[0])))
    assert store.missing(["a", "b"]) == ["a", "b"]
    assert store.get("a", lambda: 2.0).reward.tolist() == [2.0, 2.0]
    assert store.get("a", lambda: 3.0).reward.tolist() == [2.0, 2.0]
    assert store.get("b", lambda: 3.0).reward.tolist() == [3.0, 3.0]
    assert made == [2.0, 3.0]
    assert told == [("a", 2.0), ("b", 3.0)]
    assert store.missing(["a", "c"]) == ["c"]


def test_a_reward_that_fails_names_the_evaluation(tmp_path):
    """Fails when the name is missing in the error, or a failed evaluation is saved."""

    def evaluate(params):
        raise RewardError("f: returned nan")

    store = measure.EvaluationStore(tmp_path, evaluate, lambda *args: None)
    with pytest.raises(RewardError, match=r"^evaluation sft: f: returned nan$"):
        store.get("sft", lambda: 2.0)
    assert store.missing(["sft"]) == ["sft"]


def _sampler(apply_fn):
    config = sampling.SamplingConfig(LENGTH, TEMPERATURE, (STOP,), 0)
    generate = functools.partial(sampling.sample, apply_fn, lambda batch, capacity: None, config=config)

    def generate_with_states(params, prompts, key, first):
        """A batch after the other."""
        size = prompts.prompt_ids.shape[1]
        parts = [
            generate(params, PromptBatch(*part), key, numbers=first + size * number + jnp.arange(size))
            for number, part in enumerate(zip(*prompts, strict=True))
        ]
        return jax.tree.map(lambda *parts: jnp.stack(parts), *parts), None

    return sampling.Sampler(lambda params: params, generate, generate_with_states)


def _sum_of_tables(params, token_ids, mask, cache, num_outputs):
    return _apply_fn(params["trained"] + params["frozen"], token_ids, mask, cache, num_outputs)


def _examiner(sft, frozen, count):
    """An examiner of models that are the sum of two tables."""
    apply_fn = _sum_of_tables
    prompt = np.ones((count, 1), np.int32)
    return measure.Examiner(
        mesh=meshes.make_mesh((1, 1, 1), jax.devices()[:1]),
        sampler=_sampler(apply_fn),
        kl_to_sft=measure.make_kl_to_sft(functools.partial(scoring.sequence_kl, apply_fn, temperature=TEMPERATURE)),
        reward_fn=lambda rollout: Rewards(reward_functions.length(rollout), {}),
        gold_fn=lambda rollout: np.zeros(len(rollout.completion_ids)),
        sft_params=sft,
        frozen_params=frozen,
        eval_prompts=PromptBatch(prompt, prompt == 1, np.arange(count)),
        batch_size=4,
        seed=0,
    )


def _tables():
    """Policy, SFT and the frozen part of both."""
    generator = np.random.default_rng(1)
    return (
        {name: jnp.asarray(generator.normal(size=(VOCABULARY, VOCABULARY)), jnp.float32)}
        for name in ("trained", "trained", "frozen")
    )


def test_a_policy_is_measured_against_sft_on_its_own_samples():
    """Fails when policy and SFT are swapped, the frozen part is left out, SFT's samples are measured, or padding counts
    in length or diversity."""
    policy, sft, frozen = _tables()
    count = 12
    evaluate = functools.partial(measure.evaluate, _examiner(sft, frozen, count))
    found = evaluate(policy)
    tables = [np.asarray(tree["trained"], np.float64) + np.asarray(frozen["frozen"]) for tree in (policy, sft)]
    logps = [np.array([[_log_prob(t, a, (b,)) for b in range(VOCABULARY)] for a in range(VOCABULARY)]) for t in tables]
    per_token = (np.exp(logps[0]) * (logps[0] - logps[1])).sum(1)
    samples = [ids[mask].tolist() for ids, mask in zip(found.completion_ids, found.completion_mask, strict=True)]
    expected = [per_token[[1, *ids[:-1]]].sum() for ids in samples]
    np.testing.assert_allclose(found.sft_kl, expected, rtol=1e-4)
    assert found.length.tolist() == found.reward.tolist() == list(map(len, samples))
    pairs = [pair for ids in samples for pair in itertools.pairwise(ids)]
    assert found.distinct_2 == pytest.approx(len(set(pairs)) / len(pairs))
    assert evaluate(sft).sft_kl.tolist() == [0.0] * count
    assert not np.array_equal(found.completion_ids[:4], found.completion_ids[4:8])  # each batch has noise of its own


def test_a_last_call_of_fewer_batches(monkeypatch):
    """Fails when a batch of it is lost, or its completions have the numbers, and so the random keys, of other ones."""
    policy, sft, frozen = _tables()
    want = measure.evaluate(_examiner(sft, frozen, 12), policy)
    monkeypatch.setattr(measure, "CALL_BATCHES", 2)
    found = measure.evaluate(_examiner(sft, frozen, 12), policy)
    for name, values in want._asdict().items():
        np.testing.assert_array_equal(getattr(found, name), values, err_msg=name)


def test_the_device_has_the_kl_to_compute_while_the_host_computes_rewards():
    """Fails when a reward is computed before the KL of its batch is dispatched."""
    tables, sft, frozen = _tables()
    examiner, calls = _examiner(sft, frozen, 4), []

    def noted(name):
        return lambda *args: (calls.append(name), getattr(examiner, name)(*args))[1]

    names = ("kl_to_sft", "reward_fn", "gold_fn")
    measure.evaluate(examiner._replace(**{name: noted(name) for name in names}), tables)
    assert calls == [*names] * (4 // examiner.batch_size)


def test_texts_are_measured_token_by_token():
    """Fails when padding or a text's first token counts, a batch is left out or measured twice, the temperature is
    applied, or the frozen part is left out."""
    policy, sft, frozen = _tables()
    texts = [[0, 1, 2, 1], [2, 1], [1, 1, 0], [0, 2, 2, 0], [1], [2, 0, 1], [0, 1], [2, 2, 2]]
    rows = batches.left_pad([np.array(text) for text in texts], 4, 0)

    def losses(params, token_ids, mask):
        return scoring.next_token_losses(_sum_of_tables, params, token_ids, mask)

    examiner = _examiner(sft, frozen, 4)._replace(texts=measure.Texts(measure.make_text_losses(losses), rows))
    found = measure.evaluate(examiner, policy)
    table = np.asarray(policy["trained"], np.float64) + np.asarray(frozen["frozen"])
    logps = table - np.log(np.exp(table).sum(-1, keepdims=True))
    want = [-sum(logps[a, b] for a, b in itertools.pairwise(text)) for text in texts]
    np.testing.assert_allclose(found.text_nats, want, rtol=1e-5)
    assert found.text_tokens.tolist() == [len(text) - 1 for text in texts]


def test_a_kl_that_is_not_finite_is_refused(tmp_path):
    """Fails when one is saved, the error does not name eta, or the points before it are lost."""
    policy, sft, frozen = _tables()
    policy["trained"] = policy["trained"].at[1].multiply(1e37)  # finite, but not 50 times as much
    store = measure.EvaluationStore(
        tmp_path, functools.partial(measure.evaluate, _examiner(sft, frozen, 8)), lambda *args: None
    )
    with pytest.raises(
        FloatingPointError, match=r"^eta 50: evaluation liti_i2_e50: sft_kl is nan or inf for 8 of 8 .*front\.etas"
    ):
        points.front_points("liti", (2, 0), (1e-37, 50.0), ends=(sft, lambda: policy), evaluations=store)
    assert store.missing(["liti_i2_e1e-37", "liti_i2_e50"]) == ["liti_i2_e50"]


def test_standard_errors_count_distinct_prompts():
    """Fails when completions of equal prompts count as independent."""
    values = np.array([1.0, 1.0, 3.0, 3.0])
    ids = np.zeros((4, 2))
    found = measure.summary(measure.Evaluation(*[values] * 4, np.array(0.5), ids, ids > 0, np.array([0, 0, 1, 1])))
    assert (found["reward"], found["reward_se"], found["sft_kl_se"]) == pytest.approx((2.0, 1.0, 1.0))


def test_no_flipped_bit_of_a_saved_evaluation_goes_unnoticed(tmp_path):
    """Fails when only errors of zipfile and zlib count: a bit of a header asks for a password."""
    path, values = tmp_path / "sft.npz", {name: np.arange(3.0) for name in measure.Evaluation._fields}
    np.savez_compressed(path, **values)
    whole = path.read_bytes()
    noticed = 0
    for bit in {*range(0, 8 * len(whole), 41), 8 * whole.index(b"PK\1\2") + 64}:  # the last one: "is encrypted"
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        try:
            evaluation = measure.load_evaluation(path)
        except StorageError:
            noticed += 1
            continue
        for name, value in values.items():
            np.testing.assert_array_equal(getattr(evaluation, name), value)
    assert noticed > 100


def test_an_evaluation_of_an_earlier_version_has_no_texts(tmp_path):
    """Fails when a file without the newer arrays is refused."""
    names = measure.Evaluation._fields[:7]  # the first versions had no clusters either
    np.savez_compressed(tmp_path / "sft.npz", **{name: np.arange(3.0) for name in names})
    found = measure.load_evaluation(tmp_path / "sft.npz")
    assert (found.clusters.tolist(), found.text_nats.tolist(), found.text_tokens.tolist()) == ([0, 1, 2], [], [])


class _Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))  # unpickling makes the file


def test_an_evaluation_never_runs_a_pickle(tmp_path):
    """Fails when the arrays are loaded with allow_pickle=True."""
    np.savez(tmp_path / "bad.npz", reward=np.array([_Bomb(tmp_path / "made")], dtype=object))
    with pytest.raises(StorageError, match="is not what was written"):
        measure.load_evaluation(tmp_path / "bad.npz")
    assert not (tmp_path / "made").exists()
