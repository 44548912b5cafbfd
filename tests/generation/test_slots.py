"""Sequences decoded in few slots, against all of them at once, and against counts by hand."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from numpy.testing import assert_allclose, assert_array_equal

from tests.generation.test_sampling import PLAIN, VARIANTS, make
from warp_jax.generation import sampling, slots
from warp_jax.generation.drawing import SamplingConfig
from warp_jax.models import partitioning
from warp_jax.models.apply import make_apply_fn
from warp_jax.models.transformer import init_cache
from warp_jax.parallel import meshes
from warp_jax.tpu_fit import hlo
from warp_jax.training import scoring
from warp_jax.types import PromptBatch

STOP, GO_ON = 1, 2


def prompts_of(count, width=5):
    """Prompts of 1 to `width` tokens."""
    rng = np.random.default_rng(0)
    mask = np.arange(width) >= rng.integers(0, width, count)[:, None]
    ids = np.where(mask, rng.integers(0, 16, (count, width)), 0)
    return PromptBatch(ids.astype(np.int32), mask, np.arange(count, dtype=np.int32))


@pytest.fixture
def short(monkeypatch):
    """Halve the slots of short completions too."""
    monkeypatch.setattr(slots, "MIN_TOKENS", 1)
    monkeypatch.setattr(slots, "MIN_SLOTS", 2)


@pytest.mark.parametrize("variant", ["gemma3", "qwen3"])  # with and without a window
@pytest.mark.parametrize(
    ("options", "top_k"),
    [({"num_slots": 8}, 5), ({"may_halve": True}, 0), ({"copies": 2, "num_slots": 10, "may_halve": True}, 0)],
)
def test_any_number_of_slots_gives_the_same_completions(short, variant, options, top_k):
    """Fails if a slot reads what the sequence before it left, the ring overwrites a token that is needed, a prompt is
    lost or taken twice, rows are mixed when slots are halved, or a number of tokens, a key or a set of allowed tokens
    belongs to another slot.
    """
    apply_fn, make_cache, params = make(**VARIANTS[variant])
    run = functools.partial(sampling.sample_with_states, apply_fn, make_cache, trunk_layers=0)
    run = functools.partial(run, config=SamplingConfig(9, 0.7, (4,), 0, top_k), copies=options.get("copies", 1))
    run = jax.jit(run, static_argnames=("copies", "num_slots", "may_halve"))
    prompts, key = prompts_of(22), jax.random.key(3)
    want, want_states = run(params, prompts, key)
    got, states = run(params, prompts, key, **options)
    lengths = np.asarray(want.completion_mask.sum(1))
    assert len(np.unique(lengths)) > 3
    for name, values in want._asdict().items():
        if values is not None:
            assert_allclose(getattr(got, name), values, atol=1e-5, err_msg=name)
    assert (want.allowed is None) == (not top_k)
    fed = np.concatenate([want.prompt_mask, want.completion_mask], 1)[:, :-1] & (
        np.arange(13) < 5 + lengths[:, None] - 1
    )
    assert_allclose(states.final[:, :-1][fed], want_states.final[:, :-1][fed], atol=1e-4)


class _Countdown(NamedTuple):
    """A cache of a model whose prompt says how long the completion is. It counts the passes of the model."""

    left: Any  # int32 [B]
    passes: Any  # int32 []

    def repeat(self, copies):
        return self._replace(left=jnp.repeat(self.left, copies))

    def take(self, rows):
        return self._replace(left=self.left[rows])

    def insert(self, rows, other, columns):
        return self._replace(left=self.left.at[rows].set(other.left, mode="drop"))

    def widen(self, capacity):
        return self

    def at(self, column):
        return self


def _step(token_ids, mask, cache):
    is_prompt = token_ids.shape[1] > 1
    left = token_ids[:, -1] if is_prompt else cache.left - 1
    cache = _Countdown(left, cache.passes + (0 if is_prompt else 1))
    logits = jnp.where(jnp.arange(4)[None] == jnp.where(left <= 1, STOP, GO_ON)[:, None], 0.0, -jnp.inf)
    return logits, cache, jnp.full((*token_ids.shape, 1), cache.passes)


def _decode(lengths, copies=1, num_slots=0, max_new_tokens=12, *, may_halve=False, devices=1):
    """Lengths that were decoded, and the number of passes of the model, the prompts' left out; num_slots per device."""
    ids = np.stack([np.full_like(lengths, 3), lengths], 1)
    prompts = PromptBatch(ids, ids > 0, np.arange(len(ids), dtype=np.int32))
    count = len(ids) * copies // devices
    plan = slots.make_plan(count, copies, num_slots, max_new_tokens, may_halve=may_halve)
    model = slots.Model(_step, lambda rows, columns: _Countdown(jnp.zeros(rows, jnp.int32), jnp.int32(0)))
    keys = jax.random.split(jax.random.key(0), len(ids) * copies)
    config = SamplingConfig(max_new_tokens, 1, (STOP,), 0)
    decode = functools.partial(slots.decode, model, config=config, plan=plan)
    if devices > 1:
        mesh, rows = meshes.make_mesh((devices, 1, 1), jax.devices()[:devices]), PartitionSpec(meshes.BATCH)
        decode = meshes.map_shards(decode, mesh, (rows, rows), rows)
    columns, found = jax.jit(decode)(prompts, keys)
    tokens = np.asarray(columns.token_ids)[:, 2:]
    for row, length in zip(tokens, np.asarray(found), strict=True):
        assert row[:length].tolist() == [GO_ON] * (length - 1) + [STOP if length < max_new_tokens else row[length - 1]]
    return found.tolist(), int(columns.kept.max())


def _on_devices(sizes):
    """A sampler, its arguments for 3 batches of 16 prompts, and the weights, on a mesh of these sizes."""
    settings, (_, _, params) = VARIANTS["gemma3"], make(**VARIANTS["gemma3"])
    mesh, model = meshes.make_mesh(sizes), dataclasses.replace(PLAIN, **settings)
    apply_fn, make_cache = make_apply_fn(model, mesh), functools.partial(init_cache, model, mesh=mesh)
    placed = jax.device_put(params, partitioning.param_shardings(mesh, params))
    config = SamplingConfig(9, 0.7, (4,), 0)
    sampler = sampling.make_sampler(
        mesh, placed, apply_fn=apply_fn, make_cache=make_cache, dtype="float32", config=config
    )
    batches = jax.tree.map(lambda x: x.reshape(3, 16, *x.shape[1:]), prompts_of(48))
    return sampler, (sampler.lay_out(placed), meshes.put_batch(mesh, batches, axis=1), jax.random.key(3))


@pytest.mark.parametrize("sizes", [(2, 4, 1), (2, 2, 2)])
def test_devices_with_slots_of_their_own_sample_what_one_does(sizes):
    """Fails if a device numbers its completions from 0, takes more prompts than it has free slots, loses some when it
    has fewer, or puts results in another row; or if rows of a batch must move when it is measured.
    """
    sampler, arguments = _on_devices(sizes)
    rollout, states = sampler.generate_with_states(*arguments, first=7)
    apply_fn, make_cache, params = make(**VARIANTS["gemma3"])
    run = functools.partial(sampling.sample_with_states, apply_fn, make_cache, config=SamplingConfig(9, 0.7, (4,), 0))
    want, want_states = jax.jit(functools.partial(run, trunk_layers=0))(
        params, prompts_of(48), jax.random.key(3), numbers=7 + jnp.arange(48)
    )
    lengths = np.asarray(want.completion_mask.sum(1)).reshape(3, -1)
    assert len(np.unique(lengths)) > 3
    for batch in range(3):
        got = jax.tree.map(lambda x, batch=batch: x[batch], rollout)
        assert got.completion_ids.sharding.is_equivalent_to(meshes.batch_sharding(meshes.make_mesh(sizes)), 2)
        rows = slice(16 * batch, 16 * (batch + 1))
        for name in ("prompt_ids", "example_ids", "completion_ids", "completion_mask"):
            assert_array_equal(getattr(got, name), getattr(want, name)[rows], err_msg=name)
        assert_allclose(got.per_token_logps, want.per_token_logps[rows], atol=1e-5)
        assert_allclose(states.final[batch, :, 4], want_states.final[rows, 4], atol=1e-4)


def test_only_the_ends_of_loops_are_agreed_on_among_devices():
    """Fails if a row or a part of the cache moves between devices, or each device ends its loops alone."""
    sampler, arguments = _on_devices((2, 4, 1))
    found = hlo.collectives(sampler.generate_with_states.lower(*arguments).compile().as_text())
    assert not found.once
    ((kind, (count, size)),) = found.per_loop_step.items()
    assert (kind, count) == ("all-reduce", 2)  # if a device goes on, and how many slots are free
    assert size < 64  # a row of the cache has 3 layers of 2 x 14 x 8 floats


def test_a_slot_takes_the_next_prompt_when_its_completion_has_ended():
    """Fails if free slots wait: by hand, slot 0 decodes 9 tokens while slot 1 decodes 2, 3, 2 and 4; the first token
    of each comes from the prompt's pass.
    """
    lengths = np.array([9, 2, 3, 2, 4], np.int32)
    assert _decode(lengths, num_slots=2) == (lengths.tolist(), 8)
    assert _decode(lengths) == (lengths.tolist(), 8)


@pytest.mark.parametrize(
    ("lengths", "passes"),
    [([[2, 2, 9, 9, 8, 6], [6, 6, 6, 6, 2, 2]], 10), ([[2, 2, 2, 2, 2, 2], [9, 9, 9, 9, 9, 9]], 16)],
)
def test_devices_refill_when_enough_slots_are_free_on_all_of_them_together(lengths, passes):
    """Fails if refills wait for the device that is full, or for one free slot only; never ends if free slots count that
    have no prompt. By hand, two devices, each with four slots and blocks of one. After pass 1 of the first case, device
    0 has two free slots, as many as the two blocks, and takes the completion of 8; its last one, of 6, waits for device
    1, which is full until pass 5. In the second case, device 1 ends after pass 8 and has two more completions.
    """
    lengths = np.array(lengths, np.int32).reshape(-1)
    assert _decode(lengths, num_slots=4, devices=2) == (lengths.tolist(), passes)


def test_samples_of_a_prompt_wait_for_as_many_slots():
    """Fails if the samples of one prompt are spread over two passes of it, or the last ones of the queue are lost."""
    lengths = np.array([3, 5, 2], np.int32)
    found, passes = _decode(lengths, copies=2, num_slots=4)
    assert found == np.repeat(lengths, 2).tolist()
    assert passes == 4  # 2 slots: 3 tokens, then 2 in the place of the first prompt; 2 slots: 5 tokens


def test_more_samples_of_a_prompt_than_slots_are_left(short):
    """Fails if a loop that has no prompt left still wants room for all samples of one."""
    assert (
        _decode(np.array([7, 3, 5], np.int32), copies=4, num_slots=4, may_halve=True)[0] == [7] * 4 + [3] * 4 + [5] * 4
    )


@pytest.mark.parametrize("count", [5, 8, 11])
def test_halved_slots_keep_every_completion(short, count):
    """Fails if a row that still decodes is dropped, or an ended one is not stored, when slots are halved."""
    lengths = np.random.default_rng(count).permutation(np.arange(1, count + 1)).astype(np.int32)
    for num_slots in (0, 4):
        assert _decode(lengths, num_slots=num_slots, may_halve=True)[0] == lengths.tolist()


def test_completions_end_at_the_longest_length():
    """Fails if a completion without a stop token never frees its slot, or has one token more."""
    assert _decode(np.array([9, 9, 9, 2, 9], np.int32), num_slots=2, max_new_tokens=4)[0] == [4, 4, 4, 2, 4]


def test_plans_by_hand():
    """Fails if slots are halved below the smallest useful number, or a block does not hold whole prompts."""
    assert slots.make_plan(64, 2, 0, 64, may_halve=True) == slots.Plan(64, 2, (64, 32, 16), 64)
    assert slots.make_plan(64, 2, 0, 64, may_halve=False) == slots.Plan(64, 2, (64,), 64)
    assert slots.make_plan(64, 2, 0, 12, may_halve=True) == slots.Plan(64, 2, (64,), 64)
    assert slots.make_plan(60, 3, 14, 64, may_halve=True) == slots.Plan(60, 3, (14, 7), 3)
    assert slots.make_plan(60, 3, 100, 64, may_halve=False) == slots.Plan(60, 3, (60,), 60)
    with pytest.raises(ValueError, match="num_slots: got 2, want at least 3, the completions of one prompt"):
        slots.make_plan(60, 3, 2, 64, may_halve=False)


@pytest.mark.parametrize("chunk", [0, 2])
def test_the_kl_from_the_states_of_sampling(chunk):
    """Fails if the states are those of the next token, or SFT's start at another layer."""
    apply_fn, make_cache, params = make(**VARIANTS["gemma3"], layer_groups=(1, 2))
    sft = jax.tree.map(lambda x: x * 1.1, params)
    sft = {**params, "layers_from_1": sft["layers_from_1"], "final_norm": sft["final_norm"]}
    config = SamplingConfig(6, 0.7, (4, 9), pad_id=0)
    run = functools.partial(sampling.sample_with_states, apply_fn, make_cache, trunk_layers=1, config=config)
    rollout, states = jax.jit(functools.partial(run, num_slots=8))(params, prompts_of(20), jax.random.key(1))
    kl = functools.partial(scoring.sequence_kl, apply_fn, params, sft, rollout, 0.7)
    want = kl()
    assert float(want.min()) > 1e-4
    assert_allclose(kl(chunk=chunk, states=states, trunk_layers=1), want, rtol=1e-3, atol=1e-6)
    assert_allclose(kl(chunk=chunk, states=states._replace(trunk=None)), want, rtol=1e-3, atol=1e-6)
