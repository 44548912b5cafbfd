"""Tokens that end a completion, for chat templates of several families."""

import dataclasses

import pytest

from tests.data.test_chat import CHATML, FAMILIES, GEMMA_2, LLAMA_3, QWEN_2, make_folder
from warp_jax.data import stop_tokens

PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
LLAMA_TOKENS = ("<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
KINDS = {  # template, bos, eos, other special tokens; the token that ends a turn
    "gemma": (GEMMA_2, "<bos>", "<eos>", ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>"),
    "chatml": (QWEN_2, None, "<|endoftext|>", CHATML, "<|im_end|>"),
    "llama-3": (LLAMA_3, "<|begin_of_text|>", "<|end_of_text|>", LLAMA_TOKENS, "<|eot_id|>"),
    "mistral": (*FAMILIES["mistral"], "</s>"),
    "no special token": (PLAIN, None, "</s>", ("<user>",), None),
    "no answers": ("{% if messages | length > 1 %}{{ raise_exception('one') }}{% endif %}", None, "</s>", (), None),
    "twice": ("Hello{{ messages[-1].content }}<v>{{ messages[-1].content }}<u>", None, "<e>", ("<u>", "<v>"), "<u>"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_end_of_a_turn_ends_a_completion(tmp_path, kind):
    """Fails when only the end of the whole text ends a completion, so that answers run into invented turns; when the
    token before the answer is taken; a template without such a token gets one; or one that renders no answer is said
    to end a turn without.
    """
    *family, end = KINDS[kind]
    tokenizer = make_folder(tmp_path, *family)
    eos_id = tokenizer.backend.token_to_id(family[2])
    end_id = [tokenizer.backend.token_to_id(end)] if end else []
    chat = stop_tokens.extend(tokenizer, (), use_chat=True)
    assert chat.stop_ids == tuple(dict.fromkeys([eos_id, *end_id]))
    assert chat.eos_id == eos_id
    assert stop_tokens.extend(tokenizer, (), use_chat=False).stop_ids == (eos_id,)
    line = stop_tokens.describe(chat, use_chat=True)
    assert line.startswith(f"completions end at {family[2]}")
    assert line.endswith(f"ends a turn with {end}" if end else "or refuses to render one, see sampling.stop_tokens")


def test_further_tokens_by_name_or_text(tmp_path):
    """Fails when a special token, a name in the vocabulary or a text of one token is refused, or replaces others."""
    tokenizer = make_folder(tmp_path, *FAMILIES["gemma_2"])
    ids = stop_tokens.extend(tokenizer, ("<start_of_turn>", "\n", "film", "<eos>"), use_chat=True).stop_ids
    names = [tokenizer.backend.id_to_token(i) for i in ids]
    assert names == ["<eos>", "<end_of_turn>", "<start_of_turn>", "Ċ", "film"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<end_of_turns>", "did you mean '<end_of_turn>'"),
        ("two films", "is not a single token of the model; did you mean"),
    ],
)
def test_unknown_tokens_are_refused_with_the_nearest(tmp_path, text, message):
    """Fails when a text of several tokens stops at its first, or a typo stops nowhere."""
    tokenizer = make_folder(tmp_path, *FAMILIES["gemma_2"])
    with pytest.raises(ValueError, match=rf"config\.sampling\.stop_tokens: '{text}' .*{message}") as error:
        stop_tokens.extend(tokenizer, (text,), use_chat=False)
    assert "\n" not in str(error.value)


def test_a_token_without_embedding_is_refused(tmp_path):
    """Fails when a token that the model cannot write counts."""
    tokenizer = make_folder(tmp_path, *FAMILIES["gemma_2"])
    small = dataclasses.replace(tokenizer, embedding_size=tokenizer.backend.token_to_id("<start_of_turn>"))
    with pytest.raises(ValueError, match="is not a single token"):
        stop_tokens.extend(small, ("<start_of_turn>",), use_chat=False)
