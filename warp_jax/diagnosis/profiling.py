"""Trace of some training steps: what the devices and the host did, and when."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from warp_jax.parallel import hosts

FIRST = 3  # steps of this process that are not traced: the first compile, or restore a state


class Profile:
    """Traces `steps` steps of the first run that this process trains, into a folder. Process 0 writes."""

    def __init__(self, steps: int, folder: Path):
        self._steps, self.folder = steps, folder
        self._is_on = False
        self.written = False

    @contextlib.contextmanager
    def of_run(self) -> Iterator[Callable[[Any], None]]:
        """Yield a function to call with the state after each step of a run.

        The trace stops after `steps` steps or at the end of the run. For later runs the function does nothing.
        """
        steps, self._steps = self._steps * hosts.is_first(), 0
        calls = 0

        def after_step(state: Any) -> None:
            nonlocal calls
            calls += 1
            if steps and calls in (FIRST, FIRST + steps):
                jax.block_until_ready(state)
                (self._start if calls == FIRST else self._stop)()

        try:
            yield after_step
        finally:
            self._stop()

    def _start(self) -> None:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # each call of a Python function would be slowed down, and shown
        jax.profiler.start_trace(self.folder, profiler_options=options)
        self._is_on = True

    def _stop(self) -> None:
        if self._is_on:
            self._is_on = False
            jax.profiler.stop_trace()
            self.written = True
