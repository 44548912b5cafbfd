"""Prompts that a workdir's policies answer."""

import json

import pytest

from warp_jax.benchmarks import answers
from warp_jax.data.tokenizer import Tokenizer

USER = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "got fields ['text'], want the field 'prompt'"),
        ({"prompt": 3}, "field 'prompt' holds 3, want a text; set --field"),
        ({"prompt": " "}, "field 'prompt' is empty, want a text; remove the row, or set --field"),
        ({"prompt": [USER, {"role": "user"}]}, "field 'prompt': conversation: message 1 has ['role'], want role"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_prompt_is_named_by_its_line(tmp_path, row, message):
    """Fails when a number or a blank text is a prompt, or a conversation is refused without its line."""
    path = tmp_path / "prompts.jsonl"
    good = [{"prompt": "a"}, {"prompt": [USER]}]
    path.write_text("".join(json.dumps(value) + "\n" for value in good))
    assert answers.read_prompts(path, "prompt") == ["a", [USER]]
    path.write_text("".join(json.dumps(value) + "\n" for value in [*good, row]))
    with pytest.raises(ValueError, match=r"prompts\.jsonl line 3: ") as error:
        answers.read_prompts(path, "prompt")
    assert str(error.value).partition(" line 3: ")[2].startswith(message)


def test_a_conversation_needs_the_chat_template():
    """Fails when a conversation is encoded as the text of a list, or the prompt is not named."""
    with pytest.raises(ValueError, match=r"^prompt 1: got a conversation, want a text; set --chat"):
        answers.encode(Tokenizer.train(["hi"], 259), ["a", [USER]], use_chat=False)
