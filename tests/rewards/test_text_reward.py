"""Python functions as rewards: every kind of failure is one RewardError that says what, for which row, and why."""

import collections
import contextlib
import decimal
import fractions
import inspect
import re
import sys
import threading
import time
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pandas
import pytest
import torch

from tests.commands import run
from warp_jax.parallel import hosts
from warp_jax.rewards import from_folder, reward_functions, text_reward, time_limit
from warp_jax.rewards.text_reward import TextReward, checked
from warp_jax.types import RewardError, Rewards, Rollout

HUGE = 10**400
TIMERS = Path("/proc/self/timers")  # of the C library, of this process


class _Broken:
    """A value of which nothing works."""

    def __array__(self, *args, **kwargs):
        raise RuntimeError("no array")

    __repr__ = __array__


async def _coroutine():
    return [1.0, 2.0]


GOOD = [
    [0.5, -2],
    (0.5, -2),
    np.array([0.5, -2]),
    np.array([0.5, -2], np.float16),
    np.ma.array([0.5, -2], mask=[False, False]),
    jnp.array([0.5, -2], jnp.bfloat16),
    [jnp.float32(0.5), np.int8(-2)],
    [np.array(0.5), torch.tensor(-2)],
    torch.tensor([0.5, -2]),
    pandas.Series([0.5, -2], index=[7, 3]),
    [fractions.Fraction(1, 2), decimal.Decimal(-2)],
    collections.deque([0.5, -2]),
]


@pytest.mark.parametrize("values", GOOD, ids=lambda values: type(values).__name__)
def test_numbers_of_every_kind_are_accepted(values):
    """Fails when only numpy's own types count as numbers (bfloat16 does not), or a sequence must be a list."""
    found = checked(values, 2)
    assert found.dtype == np.float32
    assert found.tolist() == [0.5, -2]


@pytest.mark.parametrize("values", [[True, False], np.array([True, False]), [np.True_, np.False_]], ids=str)
def test_bools_count_as_one_and_zero(values):
    """Fails when bools are refused: `answer == right` is the most common reward."""
    assert checked(values, 2).tolist() == [1, 0]


BAD = [
    (None, "a NoneType, want", None),
    (1.0, "a float, want one number per completion: shape (2,)", None),
    ("12", "a str, want", None),
    (b"12", "a bytes, want", None),
    ({"a": 1, "b": 2}, "a dict, want", None),
    ({1, 2}, "a set, want", None),
    ((x for x in (1, 2)), "a generator, want", None),
    (map(float, "12"), "a map, want", None),
    (_coroutine(), "a coroutine, want", None),
    (np.zeros((2, 1)), "a ndarray of shape (2, 1), want", None),
    (jnp.zeros((1, 2)), "of shape (1, 2), want", None),
    ([], "a list of shape (0,), want", None),
    ([1.0], "a list of shape (1,), want", None),
    ([1.0, 2.0, 3.0], "a list of shape (3,), want", None),
    ([[1.0], [2.0]], "returned [1.0], want a finite number", 0),
    ([1.0, [2.0, 3.0]], "returned [2.0, 3.0], want", 1),
    ([1.0, "2.0"], "returned '2.0', want", 1),
    (np.array(["1", "2"]), "'1'", 0),
    ([1.0, None], "returned None, want", 1),
    ([1.0, 2j], "returned 2j, want", 1),
    (np.array([1, 2j]), "want a finite number", 0),
    ([1.0, float("nan")], "returned nan, want", 1),
    ([np.float32(-np.inf), 0.0], "returned -inf, want", 0),
    (jnp.array([0.0, jnp.nan]), "returned nan, want", 1),
    ([1.0, 1e39], "returned 1e+39, want a finite number (float32)", 1),
    ([0, HUGE], "returned 1000", 1),
    ([1.0, {}], "returned {}, want", 1),
    (np.ma.array([1.0, 2.0], mask=[False, True]), "returned masked, want", 1),
    ([np.ma.masked, 1], "returned masked, want", 0),
    (np.ma.zeros((2, 1)), "of shape (2, 1), want", None),
    ([0.0, np.datetime64("2024-01-01")], "2024-01-01", 1),
]


@pytest.mark.parametrize(
    ("values", "message", "index"), BAD, ids=[f"{number} {case[1]}" for number, case in enumerate(BAD)]
)
def test_anything_else_is_refused(values, message, index):
    """Fails when texts are read as numbers, a scalar is broadcast, float64 overflows to inf, the index is lost, or nan
    is shown as np.float32(nan)."""
    with pytest.raises(RewardError, match=re.escape(message)) as caught:
        checked(values, 2)
    assert caught.value.index == index
    assert not inspect.iscoroutine(values) or values.cr_frame is None  # closed, so that Python does not complain later


def test_long_values_are_cut():
    """Mutation: the whole of a long text or list stands in the error."""
    assert text_reward.cut("a" * 58) == repr("a" * 58)
    assert text_reward.cut("a" * 999) == f"'{'a' * 59}..."
    assert text_reward.cut([0] * 999) == f"{repr([0] * 999)[:60]}..."


def _raising(error):
    def function(prompts, completions, rows):
        if "bad" in "".join(completions):
            raise error
        return [0.0] * len(rows)

    return function


class _Unprintable(Exception):
    def __str__(self):
        raise RuntimeError


FAILING = [
    (_raising(KeyError("answer")), "raised KeyError: 'answer'"),
    (_raising(SystemExit(0)), "raised SystemExit: 0"),
    (_raising(KeyboardInterrupt()), "raised KeyboardInterrupt"),
    (_raising(TimeoutError("of a judge")), "raised TimeoutError: of a judge"),
    (_raising(ValueError("two\nlines")), "raised ValueError: two lines"),
    (_raising(_Unprintable()), "_Unprintable"),
    (_raising(RecursionError()), "raised RecursionError"),
    (lambda *batch: [float("nan") if "bad" in text else 1.0 for text in batch[1]], "returned nan"),
    (lambda *batch: [_Broken() if "bad" in text else 1.0 for text in batch[1]], "raised RuntimeError: no array"),
]


@pytest.mark.parametrize(("function", "message"), FAILING, ids=[message for _, message in FAILING])
def test_a_failure_names_function_and_completion(function, message):
    """Fails when exit calls or Ctrl-C of the function end the job, or the first row of a batch is blamed."""
    reward = TextReward(function, "config.rewards.x.source 'm:f'", 60.0)
    prompts, completions = ["p", "q", "r"], ["good", "a\nbad " + "x" * 200, "good"]
    assert reward(prompts, ["good"] * 3, [{}] * 3).tolist() in ([0, 0, 0], [1, 1, 1])
    with pytest.raises(RewardError) as caught:
        reward(prompts, completions, [{}] * 3)
    text = str(caught.value)
    assert text.startswith("config.rewards.x.source 'm:f': ")
    assert message in text
    assert "\n" not in text
    assert len(text) < 500
    if "Broken" not in repr(function):
        assert "; prompt 'q', completion 'a\\nbad xxx" in text or "; first prompt 'p'" in text


def _fails_elsewhere(*batch):
    raise hosts.PeerError("process 0 of 2 failed")


def test_only_the_first_process_calls_the_function(monkeypatch):
    """Mutation: every process calls the function, or its failure in another process is not a RewardError."""
    reward = TextReward(pytest.fail, "f")
    monkeypatch.setattr(hosts, "computed_on_first_process", lambda function: lambda *batch: np.float32([7]))
    assert reward(["p"], ["c"], [{}]).tolist() == [7]
    monkeypatch.setattr(hosts, "computed_on_first_process", lambda function: _fails_elsewhere)
    with pytest.raises(RewardError, match=r"^process 0 of 2 failed"):
        reward(["p"], ["c"], [{}])


def test_the_place_in_the_users_file_is_named():
    """Fails when the line of a traceback that nobody sees is lost."""
    with pytest.raises(RewardError, match=r"raised TypeError: .*arguments? but 3 were given; prompt 'p'"):
        TextReward(lambda: [1.0], "f")(["p"], ["c"], [{}])
    with pytest.raises(RewardError, match=r"test_text_reward\.py line \d+\); prompt"):
        TextReward(_raising(KeyError(3)), "f")(["p"], ["bad"], [{}])


@pytest.mark.parametrize("hang", [lambda *batch: time.sleep(60), lambda *batch: sum(iter(lambda: 0, 1))])
def test_a_function_that_hangs_is_left_behind(hang):
    """Fails when the caller waits for it, or the next call queues behind it."""
    started = time.monotonic()
    with pytest.raises(RewardError, match=r"f: no result after 0.2 seconds.*; first prompt 'p', completion ''"):
        TextReward(hang, "f", 0.2)(["p"], [""], [{}])
    assert TextReward(lambda *batch: [2.0], "g", 60.0)(["p"], [""], [{}]).tolist() == [2.0]
    assert time.monotonic() - started < 60


def test_a_call_that_ends_too_late_is_refused():
    """Fails when a long regular expression passes, because nothing could run while it kept the GIL."""
    with pytest.raises(TimeoutError):
        time_limit.run(lambda: sum(range(10**7)), 0.01, "")


def test_a_result_that_comes_too_late_is_refused(monkeypatch):
    """Mutation: only a call without a result is too late, not one that was finished before anybody could look."""
    monkeypatch.setattr(time_limit.futures, "wait", lambda calls, seconds: [call.result() for call in calls])
    assert time_limit.run(lambda: 3, 60.0, "").result() == 3
    with pytest.raises(TimeoutError, match="late"):
        time_limit.run(lambda: time.sleep(0.02), 0.01, "late")


def test_a_function_may_change_its_arguments():
    """Fails when the error is made from lists that the function has emptied."""

    def function(*batch):
        for texts in batch:
            texts.clear()
        raise KeyError

    with pytest.raises(RewardError, match=r"raised KeyError.*; prompt 'p', completion 'c'"):
        TextReward(function, "f")(["p"], ["c"], [{}])


@pytest.mark.parametrize("fails", [False, True])
def test_a_function_cannot_change_the_rows_of_the_job(fails):
    """Fails when a function gets the rows themselves, or copies that share nested values: a field that it adds or
    removes would be part of the workdir's fingerprint.
    """

    def function(prompts, completions, rows):
        for row in rows:
            row.setdefault("parsed", object())
            row["turns"].append(row.pop("text"))
        return [1.0 / (not fails)] * len(rows)

    rows = [{"text": "a", "turns": ["b"]}, {"text": "c", "turns": []}]
    with pytest.raises(RewardError, match="ZeroDivisionError") if fails else contextlib.nullcontext():
        TextReward(function, "f")(["p", "q"], ["c", "d"], rows)
    assert rows == [{"text": "a", "turns": ["b"]}, {"text": "c", "turns": []}]


def test_the_current_folder_stays(tmp_path, monkeypatch):
    """Fails when a module or a function that changes the folder leaves it changed: a relative --workdir would be made
    below another folder.
    """
    (tmp_path / "moves.py").write_text(f"import os\nos.chdir({str(tmp_path)!r})\nf = lambda *b: os.chdir('/') or [1.0]")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(before := Path.cwd())  # back, if the test fails
    function = text_reward.load_function("moves:f")
    assert Path.cwd() == before
    function(["p"], ["c"], [{}])
    assert Path.cwd() == before


HANG_IN_C = """
import itertools, re, sys
from warp_jax.rewards import time_limit
time_limit.GRACE = 0.1
time_limit.run(lambda: {action}, 0.1, "it's \\\\n late")
"""


@pytest.mark.parametrize("action", ["re.match('(a+)+$', 'a' * 99 + 'b')", "sum(itertools.repeat(1))"])
def test_a_function_that_keeps_the_gil_ends_the_process(action):
    """Fails when a regular expression that never ends hangs the job: no Python code can run, not even a signal's."""
    result = run([sys.executable, "-c", HANG_IN_C.format(action=action)])
    assert (result.returncode, result.stdout, result.stderr) == (70, "", "error: it's \\n late\n")


def test_the_timers_are_armed_before_the_function_starts(monkeypatch):
    """Fails when the function starts first: if it keeps the GIL, nothing arms the timers any more."""
    seen = []

    @contextlib.contextmanager
    def timers(*args):
        time.sleep(0.05)
        seen.append("armed")
        yield

    monkeypatch.setattr(time_limit, "_ended_by_timers", timers)
    time_limit.run(lambda: seen.append("started"), 60.0, "")
    assert seen == ["armed", "started"]


def test_calls_run_in_one_thread():
    """Fails when each call has a new thread: OpenMP would make its threads again."""
    threads = [time_limit.run(threading.get_ident, 60.0, "").result() for _ in range(3)]
    assert len(set(threads)) == 1


@pytest.mark.skipif(not TIMERS.exists(), reason="this system does not list its timers")
def test_the_timers_end_with_the_call():
    """Fails when a timer outlives its call: it would end the process in the middle of a later one."""
    assert len(time_limit.run(TIMERS.read_text, 60.0, "").result().split("ClockID: 1\n")) == 1 + 2
    assert TIMERS.read_text() == ""


MODULES = {
    "syntax": ("def f(:", "SyntaxError"),
    "missing": ("g = 1", "has no attribute 'f'"),
    "value": ("f = 3", "is not a function"),
    "raises": ("1 / 0", r"ZeroDivisionError: division by zero \(.*module_raises.py line 1\)"),
    "exits": ("import sys; sys.exit(0)", "SystemExit: 0"),
    "interrupts": ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    "hangs": ("import time; time.sleep(60)", "not imported after 0.5 seconds"),
}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_that_cannot_be_loaded_is_one_line(name, tmp_path, monkeypatch):
    """Fails when a module ends the job with its own exit code, or hangs it."""
    source, message = MODULES[name]
    (tmp_path / f"module_{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RewardError, match=message) as caught:
        text_reward.load_function(f"module_{name}:f", "config.gold.source", 0.5 if name == "hangs" else 60.0)
    assert str(caught.value).startswith("config.gold.source")
    assert "\n" not in str(caught.value)


class _Texts:
    """A tokenizer whose tokens are texts."""

    def decode_answers(self, prompts, prompt_mask, completions, completion_mask):
        return list(prompts), list(completions)


def _rollout():
    mask = np.ones((2, 1), bool)
    return Rollout(["p", "q"], mask, np.array([31, 7]), ["good", "bad"], mask, np.zeros((2, 1), np.float32))


def test_a_text_reward_names_the_row():
    """Fails when the place in the batch is given as the row."""
    rows = {31: {}, 7: {}}
    failing = TextReward(_raising(ValueError("no")), "f")
    with pytest.raises(RewardError, match="completion 'bad', row 7 of split 'eval'"):
        reward_functions.make_from_text(failing, _Texts(), rows, "eval")(_rollout())
    short = TextReward(lambda *batch: [1.0], "f")
    with pytest.raises(RewardError, match="first prompt 'p', completion 'good', row 31 of split 'eval'"):
        reward_functions.make_from_text(short, _Texts(), rows, "eval")(_rollout())


def test_a_conversation_that_a_reward_model_refuses_is_named():
    """Fails when the error of a chat template ends a job with a traceback, or the first row of a batch is blamed."""
    template = (
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}{% endfor %}"
    )
    tokenizer = types.SimpleNamespace(chat_template=template, special_tokens={})
    with pytest.raises(RewardError, match="no tools; completion 'b'") as caught:
        from_folder.answered(tokenizer, ["hello", [{"role": "tool", "content": "3"}]], ["a", "b"])
    assert caught.value.index == 1


@pytest.mark.parametrize(
    ("total", "part", "name"), [(1.0, np.nan, "config.rewards.x"), (np.inf, 1e30, "sum of all rewards")]
)
def test_learned_rewards_are_finite_in_an_evaluation(total, part, name):
    """Fails when nan of a reward model, or an overflow of the weighted sum, reaches front.csv."""

    def reward_fn(rollout):
        return Rewards(jnp.array([1.0, total], jnp.float32), {"x": jnp.array([0.5, part], jnp.float32)})

    with pytest.raises(RewardError, match=f"{name}: returned .*; prompt 'q', completion 'bad', row 7 of split 'eval'"):
        reward_functions.make_finite(reward_fn, _Texts(), "eval")(_rollout())
