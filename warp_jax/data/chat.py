"""Chat prompts: conversations rendered by the chat template of the model, in a sandbox.

A template is a program that comes with the weights. The sandbox gives it plain texts only, no Python objects and no
files. It stops a template after RENDER_SECONDS, or when a multiplication would make a text or list of more than
MOST_ITEMS. Memory has no other limit: if you do not trust a model, read its template.
"""

import functools
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import nodes
from jinja2.environment import Template
from jinja2.exceptions import SecurityError, TemplateError, TemplateRuntimeError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from warp_jax.data.tokenizer import Tokenizer

TODAY = datetime(2024, 7, 26)  # the date for all templates: a resumed job must see the same prompts
RENDER_SECONDS = 10.0  # CPU time for one conversation
MOST_ITEMS = 10**7
ROLES = ("system", "developer", "user", "assistant", "tool")
ALIASES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"}  # only after "from"


def prompt_text(tokenizer: Tokenizer, value: object, **variables: Any) -> str:
    """Render a conversation up to the start of the model's answer, for `Tokenizer.encode_with_special`.

    Do not add a BOS token: the template writes it if the model needs one. value: see `as_messages`; variables: see
    `render`. Raises ValueError if the conversation ends with an assistant's answer.
    """
    messages = as_messages(value)
    if messages[-1]["role"] == "assistant":
        raise ValueError("conversation: ends with the assistant's turn, want the user's; leave out the last message")
    return render(tokenizer, messages, **variables)


def response_text(tokenizer: Tokenizer, value: object, response: str) -> str:
    """Render what follows `prompt_text(tokenizer, value)` when the assistant has answered: its turn, with its end.

    Raises ValueError as `prompt_text` does, or if the template writes the prompt in another way once it is answered.
    """
    prompt, answer = prompt_text(tokenizer, value), {"role": "assistant", "content": response}
    whole = render(tokenizer, [*as_messages(value), answer], add_generation_prompt=False)
    if not whole.startswith(prompt):
        raise ValueError("chat template: changes the prompt when an answer follows it; SFT needs one that does not")
    return whole.removeprefix(prompt)


def render(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], **variables: Any) -> str:
    """Render a conversation exactly as transformers' apply_chat_template does. Templates get TODAY as the date.

    variables: what the template reads, as JSON values: tools, enable_thinking, date_string; add_generation_prompt, by
    default True: end with the header of the assistant's turn. Raises ValueError if the model has no template, or it is
    broken, rejects the conversation or does what the sandbox forbids.
    """
    if tokenizer.chat_template is None:
        raise ValueError("tokenizer: has no chat template; use a chat model, or prompts that are plain texts")
    _limit.end = time.thread_time() + RENDER_SECONDS
    given = {"tools": None, "documents": None, "add_generation_prompt": True, **tokenizer.special_tokens, **variables}
    try:
        return _compile(tokenizer.chat_template).render(messages=[dict(message) for message in messages], **given)
    except Exception as error:  # a template is a program, and may fail in any way
        kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
        raise ValueError(f"chat template: {kind}{' '.join(str(error).split())}") from error


def as_messages(value: object) -> list[dict[str, str]]:
    """Convert a conversation to messages {"role", "content"}.

    value: a text (one user message), or a list of {"role", "content"} or {"from", "value"} mappings. Keys whose value
    is None are ignored. Raises ValueError for anything else.
    """
    if isinstance(value, str):
        return [{"role": "user", "content": str(value)}]
    if not isinstance(value, Sequence) or isinstance(value, bytes | bytearray):
        raise ValueError(f"conversation: got a {type(value).__name__}, want a text or a list of role and content")
    if not value:
        raise ValueError("conversation: got no message, want at least one")
    return [_message(item, number) for number, item in enumerate(value)]


def _message(item: object, number: int) -> dict[str, str]:
    if not isinstance(item, Mapping):
        raise ValueError(f"conversation: message {number} is a {type(item).__name__}, want {{role, content}}")
    given = {key: value for key, value in item.items() if value is not None}
    names, aliases = (("from", "value"), ALIASES) if "from" in given else (("role", "content"), {})
    if given.keys() != set(names):
        raise ValueError(
            f"conversation: message {number} has {sorted(map(str, given))}, want role and content, or from and value"
        )
    speaker, content = (given[name] for name in names)
    speakers = (*ROLES, *aliases)
    if not isinstance(speaker, str) or speaker not in speakers:
        raise ValueError(f"conversation: message {number} is from {speaker!r}, want one of {', '.join(speakers)}")
    if not isinstance(content, str):
        raise ValueError(f"conversation: message {number} has a {type(content).__name__} as content, want a text")
    return {"role": aliases.get(speaker, speaker), "content": str(content)}


_limit = threading.local()  # .end: CPU time of this thread at which rendering stops


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with limits; access to a forbidden attribute raises instead of returning an undefined value."""

    intercepted_binops = frozenset({"**", "*"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        for items, count in ((left, right), (right, left)):
            if isinstance(items, Sized) and isinstance(count, int) and len(items) * count > MOST_ITEMS:
                raise SecurityError(f"a {type(items).__name__} of more than {MOST_ITEMS} items is refused")
        if operator == "**":
            raise SecurityError("the operator ** is refused: it may never end")
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        _check_time()
        return super().call(context, function, *args, **kwargs)

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        raise SecurityError(f"access to {attribute!r} of a {type(obj).__name__} is refused")


class _GenerationBlock(Extension):
    """The tag {% generation %}, which marks the assistant's text for training. Here it only renders the text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Namespace(Namespace):
    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a namespace cannot hold {name!r}: it begins with an underscore")
        super().__setitem__(name, value)


class _Dict:
    """The name `dict` in templates: it can be called and has fromkeys, but gives no access to the class."""

    fromkeys = staticmethod(dict.fromkeys)

    def __call__(self, *args: Any, **items: Any) -> dict[Any, Any]:
        return dict(*args, **items)


@functools.lru_cache(maxsize=8)
def _compile(source: str) -> Template:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols])
    del environment.globals["lipsum"]  # a loop inside jinja2
    limited = {name: _limited(function) for name, function in environment.filters.items()}
    environment.filters |= limited | {"tojson": _to_json, "stopping": _stopping}
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "namespace": _make_namespace,
        "dict": _Dict(),
    }
    tree = environment.parse(source)
    for loop in tree.find_all(nodes.For):
        loop.iter = nodes.Filter(loop.iter, "stopping", [], [], None, None, lineno=loop.lineno)
    return environment.from_string(tree)


def _stopping(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        _check_time()
        yield item


def _limited(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same filter, called only if there is time; it may not loop or fill up to a number above MOST_ITEMS."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        _check_time()
        for count in (*args[1:], *kwargs.values()):
            if isinstance(count, int) and count > MOST_ITEMS:
                raise SecurityError(f"a filter with a number above {MOST_ITEMS} is refused")
        return function(*args, **kwargs)

    return call


def _check_time() -> None:
    """Raise if the template has computed for too long. Called in each round of a loop, at each call and filter."""
    if time.thread_time() > _limit.end:
        raise TemplateRuntimeError(f"it computed for more than {RENDER_SECONDS:g} seconds; simplify it")


def _make_namespace(*args: Any, **items: Any) -> _Namespace:
    space = _Namespace()
    for name, value in dict(*args, **items).items():
        space[name] = value
    return space


def _strftime_now(pattern: str) -> str:
    return TODAY.strftime(pattern)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateRuntimeError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Jinja's own filter escapes HTML
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
