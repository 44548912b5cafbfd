"""Continuous batching: decode a queue of sequences in a fixed number of slots, the rows of the KV cache.

A slot is a ring buffer of T = P + C columns, for P tokens of the prompt and C of the completion, and in each step all
slots write the same column. When a sequence has ended, its slot takes the next prompt, whose P tokens are written just
before the current column. When no prompt is left, the active rows are compacted into half as many slots, at most twice.
If all sequences have a slot from the start, long ones begin in a cache of the prompt and half of the completion.
A sequence gets the same completion in any slot, up to rounding: its random numbers depend on its key and the position.

In a `jax.shard_map` over the batch, each device has a queue and slots of its own, so no row moves between devices. The
loops end together, and all refill together: when the free slots of all devices are as many as the prompts of their next
blocks. In a simulation (32 devices of 4 slots, 8 sequences a slot, geometric lengths with mean 100, at most 512), this
takes 1.7 times the steps of slots that are always full; waiting until each device has a free block takes 2.5 times.

Axis letters: Q sequences (the queue), N slots, R slots that are filled together; B rows, S tokens, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from warp_jax.generation import drawing
from warp_jax.generation.drawing import SamplingConfig
from warp_jax.parallel import meshes
from warp_jax.types import Array, PromptBatch

MIN_REFILLS = 4  # refill when 1 / MIN_REFILLS of the slots is free: a prefill of few prompts is inefficient
HALVINGS = 2  # times that the number of slots is halved at the end
MIN_SLOTS = 4  # fewer rows are not faster
MIN_TOKENS = 32  # shorter completions are not worth another compiled loop

# (token ids [B, S], mask [B, S], cache) -> logits of the last position [B, V], cache, values kept of each [B, S, ...]
StepFn = Callable[[Array, Array, Any], tuple[Array, Any, Any]]


class Model(NamedTuple):
    """A policy: its weights are bound in `step`, and its cache has the methods of `transformer.Cache`."""

    step: StepFn
    make_cache: Callable[[int, int], Any]  # rows, columns -> an empty cache


class Plan(NamedTuple):
    """Numbers of slots and of the sequences that they decode."""

    sequences: int  # Q
    copies: int  # completions of each prompt
    sizes: tuple[int, ...]  # N: number of slots, then the smaller numbers at the end
    block: int  # R, a multiple of copies

    @property
    def refills(self) -> bool:
        """True if a slot decodes several sequences."""
        return self.sizes[0] < self.sequences


class Columns(NamedTuple):
    """Values of each token: [rows, T, ...]."""

    token_ids: Array  # int32
    logps: Array  # float32, nats
    allowed: Array | None  # see `Rollout`
    kept: Any  # what the model's step keeps; a pytree


class _Slots(NamedTuple):
    cache: Any
    column: Array  # of the newest token of all slots, which is not in the cache yet
    sequence: Array  # int32 [N], index of the sequence in the queue; Q = none
    key: Array  # [N], of the sequence
    start: Array  # int32 [N], column of the first token of the completion
    drawn: Array  # int32 [N], tokens of the completion so far
    done: Array  # bool [N]
    ring: Columns  # [N, T, ...]


_ROWS = ("sequence", "key", "start", "drawn", "done")  # fields of _Slots [N]


class _Queue(NamedTuple):
    slots: _Slots
    next: Array  # index of the next sequence
    lengths: Array  # int32 [Q], of the ended completions
    results: Columns  # of the ended sequences [Q, T, ...]; token ids and logps of the prompt are undefined


def make_plan(sequences: int, copies: int, slots: int, max_new_tokens: int, *, may_halve: bool) -> Plan:
    """Plan for Q sequences in `slots` slots (0 = Q). may_halve: False where rows should stay on their devices."""
    slots = min(slots or sequences, sequences)
    block = slots if slots == sequences else max(slots // MIN_REFILLS // copies, 1) * copies
    if block > slots:
        raise ValueError(f"num_slots: got {slots}, want at least {copies}, the completions of one prompt")
    halvings = HALVINGS if may_halve and max_new_tokens >= MIN_TOKENS else 0
    sizes = [slots >> i for i in range(halvings + 1) if i == 0 or slots >> i >= MIN_SLOTS]
    return Plan(sequences, copies, tuple(sizes), block)


def decode(
    model: Model, prompts: PromptBatch, keys: Array, config: SamplingConfig, plan: Plan
) -> tuple[Columns, Array]:
    """Decode a completion for each key: keys [Q], of which each prompt has `plan.copies` neighbours.

    Returns the columns of all sequences [Q, T, ...], and the length of each completion: int32 [Q].
    """
    decoder = _Decoder(model, prompts, keys, config, plan)
    floors = *plan.sizes[1:], 0
    if len(plan.sizes) == 1 and not plan.refills:
        slots = decoder.fill_all(decoder.width)
        slots = jax.lax.while_loop(lambda slots: _anywhere(~slots.done.all()), decoder.advance, slots)
        return slots.ring, slots.drawn
    queue = decoder.empty() if plan.refills else decoder.queue_from(decoder.begin(floors[0]))
    for size, floor in zip(plan.sizes, floors, strict=True):
        is_first = size == plan.sizes[0]  # later, no prompt is left
        if not is_first:
            queue = queue._replace(slots=_move_together(queue.slots, size))
        body = decoder.refill_and_advance if plan.refills and is_first else decoder.advance_slots
        queue = decoder.store(jax.lax.while_loop(functools.partial(decoder.should_continue, floor), body, queue))
    return queue.results, queue.lengths


class _Decoder(NamedTuple):
    """Constants of one decode, and its steps."""

    model: Model
    prompts: PromptBatch
    keys: Array
    config: SamplingConfig
    plan: Plan

    @property
    def width(self) -> int:
        """T, the columns of a ring."""
        return self.prompts.prompt_ids.shape[1] + self.config.max_new_tokens

    def begin(self, floor: int) -> _Slots:
        """Fill the slots, and decode half of the tokens in a cache without room for the others, as attention reads all.

        It ends early if no more than `floor` slots decode.
        """
        columns = self.width - self.config.max_new_tokens // 2
        slots = jax.lax.while_loop(
            lambda slots: _anywhere(jnp.sum(~slots.done) > floor) & (slots.column < columns),
            self.advance,
            self.fill_all(columns),
        )
        return slots._replace(cache=slots.cache.widen(self.width))

    def fill_all(self, columns: int) -> _Slots:
        """Slots that hold all sequences, each with its first token, and a cache of so many columns."""
        count, before = self.plan.sequences, self.prompts.prompt_ids.shape[1]
        logits, cache, kept = self._prefill(self.prompts, columns)
        kept = jax.tree.map(lambda x: _widen(x, self.config.max_new_tokens), kept)
        column, sequence = jnp.int32(before), jnp.arange(count, dtype=jnp.int32)
        ring = self._blank(count, logits.shape[-1])._replace(kept=kept)
        new = _new_slots(cache, column, sequence, self.keys, ring)
        return self._add_tokens(new, logits, column)

    def empty(self) -> _Queue:
        """Free slots, and the whole queue."""
        count, size = self.plan.sequences, self.plan.sizes[0]
        logits, _, kept = jax.eval_shape(lambda: self._prefill(self._block(jnp.int32(0)), self.width))
        width = self.width

        def blank(rows: int) -> Columns:
            return self._blank(rows, logits.shape[-1])._replace(
                kept=jax.tree.map(lambda x: jnp.zeros((rows, width, *x.shape[2:]), x.dtype), kept)
            )

        cache, column = self.model.make_cache(size, width), jnp.int32(self.prompts.prompt_ids.shape[1])
        slots = _new_slots(cache, column, jnp.full(size, count, jnp.int32), self.keys[:size], blank(size))
        slots = slots._replace(done=jnp.ones(size, bool))
        return _Queue(slots, jnp.int32(0), jnp.zeros(count, jnp.int32), blank(count))

    def queue_from(self, slots: _Slots) -> _Queue:
        """An empty queue, whose sequences are all in slots."""
        results = jax.tree.map(jnp.zeros_like, slots.ring)
        return _Queue(slots, jnp.int32(self.plan.sequences), jnp.zeros_like(slots.drawn), results)

    def should_continue(self, floor: int, queue: _Queue) -> Array:
        """True while prompts are left, or more than `floor` slots decode."""
        return _anywhere((queue.next < self.plan.sequences) | (jnp.sum(~queue.slots.done) > floor))

    def refill_and_advance(self, queue: _Queue) -> _Queue:
        """Fill the free slots, then decode a token of each."""
        return self.advance_slots(jax.lax.while_loop(self._has_room, self._refill, queue))

    def advance_slots(self, queue: _Queue) -> _Queue:
        """Decode a token of each slot."""
        return queue._replace(slots=self.advance(queue.slots))

    def advance(self, slots: _Slots) -> _Slots:
        """Decode the next token of each slot."""
        column = slots.column
        cache = slots.cache.at(column) if self.plan.refills else slots.cache
        last = jax.lax.dynamic_slice_in_dim(slots.ring.token_ids, column, 1, axis=1)
        logits, cache, kept = self.model.step(last, ~slots.done[:, None], cache)
        put = functools.partial(_put, column=column, rows=~slots.done)
        ring = slots.ring._replace(kept=jax.tree.map(lambda old, new: put(old, new[:, 0]), slots.ring.kept, kept))
        return self._add_tokens(slots._replace(cache=cache, ring=ring), logits, (column + 1) % self.width)

    def store(self, queue: _Queue) -> _Queue:
        """Copy the ended sequences into the results."""
        slots = queue.slots
        target = jnp.where(slots.done, slots.sequence, self.plan.sequences)  # rows out of range are dropped

        def store(results: Array, ring: Array) -> Array:
            return _put_rows(results, roll(ring, before - slots.start), target)

        before, roll = self.prompts.prompt_ids.shape[1], jax.vmap(functools.partial(jnp.roll, axis=0))
        results = jax.tree.map(store, queue.results, slots.ring)
        return queue._replace(results=results, lengths=_put_rows(queue.lengths, slots.drawn, target))

    def _has_room(self, queue: _Queue) -> Array:
        """True if, summed over devices, the sequences that could start now are at least those of the next blocks."""
        block = jnp.minimum(self.plan.block, self.plan.sequences - queue.next)
        rooms, blocks = _total(jnp.stack([self._room(queue), block]))
        return (blocks > 0) & (rooms >= blocks)

    def _room(self, queue: _Queue) -> Array:
        """Number of the next sequences that could start now: whole prompts, at most as many as slots are free."""
        free = jnp.sum(queue.slots.done, dtype=jnp.int32) // self.plan.copies * self.plan.copies
        return jnp.minimum(free, self.plan.sequences - queue.next)

    def _refill(self, queue: _Queue) -> _Queue:
        """Put the next sequences, at most R, into free slots, each with its first token."""
        queue, plan = self.store(queue), self.plan
        taken = jnp.minimum(self._room(queue), plan.block)
        slots, before = queue.slots, self.prompts.prompt_ids.shape[1]
        logits, cache, kept = self._prefill(self._block(queue.next // plan.copies), before)
        sequence = queue.next + jnp.arange(plan.block, dtype=jnp.int32)
        free = jnp.argsort(~slots.done)[: plan.block]
        rows = jnp.where(jnp.arange(plan.block) < taken, free, len(slots.done))  # rows out of range are dropped
        columns = (slots.column - before + jnp.arange(before)) % self.width
        ring = jax.tree.map(lambda x: x[free], slots.ring._replace(kept=()))
        new = _new_slots(cache, slots.column, sequence, self.keys[sequence], ring)
        new = self._add_tokens(new, logits, slots.column)
        put = functools.partial(_put_rows, rows=rows)
        slots = slots._replace(
            cache=slots.cache.insert(rows, cache, columns),
            ring=Columns(
                put(slots.ring.token_ids, new.ring.token_ids),
                put(slots.ring.logps, new.ring.logps),
                jax.tree.map(put, slots.ring.allowed, new.ring.allowed),
                jax.tree.map(
                    lambda x, y: x.at[rows[:, None], columns[None]].set(y, mode="drop"), slots.ring.kept, kept
                ),
            ),
            **{name: put(getattr(slots, name), getattr(new, name)) for name in _ROWS},
        )
        return queue._replace(slots=slots, next=queue.next + taken)

    def _block(self, first: Array) -> PromptBatch:
        """The prompts of a block; the last block of the queue is filled up with copies of the last prompt."""
        rows = jnp.minimum(first + jnp.arange(self.plan.block // self.plan.copies), len(self.prompts.prompt_ids) - 1)
        return jax.tree.map(lambda x: jnp.asarray(x)[rows], self.prompts)

    def _prefill(self, prompts: PromptBatch, columns: int) -> tuple[Array, Any, Any]:
        """Logits, cache of so many columns and kept values of the copies of these prompts, which share one pass."""
        cache = self.model.make_cache(len(prompts.prompt_ids), columns)
        logits, cache, kept = self.model.step(jnp.asarray(prompts.prompt_ids), jnp.asarray(prompts.prompt_mask), cache)
        if self.plan.copies == 1:
            return logits, cache, kept
        repeat = functools.partial(jnp.repeat, repeats=self.plan.copies, axis=0)
        return repeat(logits), cache.repeat(self.plan.copies), jax.tree.map(repeat, kept)

    def _add_tokens(self, slots: _Slots, logits: Array, column: Array) -> _Slots:
        """Draw a token of each slot that decodes, and write it to a column."""
        alive, config = ~slots.done, self.config
        logits = drawing.kept_logits(logits, config)
        token, logp = drawing.draw(logits, drawing.uniforms(slots.key, slots.drawn))
        ring, drawn = slots.ring, slots.drawn + alive.astype(jnp.int32)
        put = functools.partial(_put, column=column, rows=alive)
        allowed = None if ring.allowed is None else put(ring.allowed, drawing.pack(logits))
        is_stop = jnp.isin(token, jnp.array(config.stop_ids, jnp.int32))
        return slots._replace(
            column=column,
            drawn=drawn,
            done=slots.done | is_stop | (drawn == config.max_new_tokens),
            ring=Columns(put(ring.token_ids, token), put(ring.logps, logp), allowed, ring.kept),
        )

    def _blank(self, rows: int, vocab: int) -> Columns:
        shape = (rows, self.width)
        allowed = jnp.zeros((*shape, -(-vocab // 8)), jnp.uint8) if self.config.truncates else None
        return Columns(jnp.full(shape, self.config.pad_id, jnp.int32), jnp.zeros(shape, jnp.float32), allowed, ())


def _anywhere(condition: Array) -> Array:
    """True if the condition holds on any device of a `jax.shard_map`: loops of all devices end together."""
    return _total(condition.astype(jnp.int32)) > 0 if meshes.manual_axes() else condition


def _total(x: Array) -> Array:
    """The sum over the devices of a `jax.shard_map`; x outside of one."""
    return jax.lax.psum(x, meshes.manual_axes()) if meshes.manual_axes() else x


def _new_slots(cache: Any, column: Array, sequence: Array, key: Array, ring: Columns) -> _Slots:
    """Slots whose sequences have no token of a completion yet; the first one goes to `column`."""
    start, drawn = jnp.full_like(sequence, column), jnp.zeros_like(sequence)
    return _Slots(cache, column, sequence, key, start, drawn, jnp.zeros(len(sequence), bool), ring)


def _move_together(slots: _Slots, size: int) -> _Slots:
    """The slots that still decode, at most `size`, as the first rows."""
    rows = jnp.argsort(slots.done)[:size]
    taken = {name: getattr(slots, name)[rows] for name in _ROWS}
    return slots._replace(cache=slots.cache.take(rows), ring=jax.tree.map(lambda x: x[rows], slots.ring), **taken)


def _widen(x: Array, columns: int) -> Array:
    """Add columns of zeros at the end: [B, S, ...] -> [B, S + columns, ...]."""
    return jnp.pad(x, [(0, columns if axis == 1 else 0) for axis in range(x.ndim)])


def _put(old: Array, new: Array, column: Array, rows: Array) -> Array:
    """Write a column in some rows: old [N, T, ...], new [N, ...], rows: bool [N]."""
    before = jax.lax.dynamic_index_in_dim(old, column, axis=1, keepdims=False)
    mask = rows.reshape(-1, *[1] * (new.ndim - 1))
    return jax.lax.dynamic_update_index_in_dim(old, jnp.where(mask, new, before), column, axis=1)


def _put_rows(old: Array, new: Array, rows: Array) -> Array:
    """Write some rows; rows out of range are dropped."""
    return old.at[rows].set(new, mode="drop")
