"""The training loop that SFT, reward model and RL share: step, log metrics, save the state, resume bit-for-bit."""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from warp_jax import files
from warp_jax.models import partitioning
from warp_jax.parallel import hosts, meshes, stopping
from warp_jax.storage import checkpoint, manifest
from warp_jax.training import metric_writer
from warp_jax.training.metric_writer import MetricWriter
from warp_jax.types import GuardError, Params, RewardError

State = TypeVar("State")
Metrics = Mapping[str, Any]  # numbers, and maybe BAD_ROWS
StepFn = Callable[[State, int], tuple[State, Metrics]]
OnStep = Callable[[int, Mapping[str, float]], None]  # steps done, latest metrics
BAD_ROWS = "bad_rows"  # int32 [B]: rows of the data for which a value is not finite, -1 for the others
SHOWN_ROWS = 5  # in an error
# Round bfloat16 values wherever the program says so: then the policy and its anchor round nearly alike.
ROUNDING = {"xla_allow_excess_precision": False}


class Programs(NamedTuple, Generic[State]):
    """Compiled functions of a training loop."""

    init: Callable[..., State]  # trained params, ...
    update: Callable[..., tuple[State, Metrics]]  # state (its buffers are reused), frozen params, ...
    # arguments of update (the state is kept) -> a NamedTuple of the quantities that update computes, in this order
    trace: Callable[..., Any] = lambda *args: ()
    # trained params of a state, those that init got -> weights; they differ for the factors of LoRA
    weights: Callable[[Params, Params], Params] = lambda params, start: params


def make_programs(
    mesh: Mesh, params: Params, init: Callable[..., State], traced: Callable[..., tuple[State, Metrics, Any]]
) -> Programs[State]:
    """Compile init and update for trained params shaped like `params`, with the state sharded over the mesh.

    traced: update, which also returns the quantities that it computes. The compiled update leaves them out.
    """
    layout = partitioning.param_shardings(mesh, jax.eval_shape(init, params))

    def update(*args: Any) -> tuple[State, Metrics]:
        return traced(*args)[:2]

    def trace(*args: Any) -> Any:
        return traced(*args)[2]

    return Programs(
        init=jax.jit(init, out_shardings=layout),
        update=jax.jit(
            update, donate_argnums=0, out_shardings=(layout, meshes.replicated(mesh)), compiler_options=ROUNDING
        ),
        trace=jax.jit(trace, compiler_options=ROUNDING),
    )


class Schedule(NamedTuple):
    """Length, checkpoints and callbacks of a training loop."""

    num_steps: int
    directory: Path  # for the saved state and the metrics
    checkpoint_every: int  # steps between two saves at most
    on_step: OnStep  # called after each step is logged
    # after_step(steps done, state): called after each step, and again for a restored state or a repeated step; True
    # ends the loop
    after_step: Callable[[int, Any], bool | None] = lambda done, state: None
    checkpoint_minutes: float = math.inf  # time between two saves at most
    checked: Container[int] = ()  # after so many steps, check the metrics before after_step (as before each save)
    name: str = "training"  # for errors
    split: str = ""  # split of the data that holds BAD_ROWS, for errors
    open_observer: Callable[[], metric_writer.Observer | None] = lambda: None  # of the metrics; called in process 0


class SaveTimes:
    """When to save: every so many steps, or earlier if the last save is too old. All processes agree."""

    def __init__(self, start: int, every_steps: int, every_minutes: float):
        self._every_steps, self._every_seconds = every_steps, 60 * every_minutes
        self.saved(start)

    def saved(self, done: int) -> None:
        """Note that the state after `done` steps was saved."""
        self.newest, self._since = done, time.monotonic()
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
        left = (self._every_seconds - seconds) / max(seconds, 1e-3) * (done - self.newest)
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
        FloatingPointError: a metric is not finite; nothing of its step or later ones is saved.
        StorageError: all saved states are damaged.
        RewardError, GuardError, Stopped: step_fn, after_step or a signal ended it; the last whole state is saved.
    """
    directory = schedule.directory
    store = checkpoint.StateStore(directory / "state", log=directory / metric_writer.FILE)
    start, state = store.restore(init)
    schedule.on_step(start, {})
    writer = MetricWriter(directory, start, schedule.open_observer()) if hosts.is_first() else None
    with contextlib.closing(store), contextlib.closing(writer) if writer else contextlib.nullcontext():
        done = start
        pending: Metrics = {}
        saves = SaveTimes(start, schedule.checkpoint_every, schedule.checkpoint_minutes)

        def log() -> None:
            nonlocal pending
            if pending:
                _log(writer, done - 1, pending, schedule, saves.newest)
            pending = {}

        try:
            ended = start and schedule.after_step(start, state)  # it may have been interrupted in there
            for step in range(start, start if ended else schedule.num_steps):
                with jax.profiler.StepTraceAnnotation("train", step_num=step):
                    state, metrics = step_fn(state, step)
                log()
                done, pending = step + 1, metrics
                if done in schedule.checked:
                    log()
                if schedule.after_step(done, state):
                    break
                stopping.stop_if_requested(f"{directory.name}, saved after step {done}")
                if saves.due(done):
                    log()
                    _save(store, writer, done, state)
                    saves.saved(done)
            log()
        except (RewardError, GuardError, stopping.Stopped):  # raised in every process, with a whole state
            log()
            if done > saves.newest:
                _save(store, writer, done, state)
            raise
        except FloatingPointError:  # raised in every process
            raise
        except Exception as error:
            hosts.exit_if_multihost(error)  # before closing the store, which would wait for the others
            raise
    return state


@functools.partial(jax.profiler.annotate_function, name="saving")
def _save(store: checkpoint.StateStore, writer: MetricWriter | None, done: int, state: Any) -> None:
    if writer:
        writer.publish()  # the saved state holds the checksum of the rows up to it
    store.save(done, state)


def state_before(step_fn: StepFn[State], init: Callable[[], State], directory: Path, step: int) -> State:
    """State before a step, made from the newest saved state up to that step, or else from init(). Writes nothing."""

    def find() -> int:
        return next((saved for saved in manifest.complete_steps(directory / "state") if saved <= step), 0)

    start = hosts.number_of_first(find)
    saved = directory / "state" / str(start)
    state = checkpoint.restore_params(saved, checkpoint.abstract(init())) if start else init()
    for number in range(start, step):
        state, _ = step_fn(state, number)
    return state


@functools.partial(jax.profiler.annotate_function, name="logging")
def _log(writer: MetricWriter | None, step: int, metrics: Metrics, schedule: Schedule, newest: int) -> None:
    """Read and write the metrics of a step. newest: steps done in the newest saved state."""
    numbers = {name: value for name, value in metrics.items() if name != BAD_ROWS}
    values = {name: float(value) for name, value in jax.device_get(numbers).items()}
    bad = {name: str(value) for name, value in values.items() if not math.isfinite(value)}
    if bad:
        rows = np.unique(jax.device_get(metrics.get(BAD_ROWS, -1)))
        raise FloatingPointError(_stop(step, bad, rows[rows >= 0].tolist(), schedule, newest))
    if writer:
        writer.write(step, values)
    schedule.on_step(step + 1, values)


def _stop(step: int, bad: Mapping[str, str], rows: list[int], schedule: Schedule, newest: int) -> str:
    """Write the file that --replay needs; return the line for the user."""
    path = schedule.directory / f"replay_{step}.json"
    content = {"part": schedule.name, "step": step, "saved_step": newest, "not_finite": dict(bad), "rows": rows}
    if hosts.is_first():
        files.write_json(path, content)
    named = ", ".join(f"{name} is {value}" for name, value in bad.items())
    shown = ", ".join(map(str, rows[:SHOWN_ROWS])) + (f" and {len(rows) - SHOWN_ROWS} more" * (len(rows) > SHOWN_ROWS))
    where = f" (row{'s' * (len(rows) > 1)} {shown} of {schedule.split})" if rows else ""
    return (
        f"{schedule.name} step {step}: {named}, want finite{where}; nothing after step {newest} is saved; the same "
        f"command with --replay={path} shows what broke first"
    )
