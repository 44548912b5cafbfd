"""The program with a NaN in one step: python -m tests.poisoned_main PLACE PART STEP --config=... --workdir=...

PLACE: reward, sampler, gradient or weights (those that the step makes). PART: sft, reward_model or iteration_I/run_M;
the first two have no reward and no sampler. All other steps run the compiled programs of warp_jax.main, so their bits
are the same.
"""

import contextlib
import functools
import re
import sys
from unittest import mock

import jax
import numpy as np
import optax
from absl import app

from warp_jax import main
from warp_jax.data import batches
from warp_jax.training import loop, reinforce

STREAMS = {"sft": "sft", "reward_model": "labels reward 0"}  # the order of rows that a step asks for last
ROW = 2  # of the batch, for faults in rows
active = False  # True while the chosen step runs


def spoiled(tree):
    """A tree with a NaN in the first number of its last leaf."""
    leaves, structure = jax.tree.flatten(tree)
    return structure.unflatten([*leaves[:-1], leaves[-1].at[(0,) * leaves[-1].ndim].set(np.nan)])


def noting_step(function, stream, chosen):
    """Wrap epoch_rows: note if the step is the chosen one."""

    def epoch_rows(count, size, step, **options):
        global active  # noqa: PLW0603
        active = (options["stream"], step) == (stream, chosen)
        return function(count, size, step, **options)

    return epoch_rows


def spoiling_rows(function, place):
    """Wrap collect: in the chosen step, one row has a NaN."""

    def collect(*args):
        rollout, rewards = function(*args)
        if active and place == "reward":
            rewards = jax.tree.map(lambda x: x.at[ROW].set(np.nan), rewards)
        if active and place == "sampler":
            rollout = rollout._replace(per_token_logps=rollout.per_token_logps.at[ROW, 0].set(np.nan))
        return rollout, rewards

    return collect


def spoiling_programs(function, place):
    """Wrap make_programs: the chosen step runs another program, whose gradient or new weights have a NaN."""

    def grad(gradient, *args, **options):
        take = gradient(*args, **options)

        def call(*values):
            first, second = take(*values)  # value, gradient; or gradient, metrics
            return (spoiled(first), second) if options else (first, spoiled(second))

        return call

    patches = {
        "gradient": [(jax, name, functools.partial(grad, getattr(jax, name))) for name in ("grad", "value_and_grad")],
        "weights": [(optax, "apply_updates", lambda *args, apply=optax.apply_updates: spoiled(apply(*args)))],
    }.get(place, [])

    def make_programs(mesh, params, init, traced):
        def with_fault(*args):
            with contextlib.ExitStack() as stack:
                for patch in patches:
                    stack.enter_context(mock.patch.object(*patch))
                return traced(*args)

        clean, faulty = (function(mesh, params, init, update) for update in (traced, with_fault))

        def call(name, *args):
            return getattr(faulty if active else clean, name)(*args)

        return clean._replace(update=functools.partial(call, "update"), trace=functools.partial(call, "trace"))

    return make_programs


def poison(place, part, step):
    """Yield the patches: module, name, new value."""
    stream = STREAMS.get(part) or "iteration {} run {}".format(*re.findall(r"\d+", part))
    yield batches, "epoch_rows", noting_step(batches.epoch_rows, stream, step)
    yield reinforce, "collect", spoiling_rows(reinforce.collect, place)
    yield loop, "make_programs", spoiling_programs(loop.make_programs, place)


if __name__ == "__main__":
    for patch in list(poison(sys.argv[1], sys.argv[2], int(sys.argv[3]))):
        setattr(*patch)
    del sys.argv[1:4]
    app.run(main.main, flags_parser=main.parse_flags)
