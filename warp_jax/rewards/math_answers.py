r"""Are two mathematical answers the same? As in GSM8K (Cobbe et al. 2021) and MATH (Hendrycks et al. 2021).

Numbers are compared exactly, as fractions: 0.5 is 1/2, 18.00 is 18, 0.333 is not 1/3. Nothing is evaluated: 9 + 9 is
not 18. Signs of currency, percent and degrees are dropped, as gold answers drop them: 5% is 5, and so never 0.05.
A unit (\text{m}, or a word after a space) counts only where both sides have one: 18 km is 18, but not 18 miles. Lists,
tuples, intervals and sets are equal with equal brackets and equal parts in order; `x =` in front is dropped. All else
is compared as text without spaces.

A text is judged by one answer, the last that it marks; so a text that tries many numbers is right only if that one is.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

_LONGEST = 300  # characters of an answer that is looked into
_BOX = re.compile(r"\\[{}]|\\f?box(?:ed)?\s*\{|\\boxed\s+(?P<bare>[^\s${}]+)|[{}]")
_PHRASE = re.compile(r"answer\s*(?:is\b|:)[\s:]*", re.IGNORECASE)
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
_DECIMAL = rf"(?:(?:{_DIGITS}(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][+-]?[0-9]{{1,3}}(?![0-9a-zA-Z]))?)"
_IN_PROSE = re.compile(  # the minus of 5-3 is no sign
    rf"(?:(?<![\w)}}\]])-)?\$?(?:(?:{_DIGITS}\s?)?\\[dt]?frac\{{-?[0-9]+\}}\{{[0-9]+\}}|"
    rf"(?:{_DIGITS} )?[0-9]+/[0-9]+|{_DECIMAL})%?"
)
_QUANTITY = re.compile(
    rf"(?P<sign>[+-]?)\s*(?:(?P<whole>{_DIGITS})\s+(?=[0-9]+/[0-9]))?(?P<top>-?{_DECIMAL})\.?"
    rf"(?:\s*/\s*(?P<bottom>-?{_DECIMAL}))?(?P<unit>.*)"
)
_WORD = r"(?:[a-zA-Z]{3,}|am|cm|ft|hr|in|kg|km|lb|mg|mi|ml|mm|oz|pm)"
_UNIT = re.compile(rf"\s*(?:\\text\{{\s*(?P<text>[a-zA-Z ]+)\}}|(?<=\s)(?P<words>{_WORD}(?: {_WORD})*))(?:\^[23])?\s*")
_NO_UNIT = re.compile(  # words that make another number of it
    r"\b(?:and|or|not|plus|minus|base|sin|cos|tan|log|squared|cubed|half|halves|quarters?|thirds?|fifths?|sixths?|"
    r"sevenths?|eighths?|ninths?|tenths?|\w+(?:teen|ie|dred|sand)ths?|dozens?|\w*(?:hundred|thousand|illion)s?)\b"
)
_ARGUMENT = r"\s*(?:\{([^{}]*)\}|([0-9a-zA-Z]))"
_FRACTION = re.compile(rf"\\[dt]?frac(?![a-zA-Z]){_ARGUMENT}{_ARGUMENT}")
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        ("\N{MINUS SIGN}", "-"),
        (r"\{,\}|,\\!", ","),  # thousands
        (r"\\(?:left|right|displaystyle)(?![a-zA-Z])|\\[!,;:]", ""),
        (r"\\(?:quad|qquad)(?![a-zA-Z])|\\ |~", " "),
        (r"\\?[$%]|[€£°]|\^\s*(?:\\circ(?![a-zA-Z])|\{\s*\\circ\s*\})", ""),
        (r"\\(?:mbox|mathrm|mathbf|text(?:rm|bf|it))\s*(?=\{)", r"\\text"),
        (r"^\s*[a-zA-Z]\s*(?:=|\\in(?![a-zA-Z]))", ""),  # x = 5
    ]
]


class Number(NamedTuple):
    """A value and what it counts; '' without a unit."""

    value: Fraction
    unit: str


class Parts(NamedTuple):
    """The parts of a list, with its brackets; '' without."""

    brackets: str
    items: "tuple[Number | Parts | str, ...]"


def extract(text: str) -> str | None:
    r"""The answer a text gives: its last whole \boxed{...}, else the rest of the line after its last '####', else the
    rest of the sentence after its last 'the answer is' (or 'answer:'), else its last number. None if there is none, or
    nothing after the mark.
    """
    for find in (_boxed, _hashed, _phrased, _last_number):
        found = find(text)
        if found is not None:
            return found.strip() or None
    return None


def equal(a: str, b: str) -> bool:
    """Whether two answers are the same, by the rules of this module; an empty one equals nothing."""
    return _same(_parse(a), _parse(b))


def gold(row: Mapping[str, Any]) -> str:
    r"""The right answer of a row: of its field 'answer', or if it has none of 'solution', what \boxed{} holds or what
    follows '####'. An 'answer' without these marks is the answer itself.
    """
    name = "answer" if row.get("answer") is not None else "solution"
    text = str(row.get(name, ""))
    marked = _boxed(text) if _boxed(text) is not None else _hashed(text)
    found = text if marked is None and name == "answer" else marked
    if not found or not found.strip():
        raise ValueError(
            f"warp_jax.math_answers: a row with fields {sorted(row)} has no gold answer, "
            r"want it in the field 'answer', or marked by \boxed{} or #### in 'answer' or 'solution'"
        )
    return found.strip()


def score(prompts: Sequence[str], completions: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Text reward: 1 where the answer that a completion gives equals the gold answer of its row, else 0."""
    del prompts
    found = [extract(text) for text in completions]
    return [float(answer is not None and equal(answer, gold(row))) for answer, row in zip(found, rows, strict=True)]


def _boxed(text: str) -> str | None:
    boxes, opened = [], []
    for token in _BOX.finditer(text):
        if token["bare"]:
            boxes.append((token.start(), token["bare"]))
        elif token[0].endswith("{") and token[0] != r"\{":
            opened.append((token.start(), token.end(), token[0] != "{"))
        elif token[0] == "}" and opened:
            start, end, is_box = opened.pop()
            boxes += [(start, text[end : token.start()])] if is_box else []
    return max(boxes)[1] if boxes else None


def _hashed(text: str) -> str | None:
    _, mark, rest = text.rpartition("####")
    return rest.partition("\n")[0] if mark else None


def _phrased(text: str) -> str | None:
    _, *rests = _PHRASE.split(text)
    return re.split(r"\.(?:\s|$)|\n", rests[-1].strip(" *"))[0].strip(" *") if rests else None


def _last_number(text: str) -> str | None:
    numbers = _IN_PROSE.findall(text.replace("\N{MINUS SIGN}", "-"))
    return numbers[-1] if numbers else None


def _same(a: Number | Parts | str, b: Number | Parts | str) -> bool:
    if isinstance(a, Number) and isinstance(b, Number):
        return a.value == b.value and (a.unit == b.unit or not a.unit or not b.unit)
    if isinstance(a, Parts) and isinstance(b, Parts):
        same_form = a.brackets == b.brackets and len(a.items) == len(b.items)
        return same_form and all(map(_same, a.items, b.items))
    return a == b != ""


def _parse(text: str) -> Number | Parts | str:
    if len(text) > _LONGEST:
        return text
    text = _simplify(text)
    number = _number(text)
    if number is not None:
        return number
    brackets, inside = _open(text)
    items = _split(inside)
    if brackets == "()" and len(items) == 1:
        return _parse(inside)
    return Parts(brackets, tuple(map(_parse, items))) if brackets or len(items) > 1 else _plain(text)


def _simplify(text: str) -> str:
    r"""Without what LaTeX adds for the eye; fractions as a/b with spaces around, so that 2\frac{1}{2} stays mixed."""
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    count = 1
    while count:
        text, count = _FRACTION.subn(_slash, text)
    text = re.sub(r"(?<!\\text)\{([0-9a-zA-Z])\}", r"\1", text).strip().rstrip(".,;:")
    return re.sub(r"^\\text\{([^{}]*)\}$", r"\1", text).strip()


def _slash(match: re.Match[str]) -> str:
    parts = [match[1] or match[2] or "", match[3] or match[4] or ""]
    simple = re.compile(r"\s*[+-]?(?:[0-9.]+|[a-zA-Z])\s*")
    return " {}/{} ".format(*(part.strip() if simple.fullmatch(part) else f"({part})" for part in parts))


def _number(text: str) -> Number | None:
    match = _QUANTITY.fullmatch(text)
    unit = _unit(match["unit"]) if match else None
    if match is None or unit is None:
        return None
    whole, top, bottom = (
        Fraction((match[name] or default).replace(",", ""))
        for name, default in (("whole", "0"), ("top", ""), ("bottom", "1"))
    )
    if bottom == 0:
        return None
    return Number((whole + top / bottom) * (-1 if match["sign"] == "-" else 1), unit)


def _unit(rest: str) -> str | None:
    """The unit that follows a number, '' for none; None if something else follows."""
    match = _UNIT.fullmatch(rest)
    if match is None:
        return None if rest.strip() else ""
    words = (match["text"] or match["words"]).lower()
    return None if _NO_UNIT.search(words) else " ".join(words.split()).removesuffix("s")


def _open(text: str) -> tuple[str, str]:
    """The brackets around a text and what they hold; '' and the text if none hold all of it."""
    match = re.fullmatch(r"(\\\{|[(\[])(.*)(\\\}|[)\]])", text, re.DOTALL)
    if match is None or min(_depths(match[2]), default=0) < 0:
        return "", text
    return match[1][-1] + match[3][-1], match[2]


def _split(text: str) -> list[str]:
    """Cut at the commas outside all brackets."""
    commas = [i for i, depth in enumerate(_depths(text)) if depth == 0 and text[i] == ","]
    return [text[i + 1 : j] for i, j in zip([-1, *commas], [*commas, len(text)], strict=True)]


def _depths(text: str) -> list[int]:
    return list(itertools.accumulate((character in "([{") - (character in ")]}") for character in text))


def _plain(text: str) -> str:
    r"""Without \text{} and spaces, words of three letters or more in lower case."""
    text = re.sub(r"\\text\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"(?<![\\a-zA-Z])[a-zA-Z]{3,}", lambda match: match[0].lower(), text)
    return re.sub(r"(?<![0-9])\s+|\s+(?![0-9])", "", text)
