r"""Reward for answers to math problems in the format of GSM8K or MATH, compared by the package math-verify.

Answers are evaluated, as usual in math-verify: 0.5 is 1/2, (x+1)^2 is x^2+2x+1, and an unfinished 9 + 9 is 18.
Added here: signs of currency, percent and degrees are dropped (5% is 5, not 0.05); a unit counts only if both answers
have one (18 km is 18, but not 18 miles); words are compared as text, ignoring case.

math-verify runs in a child process with limits on CPU time and memory: an answer that exceeds them is wrong.
"""

import atexit
import contextlib
import functools
import importlib.util
import json
import logging
import math
import numbers
import re
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

if importlib.util.find_spec("math_verify") is None:
    raise ImportError("math-verify is missing; run: pip install 'warp_jax[math]'")

LONGEST = 300  # characters; longer answers are compared as plain text
CPU_SECONDS = 3.0  # for one comparison
MEMORY = 2**32  # bytes
_IN_BRACES = r"(?:\\.|[^{}\\])*+"
for _ in range(8):  # levels of braces
    _IN_BRACES = rf"(?:\\.|[^{{}}\\]|\{{{_IN_BRACES}\}})*+"
_BOXED = re.compile(rf"\\f?box(?:ed)?\s*\{{({_IN_BRACES})\}}|\\boxed\s+([^\s${{}}]+)", re.DOTALL)
_HASHED = re.compile(r"####((?:(?!####)[^\n])*?)[\s!.]*(?=\n|####|\Z)")
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_ANSWER_IS = r"answer\s*(?:is\b|:)"
_PHRASED = re.compile(
    rf"{_ANSWER_IS}[\s:*]*((?:(?!{_ANSWER_IS}).)*?)"
    r"(?:[.!?]?\**(?=\s*\n|\s*\Z)|[.!?]\**(?=\s)|,?\s(?=(?:because|since|as|so|which|where)\b))",
    re.IGNORECASE,
)
_LAST = re.compile(  # formulas in TeX's delimiters, 1 000, 2 1/2, any other word with a digit
    r"((?<![\w$])\$(?:\\[a-zA-Z]+|[^$\n\\a-zA-Z]|[a-zA-Z](?![a-zA-Z]))+\$(?!\w)|\\\(.+?\\\)|\\\[.+?\\\]|"
    r"(?<![\w.,])-?\d+ \d+/\d+|(?<![\w.,])-?\d{1,3}(?: \d{3})+(?![.,]?\w)|"
    r"[^\s=(*\"']{0,300}\d(?:[^\s=)*]{0,300}[\w}\]%])?)"
)
_UNITS = r"(?:am|cm|ft|hr|in|kg|km|lb|mg|mi|ml|mm|oz|pm|[a-z]+/(?:s|h|hr|min|[a-z]{3,}))"
_UNIT = re.compile(
    rf"(.*[\d)}}\]]|\\pi)\s*(?:\\text\{{\s*([a-z][a-z ./]*)\}}|({_UNITS}|\s[a-z]{{3,}}(?: (?:{_UNITS}|[a-z]{{3,}}))*))"
    r"(?:\^\{?[23]\}?)?",
    re.IGNORECASE,
)
_NO_UNIT = re.compile(  # words that change the number before them
    r"\b(?:and|or|not|plus|minus|times|base|sin|cos|tan|log|squared|cubed|half|halves|quarters?|thirds?|fifths?|"
    r"sixths?|sevenths?|eighths?|ninths?|tenths?|\w+(?:teen|ie|dred|sand)ths?|dozens?|\w*(?:hundred|thousand|illion)s?)\b"
)
_WORD = re.compile(
    r"(?<![\\a-zA-Z])(?<!\\begin\{)(?<!\\end\{)(?!(?:sin|cos|tan|cot|sec|csc|log|exp|sqrt|infty)\b)[a-zA-Z]{3,}"
)
_REWRITES: list[tuple[str, Any]] = [  # patterns that ignore case, and replacements
    ("[\u2212\u2013\u2014]", "-"),
    (r"(?<!\w)\*\*(.+?)\*\*(?!\w)", r"\1"),  # bold
    (r"(?<!\\)\\[()\[\]]|\\?[$%]|[€£°]|\^\s*(?:\\circ(?![a-z])|\{\s*\\circ\s*\})", ""),
    (r"(?<!\\)\\[,;: ]|~", " "),
    (r"\\(?:mbox|mathrm|mathbf|text(?:rm|bf|it))\s*(?=\{)", r"\\text"),
    (r"\}\s*/\s*\\text\{", "/"),
    (r"^\W*(?:(?:the|final|answer|is|about|approximately|roughly|exactly)\b[\s:]*)+", ""),
    (r"(?<![\w.,])\d{1,3}(?: \d{3})+(?![.,]?\w)", lambda match: match[0].replace(" ", "")),
    (r"(?<![\w.])(\d+) (\d+)/(\d+)", r"\1\\frac{\2}{\3}"),
    (r"(\d)e([+-]?\d{1,3})(?!\w)", r"\1\\cdot 10^{\2}"),
]
_LOCK = threading.Lock()


def extract(text: str) -> str | None:
    r"""Find the answer that a text gives, or None.

    The first of these that occurs counts: the last whole \boxed{...}; the line after the last '####'; the last
    <answer>...</answer>; the phrase after the last 'answer is' or 'answer:'; the last formula or word with a digit.
    """
    return _find(text, _BOXED, _HASHED, _TAGGED, _PHRASED, _LAST) or None


@functools.lru_cache(maxsize=2**14)
def equal(gold: str, answer: str) -> bool:
    """Return True if two answers are the same by the rules of this module; an empty answer equals nothing."""
    if max(len(gold), len(answer)) > LONGEST:
        return gold == answer
    (gold, gold_unit), (answer, unit) = _simplify(gold), _simplify(answer)
    if not gold or not answer or (gold_unit and unit and gold_unit != unit):
        return False
    if gold == answer or _WORD.search(gold) or _WORD.search(answer):
        return "".join(gold.split()).lower() == "".join(answer.split()).lower()
    return _verify(gold, answer)


def gold(row: Mapping[str, Any]) -> str:
    r"""Return the right answer of a row: its field 'answer', or its field 'solution' if 'answer' is missing or None.

    Only the part in \boxed{} or after '####' counts; an 'answer' without either is used whole. Raises ValueError.
    """
    name = "answer" if row.get("answer") is not None else "solution"
    value = row.get(name)
    is_plain = isinstance(value, str | int) and not isinstance(value, bool)
    is_fraction = isinstance(value, numbers.Real) and not isinstance(value, int) and math.isfinite(value)
    text = str(value) if is_plain or is_fraction else ""
    found = _find(text, _BOXED, _HASHED)
    if found is None and name == "answer":
        found = text.strip()
    if not found:
        raise ValueError(
            f"got {name} {value!r} in row {str(dict(row))[:200]}, want the right answer "
            r"as text or number in the field 'answer', or after #### or in \boxed{} in 'answer' or 'solution'"
        )
    return found


def check_row(row: Mapping[str, Any]) -> None:
    """Raise ValueError if a row has no right answer, or one that no answer can equal, such as '$'."""
    if len(text := gold(row)) <= LONGEST and not _simplify(text)[0]:
        raise ValueError(f"the right answer is {text!r}, which no answer can equal")


def score(prompts: Sequence[str], completions: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Text reward: 1 if the answer that a completion gives equals the right answer of its row, else 0."""
    return [float(equal(gold(row), extract(text) or "")) for row, text in zip(rows, completions, strict=True)]


def _find(text: str, *patterns: re.Pattern[str]) -> str | None:
    """The last match of the first pattern that occurs."""
    for pattern in patterns:
        if found := [match[match.lastindex or 0] for match in pattern.finditer(text)]:
            return found[-1].strip(" *\n")
    return None


def _simplify(text: str) -> tuple[str, str]:
    """Rewrite an answer for math-verify, and split it from its unit ('' if it has none)."""
    for pattern, replacement in _REWRITES:
        text = re.sub(pattern, replacement, text, flags=re.IGNORECASE)
    text = text.strip().rstrip(".,;:")
    match = _UNIT.fullmatch(text)
    unit = (match[2] or match[3]).lower().strip() if match else ""
    if match is None or _NO_UNIT.search(unit):
        return re.sub(r"\\text\{([^{}]*)\}", r"\1", text).strip(), ""
    return match[1].strip(), " ".join(unit.split()).removesuffix("s")


def _verify(gold: str, answer: str) -> bool:
    with _LOCK:
        child = _child()
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps([gold, answer]), file=child.stdin, flush=True)
        line = child.stdout.readline()
        if not line:
            _child.cache_clear()
            child.communicate()
            if child.returncode >= 0:  # negative: ended by a signal, such as that of the timer
                raise ValueError(f"math-verify ended with exit code {child.returncode}")
    return line == "true\n"


@functools.cache
def _child() -> Any:
    command = [sys.executable, "-P", __file__]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
    atexit.register(child.__exit__, None, None, None)  # closes its input, which ends it
    return child


def _serve() -> None:
    """Answer pairs (gold, answer), one JSON line each, with true or false."""
    from math_verify import LatexExtractionConfig, parse, verify  # noqa: PLC0415

    logging.disable()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    config = [LatexExtractionConfig()]
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # after this time, SIGPROF ends this process
        right, answer = (parse(f"${text}$", config, parsing_timeout=None) for text in json.loads(line))
        same = verify(right, answer, timeout_seconds=None)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(bool(same)), flush=True)


if __name__ == "__main__":
    _serve()
