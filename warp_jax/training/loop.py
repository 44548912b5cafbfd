"""The loop of every optimisation: step, log, checkpoint, resume to the bit."""

import contextlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax

from warp_jax.parallel import hosts
from warp_jax.storage import checkpoint
from warp_jax.training.metric_writer import MetricWriter

State = TypeVar("State")
StepFn = Callable[[State, int], tuple[State, Mapping[str, Any]]]
OnStep = Callable[[int, Mapping[str, float]], None]  # steps done, latest metrics


def run_steps(
    step_fn: StepFn[State],
    init: Callable[[], State],
    *,
    num_steps: int,
    directory: Path,
    checkpoint_every: int,
    on_step: OnStep,
    after_step: Callable[[int, State], None] = lambda step, state: None,
) -> State:
    """Apply `step_fn(state, step)` to init() for step = 0 .. num_steps - 1, or go on from the newest in `directory`.

    `step_fn` must depend on its arguments only, then a killed loop started again ends with the same bits as an
    unbroken one. Metrics of a step are read after the next one is dispatched, so the device never waits for the host.
    `after_step(done, state)` is called with the number of steps done, and again for a step repeated after a kill.
    """
    store = checkpoint.StateStore(directory / "state")
    start = store.latest_step()
    state = init()
    if start:
        like = checkpoint.abstract(state)
        del state  # there is no room for two
        state = store.restore(like)
    on_step(start, {})
    metrics_file = MetricWriter(directory, start) if hosts.is_first() else contextlib.nullcontext()
    with contextlib.closing(store), metrics_file as writer:
        pending: Mapping[str, Any] = {}
        try:
            for step in range(start, num_steps):
                state, metrics = step_fn(state, step)
                if pending:
                    _log(writer, step - 1, pending, on_step)
                pending = metrics
                done = step + 1
                after_step(done, state)
                if done == num_steps or done % checkpoint_every == 0:
                    _log(writer, step, pending, on_step)
                    pending = {}
                if done % checkpoint_every == 0:
                    store.save(done, state)
        except FloatingPointError:  # in every process
            raise
        except Exception as error:
            hosts.exit_if_multihost(error)  # before the store is closed, which would wait for the others
            raise
    return state


def _log(writer: MetricWriter | None, step: int, metrics: Mapping[str, Any], on_step: OnStep) -> None:
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    bad = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
    if bad:
        raise FloatingPointError(f"step {step}: {', '.join(bad)}; lower the learning rate, or check the rewards")
    if writer:
        writer.write(step, values)
    on_step(step + 1, values)
