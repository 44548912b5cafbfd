"""Prompts with responses: their token ids in plain text and in chat templates, and their batches."""

import dataclasses
import functools
import json

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from tests.data.test_chat import CHATML, FAMILIES, FIRST, LATER, QWEN_2, _transformers, make_folder
from tests.data.test_stop_tokens import PLAIN
from warp_jax.data import fields, responses, stop_tokens
from warp_jax.data.corpus import Corpus
from warp_jax.data.tokenizer import Tokenizer

ANSWER = "It is a film. "
ASK = functools.partial(fields.asked, text_field="q", prompt_template="")


def _split(rows, first=0):
    return Corpus([""] * len(rows), [0] * len(rows), rows, [f"row {first + i}" for i in range(len(rows))])


def _encode(tokenizer, rows, names=("a",), *, use_chat=False, length=200, ask=ASK):
    return responses.encode(tokenizer, [_split(rows)], names, ask, use_chat=use_chat, length=length)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_chat_response_is_the_turn_of_the_assistant(tmp_path, family, monkeypatch):
    """Fails when the prompt has other ids than RL gives it, the end of the turn is missing, or what the template writes
    after it is learned too."""
    tokenizer = stop_tokens.extend(make_folder(tmp_path, *FAMILIES[family]), (), use_chat=True)
    found = _encode(tokenizer, [{"q": FIRST, "a": ANSWER}], use_chat=True)
    ids, length = found.token_ids[0][0], found.response_lengths[0][0]
    options = {"tokenize": True, "return_dict": False, "date_string": "26 Jul 2024"}
    theirs = _transformers(tmp_path)
    assert ids[:-length].tolist() == theirs.apply_chat_template(FIRST, add_generation_prompt=True, **options)
    whole = theirs.apply_chat_template([*FIRST, {"role": "assistant", "content": ANSWER}], **options)
    assert ids.tolist() == whole[: len(ids)]
    assert ids[-1] == stop_tokens.turn_end(tokenizer)
    assert not set(ids[-length:-1].tolist()) & set(tokenizer.stop_ids)
    assert tokenizer.backend.decode(whole[len(ids) :], skip_special_tokens=False).strip() == ""


def test_a_template_without_an_end_gets_the_eos_token(tmp_path):
    """Fails when a model of such a template never learns to stop."""
    tokenizer = make_folder(tmp_path, PLAIN, None, "</s>", ("<user>",))
    found = _encode(tokenizer, [{"q": "Good?", "a": "Yes"}], use_chat=True)
    assert found.token_ids[0][0][-1] == tokenizer.eos_id
    assert tokenizer.backend.decode(found.token_ids[0][0].tolist()) == "user: Good?\nassistant: Yes\n"


def test_a_template_that_changes_the_prompt_is_refused(tmp_path):
    """Fails when the response of such a template begins anywhere."""
    source = QWEN_2 + "{{ messages | length }}"
    tokenizer = make_folder(tmp_path, "{{ messages | length }}" + source, None, "<|endoftext|>", CHATML)
    with pytest.raises(ValueError, match=r"^row 0: chat template: changes the prompt when an answer follows it"):
        _encode(tokenizer, [{"q": "Good?", "a": "Yes"}], use_chat=True)


def test_a_plain_response_follows_its_prompt():
    """Fails when prompt and response are encoded together, the start token is missing or comes twice, a number is
    refused, or the end token is missing or that of another text."""
    tokenizer = Tokenizer.train(["xy"] * 9, 260)
    rows = [{"q": "x", "a": "y"}, {"q": "", "a": 4.5}]
    ask = functools.partial(fields.asked, text_field="q", prompt_template="{q}x")
    found = _encode(tokenizer, rows, ask=ask)
    for ids, length, (prompt, response) in zip(
        found.token_ids[0], found.response_lengths[0], [("xx", "y"), ("x", "4.5")], strict=True
    ):
        (prompt_ids,), (response_ids,) = tokenizer.encode_with_bos([prompt]), tokenizer.encode([response])
        assert ids.tolist() == [*prompt_ids, *response_ids, tokenizer.eos_id]
        assert length == len(response_ids) + 1
    (together,) = tokenizer.encode_with_bos(["xxy"])
    assert len(together) < len(found.token_ids[0][0]) - 1  # a merge of both


WORDS = "Q: is it good? A: yes no 5 it is a film"


def _sentencepiece(kind):
    """A tokenizer that puts a mark of a space before a text, as Llama 2 and Mistral do, or before its first word."""
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    strip = decoders.Strip(" ", 1, 0)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    )
    if kind == "normalizer":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", prepend_scheme=kind)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    backend.train_from_iterator([WORDS] * 20, trainer)
    content = json.loads(backend.to_str())
    content["added_tokens"] = content["added_tokens"][:3]  # bytes are not special
    ids = [backend.token_to_id(token) for token in special[:3]]
    backend = tokenizers.Tokenizer.from_str(json.dumps(content))
    return Tokenizer(backend, ids[0], ids[1], ids[2], (ids[2],), {})


TEXTS = [
    ("Q: is it good? A:", "yes"),
    ("Q: is it good? A:", " yes"),
    ("Q:\n", "5"),
    ("A: ", "no"),
    ("Q: ", "\n\u00e9 yes"),
]


@pytest.mark.parametrize("kind", ["always", "first", "normalizer", "byte level"])
def test_prompt_and_response_decode_to_both(kind):
    """Fails when a tokenizer puts a space before a response that stands alone, which RL's completions do not have; or
    an anchor stays."""
    tokenizer = Tokenizer.train([WORDS], 300) if kind == "byte level" else _sentencepiece(kind)
    found = _encode(tokenizer, [{"q": prompt, "a": response} for prompt, response in TEXTS])
    for (prompt, response), ids, length in zip(TEXTS, found.token_ids[0], found.response_lengths[0], strict=True):
        (alone,) = tokenizer.encode_with_bos([prompt])
        assert ids[:-length].tolist() == alone.tolist()
        _, answers = tokenizer.decode_answers(
            *(x[None] for part in (ids[:-length], ids[-length:-1]) for x in (part, np.ones(len(part), bool)))
        )
        assert answers == [response]
        assert ids[-1] == tokenizer.eos_id
    if kind == "byte level":
        assert (
            found.token_ids[0][1][-found.response_lengths[0][1] : -1].tolist() == tokenizer.encode([" yes"])[0].tolist()
        )


def test_a_chat_response_has_no_space_that_the_template_lacks():
    """Fails when the turn of the assistant is encoded as if it stood alone."""
    template = "{% for m in messages %}{{ m.role[0] }}: {{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}"
    template += "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}a: {% endif %}"
    tokenizer = dataclasses.replace(_sentencepiece("normalizer"), chat_template=template)
    found = _encode(tokenizer, [{"q": "good?", "a": "yes"}], use_chat=True)
    assert tokenizer.backend.decode(found.token_ids[0][0].tolist(), skip_special_tokens=False) == "u: good?\na: yes</s>"


def test_a_response_that_no_tokens_decode_to_is_refused():
    """Fails when SFT learns another text than the row's, or the error loses the row; NFC counts as the same text."""
    tokenizer = Tokenizer.train([WORDS], 300)
    rows = [{"q": "is it", "a": "good"}, {"q": "is it", "a": "Good"}]
    tokenizer.backend.normalizer = normalizers.NFC()
    assert len(_encode(tokenizer, [{"q": "is it", "a": "e\u0301"}]).rows) == 1
    tokenizer.backend.normalizer = normalizers.Lowercase()
    with pytest.raises(
        ValueError, match=r"^row 1: field 'a': no tokens after the prompt decode to 'Good'; remove the row"
    ):
        _encode(tokenizer, rows)


def test_a_response_ends_at_its_first_stop_token():
    """Fails when a response goes on where sampling would end, or gets a second end."""
    tokenizer = stop_tokens.extend(Tokenizer.train(["ab"], 259), ("!",), use_chat=False)
    found = _encode(tokenizer, [{"q": "x", "a": "yes! no!"}])
    assert tokenizer.backend.decode(found.token_ids[0][0].tolist()) == "xyes!"
    assert found.response_lengths[0].tolist() == [4]


def test_rows_that_do_not_fit_are_left_out():
    """Fails when a row of exactly `length` tokens is left out, one of more is cut or kept, a pair is kept because one
    of its responses fits, or rows are numbered anew."""
    tokenizer = Tokenizer.train(["ab"], 259)
    rows = [{"q": "x" * n, "a": "y" * 3, "b": "z" * m} for n, m in ((2, 3), (3, 3), (1, 4), (2, 4), (1, 1))]
    found = _encode(tokenizer, rows, length=7)  # start, prompt, response and end
    assert (found.rows.tolist(), found.left_out) == ([0, 2, 3, 4], 1)
    found = _encode(tokenizer, rows, ("a", "b"), length=7)
    assert (found.rows.tolist(), found.left_out) == ([0, 2, 4], 2)
    splits = [_split(rows[:2]), _split(rows[2:], 2)]
    assert responses.encode(tokenizer, splits, ["a"], ASK, use_chat=False, length=7).rows.tolist() == [0, 2, 3, 4]


def test_a_batch_holds_first_responses_before_second_ones():
    """Fails when pairs lie side by side, rows are padded on the right, or prompt tokens count as response."""
    tokenizer = Tokenizer.train(["ab"], 259)
    found = _encode(tokenizer, [{"q": c, "a": c * 2, "b": c * 3} for c in "xyz"], ("a", "b"))
    ids, mask, is_response = found.batch(np.array([2, 0]), 8, tokenizer.pad_id)
    assert tokenizer.decode(ids, mask) == ["zzz", "xxx", "zzzz", "xxxx"]
    assert tokenizer.decode(ids, is_response) == ["zz", "xx", "zzz", "xxx"]
    assert (ids[:, -1] == tokenizer.eos_id).all()
    assert mask.sum(1).tolist() == [5, 5, 6, 6]
    assert is_response.sum(1).tolist() == [3, 3, 4, 4]


ASSISTANT = {"role": "assistant", "content": "Yes"}


@pytest.mark.parametrize("value", ["Yes", [ASSISTANT], [*FIRST, ASSISTANT]], ids=str)
def test_a_response_may_be_a_conversation(value):
    """Fails when the assistant's turn is not found, with or without the prompt before it."""
    assert fields.response({"a": value}, "a", FIRST, use_chat=True) == "Yes"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "field 'a' holds None, want a text, a number or a conversation"),
        (True, "field 'a' holds True"),
        (" \n", "field 'a' is empty, want a response"),
        (FIRST, "field 'a': ends with the turn of 'user', want the assistant's"),
        ([], "field 'a': conversation: got no message"),
        ([*LATER[:1], {"role": "user", "content": "?"}, ASSISTANT], "field 'a': begins with other messages than"),
        ([{"role": "assistant", "content": ""}], "field 'a' is empty"),
    ],
    ids=str,
)
def test_other_responses_are_refused(value, message):
    """Fails when the check of this value is taken out, or its error loses the row."""
    split = _split([{"q": FIRST, "a": "Yes"}, {"q": FIRST, "a": value}])
    with pytest.raises(ValueError, match=rf"^row 1: {message}"):
        responses.check([split], ["a"], ASK, use_chat=True)
    with pytest.raises(ValueError, match=r"^row 0: has no field 'b', but a, q; correct its name"):
        responses.check([split], ["b"], ASK, use_chat=True)


def test_a_conversation_needs_the_chat_template():
    """Fails when the text of a list is learned."""
    with pytest.raises(ValueError, match=r"field 'a' holds \[.*, want a text or a number$"):
        fields.response({"a": [ASSISTANT]}, "a", "?", use_chat=False)
