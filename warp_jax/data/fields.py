"""Checks of the fields of a row, and its prompt. Only finite numbers in a template are converted to text."""

import contextlib
import decimal
import math
import numbers
import string
from collections.abc import Iterator, Mapping
from typing import Any

from warp_jax.data import chat

LABELS: dict[Any, int] = {0: 0, 1: 1, "0": 0, "1": 1}  # True, False, 1.0 and 0.0 are equal to 1 and 0


@contextlib.contextmanager
def at(place: str) -> Iterator[None]:
    """Put the place of a row before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def plain_text(value: Any) -> str:
    """The text of a value without HTML's line breaks, and without blanks at its ends."""
    return str(value).replace("<br />", "\n").strip()


def check_text(row: Mapping[str, Any], name: str, types: Any, setting: str = "data.text_field") -> None:
    """Raise ValueError unless a field has one of `types` and is a text that is not blank, a conversation or a number.

    types: str, list or numbers.Real, or a union of them. setting: where the user chose the field, for the error.
    """
    value = row[name]
    if isinstance(value, list) and isinstance(value, types):
        with at(f"field {name!r}"):
            chat.as_messages(value)
    elif isinstance(value, list):
        raise ValueError(
            f"field {name!r} holds a list, want a text; conversations need data.chat = True, and nothing that learns "
            "from whole texts: SFT without data.response_field, reward_model without data.chosen_field, or tfidf"
        )
    elif not (isinstance(value, types) and _is_plain(value)):
        raise ValueError(f"field {name!r} holds {_shown(value)}, want a text; set {setting}")
    elif isinstance(value, str) and not plain_text(value):
        raise ValueError(f"field {name!r} is empty, want a text; remove the row, or set {setting}")


def label_of(row: Mapping[str, Any], name: str) -> int:
    """The label of a row, 0 or 1. Raises ValueError for anything but 0, 1, 0.0, 1.0, false, true, '0' and '1'."""
    try:
        return LABELS[row[name]]
    except (KeyError, TypeError):
        raise ValueError(f"field {name!r} holds {_shown(row[name])}, want 0 or 1; set data.label_field") from None


def asked(row: Mapping[str, Any], text_field: str, prompt_template: str) -> Any:
    """Return the prompt of a row: its text field, a text or a conversation, or the template filled with its fields.

    Raises ValueError if the template does not fit the row, or one of its fields is not a text or a finite number.
    """
    if not prompt_template:
        return row[text_field]
    parse, get_field = string.Formatter().parse, string.Formatter().get_field
    try:
        names = [name for _, name, _, _ in parse(prompt_template) if name is not None]
        values = {name: get_field(name, (), row)[0] for name in names}
        prompt = prompt_template.format(**row)
    except (LookupError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(
            f"config.data.prompt_template: got {prompt_template!r}, want names of fields in braces, of "
            f"{', '.join(sorted(row))}: {type(error).__name__} {error}"
        ) from error
    for name, value in values.items():
        if not _is_plain(value):
            raise ValueError(f"field {name!r} of data.prompt_template holds {_shown(value)}, want a text or a number")
    if not prompt.strip():
        raise ValueError(f"fields {sorted(values)} of data.prompt_template give an empty prompt; remove the row")
    return prompt


def response(row: Mapping[str, Any], name: str, prompt: Any, *, use_chat: bool) -> str:
    """Return the response to a prompt in a field: a text or a finite number; with use_chat also a conversation.

    The conversation ends with the response, as the assistant's turn. Before it stands nothing, or the prompt. Raises
    ValueError for anything else, and for a blank response.
    """
    if name not in row:
        raise ValueError(f"has no field {name!r}, but {', '.join(sorted(row))[:200]}; correct its name in config.data")
    value = row[name]
    if use_chat and isinstance(value, list):
        with at(f"field {name!r}"):
            *before, last = chat.as_messages(value)
            if last["role"] != "assistant":
                raise ValueError(f"ends with the turn of {last['role']!r}, want the assistant's")
            if before and before != chat.as_messages(prompt):
                raise ValueError("begins with other messages than the prompt, want the prompt's or none")
        value = last["content"]
    elif not _is_plain(value):
        want = "a text, a number or a conversation" if use_chat else "a text or a number"
        raise ValueError(f"field {name!r} holds {_shown(value)}, want {want}")
    if not str(value).strip():
        raise ValueError(f"field {name!r} is empty, want a response; remove the row")
    return str(value)


def _is_plain(value: Any) -> bool:
    """True for a text or a finite number; true and false are no numbers."""
    if isinstance(value, str | int):
        return not isinstance(value, bool)
    return isinstance(value, numbers.Real | decimal.Decimal) and math.isfinite(value)


def _shown(value: Any) -> str:
    return " ".join(repr(value).split())[:60]
