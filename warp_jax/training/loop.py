"""The training loop that SFT, reward model and RL share: step, log metrics, save the state, resume bit-for-bit."""

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import jax
from jax.sharding import Mesh

from warp_jax.models import partitioning
from warp_jax.parallel import hosts, meshes, stopping
from warp_jax.storage import checkpoint
from warp_jax.training import metric_writer
from warp_jax.training.metric_writer import MetricWriter
from warp_jax.types import Params, RewardError

State = TypeVar("State")
Metrics = Mapping[str, Any]
StepFn = Callable[[State, int], tuple[State, Metrics]]
OnStep = Callable[[int, Mapping[str, float]], None]  # steps done, latest metrics


class Programs(NamedTuple, Generic[State]):
    """Compiled functions of a training loop."""

    init: Callable[[Params], State]  # trained params
    update: Callable[..., tuple[State, Metrics]]  # state (its buffers are reused), frozen params, ...


def make_programs(
    mesh: Mesh, params: Params, init: Callable[[Params], State], update: Callable[..., tuple[State, Metrics]]
) -> Programs[State]:
    """Compile init and update for trained params shaped like `params`, with the state sharded over the mesh."""
    layout = partitioning.param_shardings(mesh, jax.eval_shape(init, params))
    return Programs(
        init=jax.jit(init, out_shardings=layout),
        update=jax.jit(update, donate_argnums=0, out_shardings=(layout, meshes.replicated(mesh))),
    )


class Schedule(NamedTuple):
    """Length, checkpoints and callbacks of a training loop."""

    num_steps: int
    directory: Path  # for the saved state and the metrics
    checkpoint_every: int  # steps between two saves at most
    on_step: OnStep  # called after each step is logged
    # after_step(steps done, state): called after each step, and again for a restored state or a repeated step
    after_step: Callable[[int, Any], None] = lambda done, state: None
    checkpoint_minutes: float = math.inf  # time between two saves at most


class SaveTimes:
    """When to save: every so many steps, or earlier if the last save is too old. All processes agree."""

    def __init__(self, start: int, every_steps: int, every_minutes: float):
        self._every_steps, self._every_seconds = every_steps, 60 * every_minutes
        self.saved(start)

    def saved(self, done: int) -> None:
        """Note that the state after `done` steps was saved."""
        self._saved, self._since = done, time.monotonic()
        self._look = done + 1  # when to look at the clock; the others wait for process 0 there

    def due(self, done: int) -> bool:
        """True if the state after `done` steps is to be saved; asked after each step."""
        if done % self._every_steps == 0:
            return True
        if done < self._look:
            return False
        left = hosts.number_of_first(lambda: self._steps_left(done))
        self._look = done + math.ceil(left / 2)
        return not left

    def _steps_left(self, done: int) -> int:
        """Steps until the time is over, at the speed since the last save."""
        seconds = time.monotonic() - self._since
        left = (self._every_seconds - seconds) / max(seconds, 1e-3) * (done - self._saved)
        return math.ceil(min(max(left, 0), self._every_steps))


def run_steps(step_fn: StepFn[State], init: Callable[[], State], schedule: Schedule) -> State:
    """Run steps 0 .. num_steps - 1, or resume from the newest saved state; return the final state.

    The metrics of a step are read after the next step is dispatched, so the device does not wait for the host.

    Args:
        step_fn: (state, step) -> (state, metrics). It must depend on its arguments only: then a loop that is killed
            and resumed ends bit-for-bit like one that never stopped.
        init: makes the first state; when resuming, only its shapes, dtypes and shardings are used.
        schedule: length, checkpoints and callbacks.

    Raises:
        FloatingPointError: a metric is not finite.
        StorageError: all saved states are damaged.
        RewardError: step_fn or after_step raised it; the state after the last whole step is saved.
        Stopped: a signal asked for it; the state after the last step is saved.
    """
    directory, on_step = schedule.directory, schedule.on_step
    store = checkpoint.StateStore(directory / "state", log=directory / metric_writer.FILE)
    start = store.latest_step()
    state = init()
    if start:
        like = checkpoint.abstract(state)
        del state  # device memory may not hold two
        state = store.restore(start, like)
    on_step(start, {})
    writer = MetricWriter(directory, start) if hosts.is_first() else None
    with contextlib.closing(store), contextlib.closing(writer) if writer else contextlib.nullcontext():
        done = start
        pending: Metrics = {}
        saves = SaveTimes(start, schedule.checkpoint_every, schedule.checkpoint_minutes)
        try:
            if start:
                schedule.after_step(start, state)  # it may have been interrupted in there
            for step in range(start, schedule.num_steps):
                state, metrics = step_fn(state, step)
                if pending:
                    _log(writer, step - 1, pending, on_step)
                done, pending = step + 1, metrics
                schedule.after_step(done, state)
                stopping.stop_if_requested(f"{directory.name}, saved after step {done}")
                is_saved = saves.due(done)
                if is_saved or done == schedule.num_steps:
                    _log(writer, step, pending, on_step)
                    pending = {}
                if is_saved:
                    _save(store, writer, done, state)
                    saves.saved(done)
        except (RewardError, stopping.Stopped):  # raised in every process, with a whole state: no step is lost
            if pending:
                _log(writer, done - 1, pending, on_step)
                _save(store, writer, done, state)
            raise
        except FloatingPointError:  # raised in every process
            raise
        except Exception as error:
            hosts.exit_if_multihost(error)  # before closing the store, which would wait for the others
            raise
    return state


def _save(store: checkpoint.StateStore, writer: MetricWriter | None, done: int, state: Any) -> None:
    if writer:
        writer.publish()  # the saved state holds the checksum of the rows up to it
    store.save(done, state)


def _log(writer: MetricWriter | None, step: int, metrics: Metrics, on_step: OnStep) -> None:
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    bad = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
    if bad:
        raise FloatingPointError(f"step {step}: {', '.join(bad)}, want finite; lower learning_rate or check rewards")
    if writer:
        writer.write(step, values)
    on_step(step + 1, values)
