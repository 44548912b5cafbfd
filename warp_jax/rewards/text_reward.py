"""A reward that is a user's Python function of text: call it with a time limit, and check its values.

Each failure is a RewardError: one line with the function, what it did, and the first completion for which it fails.
"""

import copy
import dataclasses
import importlib
import inspect
import math
import numbers
import traceback
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any

import jax.numpy as jnp
import numpy as np

from warp_jax.parallel import hosts
from warp_jax.rewards import time_limit
from warp_jax.settings.legacy import MOVED
from warp_jax.types import RewardError

# (prompts, completions, rows of the data source) -> one number for each completion
TextFn = Callable[[Sequence[str], Sequence[str], Sequence[Mapping[str, Any]]], Any]
SHOWN = 60  # characters of a text or a value in an error
_REAL = (np.bool_, np.integer, np.floating)


@dataclasses.dataclass(frozen=True)
class TextReward:
    """A text function with checks."""

    function: TextFn
    name: str  # for errors, such as "config.rewards.polite.source 'my_package.rewards:polite'"
    timeout: float | None = None  # seconds for one call; None = no limit

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], rows: Sequence[Mapping[str, Any]]
    ) -> np.ndarray:
        """Rewards, float32 [N], computed on process 0 and sent to all processes. Raises RewardError in all of them."""
        try:
            return hosts.computed_on_first_process(self.local)(prompts, completions, rows)
        except hosts.PeerError as error:
            raise RewardError(str(error)) from error

    def local(
        self, prompts: Sequence[str], completions: Sequence[str], rows: Sequence[Mapping[str, Any]]
    ) -> np.ndarray:
        """Rewards, float32 [N], computed in this process. Raises RewardError with the index of a completion."""
        try:
            return self._values(prompts, completions, rows)
        except RewardError as error:
            raise located(error, self.name, prompts, completions) from error

    def _values(self, *batch: Sequence[Any]) -> np.ndarray:
        count = len(batch[0])
        future = self._run(lambda: checked(self._call(*batch), count))
        error = future.exception()
        if error is None:
            return future.result()
        if isinstance(error, RewardError):
            raise error
        raise RewardError(f"raised {describe(error)}", self._failing_alone(batch)) from error

    def _failing_alone(self, batch: Sequence[Sequence[Any]]) -> int | None:
        """Index of the first completion for which the function also fails if it is called for it alone."""

        def find() -> int | None:
            for number, one in enumerate(zip(*batch, strict=True)):
                try:
                    self._call(*([value] for value in one))
                except BaseException:  # exit calls too
                    return number
            return None

        try:
            return self._run(find).result()
        except RewardError:
            return None

    def _call(self, *batch: Sequence[Any]) -> Any:
        """Call the function with copies: the rows are those of the whole job, and functions write into them."""
        return self.function(*(copy.deepcopy(list(values)) for values in batch))

    def _run(self, action: Callable[[], Any]) -> Any:
        line = f"no result after {self.timeout} seconds; fix the function, or raise its timeout"
        try:
            return time_limit.run(action, self.timeout, f"{self.name}: {line}")
        except TimeoutError as error:
            raise RewardError(line) from error


def load_function(source: str, path: str = "rewards", timeout: float | None = None) -> TextReward:
    """Import the Python function 'package.module:name'. In a multi-host job, only process 0 calls it.

    path: of the setting, for errors. timeout: seconds for the import, and for each call; None = no limit.
    Raises RewardError.
    """
    module_name, _, name = source.partition(":")
    label = f"{path} {source!r}"
    late = f"{label}: not imported after {timeout} seconds"
    try:
        future = time_limit.run(
            lambda: getattr(importlib.import_module(MOVED.get(module_name, module_name)), name), timeout, late
        )
    except TimeoutError as error:
        raise RewardError(late) from error
    failure = future.exception()  # a user's module can raise anything, and exit
    if failure is not None:
        raise RewardError(f"{path}: cannot load {source!r}: {describe(failure)}") from failure
    if not callable(future.result()):
        raise RewardError(f"{path}: {source!r} is not a function")
    return TextReward(future.result(), label, timeout)


def checked(values: Any, count: int) -> np.ndarray:
    """Convert what a function returned to float32 [count].

    values: a list, a tuple or any array (numpy, JAX, torch, pandas) of finite real numbers or bools, one for each
    completion. Raises RewardError for anything else, with the index of the first value that is not such a number.
    """
    is_list = isinstance(values, list | tuple)
    items = values if is_list or isinstance(values, np.ma.MaskedArray) else np.asarray(values)
    shape = (len(items),) if is_list else items.shape
    if shape != (count,):
        if inspect.iscoroutine(values):
            values.close()  # else Python warns that it was never awaited
        of_shape = f" of shape {shape}" if shape else ""
        raise RewardError(
            f"returned a {type(values).__name__}{of_shape}, want one number per completion: shape ({count},)"
        )
    result = np.zeros(count, np.float32)
    for number, value in enumerate(items):
        result[number] = _as_float32(value)
        if not np.isfinite(result[number]):
            raise RewardError(f"returned {cut(value)}, want a finite number (float32)", number)
    return result


def located(error: RewardError, name: str, prompts: Sequence[str], completions: Sequence[str]) -> RewardError:
    """Add the function's name and the completion (without an index, the first of the batch) to an error."""
    first, number = ("first ", 0) if error.index is None else ("", error.index)
    shown = f"{first}prompt {cut(prompts[number])}, completion {cut(completions[number])}"
    return RewardError(f"{name}: {error}; {shown}", number)


def describe(error: BaseException) -> str:
    """Describe an exception in one line, with its place in the user's file."""
    text = " ".join("".join(traceback.format_exception_only(error)).split())[:300]
    others = (__file__, time_limit.__file__, importlib.__file__)
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename not in others and not frame.filename.startswith("<frozen"):
            return f"{text} ({frame.filename} line {frame.lineno})"
    return text


def cut(value: Any) -> str:
    """The beginning of a value's repr; a number of numpy is shown as one of Python."""
    value = value.item() if isinstance(value, np.number) else value
    text = repr(value[: SHOWN + 1] if isinstance(value, str) else value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _as_float32(value: Any) -> np.float32:
    """A real number of any type as float32; nan for anything else (or a masked one), inf if it is too large."""
    array = np.asarray(value)
    is_scalar = array.ndim == 0 and not np.ma.is_masked(value)
    if isinstance(value, numbers.Real | Decimal):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
    elif is_scalar and any(jnp.issubdtype(array.dtype, kind) for kind in _REAL):
        number = float(array)
    else:
        return np.float32(np.nan)
    with np.errstate(over="ignore"):
        return np.float32(number)
