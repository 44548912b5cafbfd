"""Tokens that end a completion: those of the model's files, the end of a turn in its chat template, and others."""

import dataclasses
import difflib
from collections.abc import Sequence

from warp_jax.data import chat
from warp_jax.data.tokenizer import Tokenizer

ANSWER = "warp_jax answers"  # found again in a rendered conversation


def extend(tokenizer: Tokenizer, texts: Sequence[str], *, use_chat: bool) -> Tokenizer:
    """Return the tokenizer with more stop tokens: `turn_end` with use_chat, and the tokens named in `texts`.

    Raises ValueError if a text is not a single token.
    """
    end = turn_end(tokenizer) if use_chat else None
    added = [*([] if end is None else [end]), *(_token_id(tokenizer, text) for text in texts)]
    return dataclasses.replace(tokenizer, stop_ids=tuple(dict.fromkeys([*tokenizer.stop_ids, *added])))


def turn_end(tokenizer: Tokenizer) -> int | None:
    """Id of the first special token that the chat template writes after an assistant's answer.

    None if it writes none, or cannot render an answer. Some models' files name only the end-of-text token as the end:
    sampling would then go on to an invented turn of the user.
    """
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": ANSWER}]
    try:
        _, found, after = chat.render(tokenizer, messages, add_generation_prompt=False).rpartition(ANSWER)
        (ids,) = tokenizer.encode_with_special([after if found else ""])
    except ValueError:
        return None
    special = {i for i, token in tokenizer.backend.get_added_tokens_decoder().items() if token.special}
    return next((i for i in ids.tolist() if i in special), None)


def describe(tokenizer: Tokenizer, *, use_chat: bool) -> str:
    """Say in one line where completions end."""
    line = f"completions end at {', '.join(str(tokenizer.backend.id_to_token(i)) for i in tokenizer.stop_ids)}"
    if not use_chat:
        return line
    if (end := turn_end(tokenizer)) is None:
        reason = "writes no special token after an answer, or refuses to render one"
        return f"{line}; the chat template {reason}, see sampling.stop_tokens"
    return f"{line}; the chat template ends a turn with {tokenizer.backend.id_to_token(end)}"


def _token_id(tokenizer: Tokenizer, text: str) -> int:
    """Id of a token by its name in the vocabulary, or of a text that is encoded as one token."""
    found = tokenizer.backend.token_to_id(text)
    (ids,) = tokenizer.encode([text])
    if found is None and len(ids) == 1 and tokenizer.backend.decode(ids.tolist(), skip_special_tokens=False) == text:
        found = int(ids[0])
    if found is None or found >= (tokenizer.embedding_size or tokenizer.vocab_size):
        names = [token.content for token in tokenizer.backend.get_added_tokens_decoder().values()]
        close = difflib.get_close_matches(text, names, n=3, cutoff=0.5) or names[:5]
        raise ValueError(
            f"config.sampling.stop_tokens: {text!r} is not a single token of the model; "
            f"did you mean {', '.join(map(repr, close))}?"
        )
    return found
