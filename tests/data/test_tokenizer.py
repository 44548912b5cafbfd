"""Tokenizers of model folders: which ids frame a text, which end it, and files that do not fit together."""

import dataclasses
import json

import numpy as np
import pytest
import tokenizers
from tokenizers import processors

from warp_jax.data.tokenizer import Tokenizer

SPECIAL = ["<|unused|>", "<s>", "</s>", "<|turn_end|>", "<|blank|>"]


def _write(folder, **files):
    for name, value in files.items():
        (folder / f"{name}.json").write_text(value if isinstance(value, str) else json.dumps(value))


def _make_folder(folder, *, with_bos=True, **files):
    """A tokenizer.json with the SPECIAL tokens after its bytes, and the JSON files given by name."""
    backend = tokenizers.Tokenizer.from_str(Tokenizer.train(["a film of films"] * 5, 270).backend.to_str())
    backend.add_special_tokens(SPECIAL)
    if with_bos:
        bos_id = backend.token_to_id("<s>")
        backend.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", bos_id)])
    backend.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    _write(folder, **{"tokenizer_config": names, **files})
    return {token: backend.token_to_id(token) for token in SPECIAL}


def test_special_ids_equal_transformers(tmp_path):
    """Fails when a role is read from another role's token, or an object's content is not."""
    from transformers import PreTrainedTokenizerFast

    bos = {"__type": "AddedToken", "content": "<s>"}
    names = {"bos_token": bos, "eos_token": "</s>", "pad_token": "<|blank|>"}
    _make_folder(tmp_path, tokenizer_config=names)
    theirs, ours = PreTrainedTokenizerFast.from_pretrained(tmp_path), Tokenizer.from_folder(tmp_path)
    expected = (theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id)
    assert (ours.pad_id, ours.bos_id, ours.eos_id) == expected
    assert ours.special_tokens == theirs.special_tokens_map
    assert ours.vocab_size == max(theirs.get_vocab().values()) + 1


def test_stop_ids_hold_the_models_list_and_the_tokenizers_own(tmp_path):
    """Fails when only the first of a list, or only the tokenizer's own end of text, stops a completion."""
    ids = _make_folder(tmp_path)
    _write(tmp_path, generation_config={"eos_token_id": [ids["<|turn_end|>"], ids["</s>"], ids["<|unused|>"]]})
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.eos_id == ids["</s>"]
    assert tokenizer.stop_ids == (ids["</s>"], ids["<|turn_end|>"], ids["<|unused|>"])


def test_generation_config_goes_before_config(tmp_path):
    """Fails when config.json, which may be older, overrules generation_config.json or is not read without it."""
    ids = _make_folder(tmp_path)
    _write(tmp_path, config={"eos_token_id": ids["<|unused|>"]})
    assert Tokenizer.from_folder(tmp_path).stop_ids == (ids["</s>"], ids["<|unused|>"])
    _write(tmp_path, generation_config={"eos_token_id": ids["<|turn_end|>"]})
    assert Tokenizer.from_folder(tmp_path).stop_ids == (ids["</s>"], ids["<|turn_end|>"])


def test_ids_stand_in_for_names(tmp_path):
    """Fails when a model that names its tokens by id only has no end of text or no pad token."""
    ids = _make_folder(tmp_path, tokenizer_config={})
    _write(tmp_path, config={"eos_token_id": ids["<|turn_end|>"], "pad_token_id": ids["<|blank|>"], "vocab_size": 999})
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.bos_id) == (ids["<|turn_end|>"], ids["<|blank|>"], None)


@pytest.mark.parametrize("pad", [{}, {"pad_token_id": None}, {"pad_token_id": -1}])
def test_a_model_without_pad_token_is_padded_with_its_eos(tmp_path, pad):
    """Fails when a missing or negative pad id becomes id 0 or -1."""
    ids = _make_folder(tmp_path, config=pad)
    assert Tokenizer.from_folder(tmp_path).pad_id == ids["</s>"]


@pytest.mark.parametrize(
    ("with_bos", "wanted", "expected"),
    [(True, None, "<s>"), (False, None, None), (True, False, None), (False, True, "<s>")],
)
def test_bos_is_what_is_put_before_a_text(tmp_path, with_bos, wanted, expected):
    """Fails when a bos_token that is named but never put (SmolLM2's <|im_start|>) counts, or add_bos_token does not."""
    names = {"bos_token": "<s>", "eos_token": "</s>"} | ({} if wanted is None else {"add_bos_token": wanted})
    ids = _make_folder(tmp_path, with_bos=with_bos, tokenizer_config=names)
    assert Tokenizer.from_folder(tmp_path).bos_id == (None if expected is None else ids[expected])


def test_a_null_bos_is_none(tmp_path):
    """Fails when a null bos_token (Qwen) is looked up in the vocabulary."""
    _make_folder(tmp_path, tokenizer_config={"bos_token": None, "eos_token": "</s>"})
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.bos_id is None
    assert "bos_token" not in tokenizer.special_tokens


def test_special_tokens_map_fills_in(tmp_path):
    """Fails when the older file is not read, or overrules the newer."""
    older = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<|blank|>"}
    ids = _make_folder(tmp_path, tokenizer_config={"unk_token": "<|unused|>"}, special_tokens_map=older)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (ids["<s>"], ids["</s>"])
    assert tokenizer.special_tokens["unk_token"] == "<|unused|>"


def test_encoding_adds_nothing_and_reads_specials_only_when_asked(tmp_path):
    """Fails when encode puts a BOS, reads a special token out of a plain text, or encode_with_special does not."""
    ids = _make_folder(tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path)
    text = "a film</s>"
    (plain,), (special,) = tokenizer.encode([text]), tokenizer.encode_with_special([text])
    (start,) = tokenizer.encode(["a film"])
    assert not set(plain) & set(ids.values())
    assert special.tolist() == [*start, ids["</s>"]]
    assert tokenizer.encode([text])[0].tolist() == plain.tolist()  # the switch went back
    assert tokenizer.decode(special[None], np.ones((1, special.size), bool)) == ["a film"]
    assert tokenizer.decode(plain[None], np.ones((1, plain.size), bool)) == [text]


def test_padding_and_truncation_of_the_file_are_left_out(tmp_path):
    """Fails when a tokenizer.json saved with padding or truncation gives texts of another length."""
    _make_folder(tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.enable_padding(length=12)
    backend.enable_truncation(3)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert [ids.size for ids in Tokenizer.from_folder(tmp_path).encode(["b", "bcdefg"])] == [1, 6]


def test_vocab_size_is_the_largest_id_and_one(tmp_path):
    """Fails when tokens are counted: ids with a hole would reach beyond the embedding."""
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "</s>": 7}, unk_token="a"))
    backend.save(str(tmp_path / "tokenizer.json"))
    _write(tmp_path, tokenizer_config={"eos_token": "</s>"})
    assert Tokenizer.from_folder(tmp_path).vocab_size == 8


@pytest.mark.parametrize(
    ("written", "expected"),
    [("one", "one"), ([{"name": "rag", "template": "two"}, {"name": "default", "template": "three"}], "three")],
)
def test_chat_template(tmp_path, written, expected):
    """Fails when the first of several templates is taken, or when the .jinja file does not win."""
    _make_folder(tmp_path, tokenizer_config={"eos_token": "</s>", "chat_template": written})
    assert Tokenizer.from_folder(tmp_path).chat_template == expected
    (tmp_path / "chat_template.jinja").write_text("file")
    assert Tokenizer.from_folder(tmp_path).chat_template == "file"


EOS = {"eos_token": "</s>"}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer": '{"version": '}, "tokenizer.json: is not a tokenizer"),
        ({"tokenizer_config": "{"}, "tokenizer_config.json: broken JSON"),
        ({"generation_config": "[1]"}, "generation_config.json: broken JSON: got list"),
        ({"tokenizer_config": "[" * 100_000}, "tokenizer_config.json: broken JSON: it is nested too deeply"),
        ({"special_tokens_map": '{"eos_token": "a", "eos_token": "b"}'}, "special_tokens_map.json: .*is given twice"),
        ({"tokenizer_config": {}}, "no EOS token, want eos_token"),
        ({"tokenizer_config": {"eos_token": "<end>"}}, "eos_token '<end>' is not in the vocabulary"),
        ({"tokenizer_config": EOS | {"pad_token": "<pad_>"}}, "pad_token '<pad_>' is not in the vocabulary"),
        ({"generation_config": {"eos_token_id": [1, 9999]}}, "generation_config.json: eos_token_id has 9999"),
        ({"config": {"eos_token_id": "</s>"}}, "config.json: eos_token_id has '</s>'"),
        ({"special_tokens_map": {"eos_token": "<s>"}}, "eos_token is '</s>' in tokenizer_config.json and '<s>' in"),
        ({"tokenizer_config": EOS | {"add_bos_token": True}}, "add_bos_token is true, but bos_token is missing"),
        ({"tokenizer_config": EOS | {"added_tokens_decoder": {"4": {"content": "</s>"}}}}, "'</s>' has id 4 in"),
        ({"config": {"text_config": {"vocab_size": 100}}}, "vocab_size in config.json is 100"),
        ({"tokenizer_config": EOS | {"chat_template": [{"name": "rag", "template": ""}]}}, "no template is named"),
    ],
)
def test_wrong_folders_are_refused(tmp_path, files, message):
    """Fails when the check named in the message is left out, or answers with more than a line."""
    _make_folder(tmp_path, **files)
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer.from_folder(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_folder_without_tokenizer_is_refused(tmp_path):
    """Fails when a missing tokenizer.json is left to the library, whose message names no file."""
    with pytest.raises(ValueError, match=r"has no tokenizer.json"):
        Tokenizer.from_folder(tmp_path)


def test_trained_tokenizers_have_the_same_attributes():
    """Fails when a trained tokenizer has no stop ids or claims a chat template."""
    tokenizer = Tokenizer.train(["a film of films"] * 5, 270)
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_ids) == (0, 1, 2, (2,))
    assert tokenizer.chat_template is None
    assert tokenizer.special_tokens == {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}


def test_an_answer_keeps_the_space_before_its_first_word():
    """Fails when prompt and answer are decoded apart: SentencePiece drops the first space of a text."""
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"\u2581a": 0, "\u2581great": 1, "\u2581film": 2}, "x"))
    backend.decoder = tokenizers.decoders.Metaspace()
    tokenizer = Tokenizer(backend, 0, None, 0, (0,), {})
    ids, mask = np.array([[9, 0, 1], [0, 1, 1]]), np.array([[False, True, True], [True, True, True]])
    answers = np.array([[2], [2]]), np.array([[True], [False]])
    assert tokenizer.decode_answers(ids, mask, *answers) == (["a great", "a great great"], [" film", ""])


def test_a_character_cut_in_two_does_not_eat_the_answer():
    """Fails when the prompt's length is cut off where the whole does not begin with the prompt."""
    tokenizer = Tokenizer.train(["x"], 259)
    (ids,) = tokenizer.encode(["\u00e9t\u00e9"])
    found = tokenizer.decode_answers(ids[None, :1], ids[None, :1] >= 0, ids[None, 1:], ids[None, 1:] >= 0)
    assert found == (["\ufffd"], ["\ufffdt\u00e9"])


def test_a_token_without_embedding_is_refused(tmp_path):
    """Fails when a message that spells such a token out is encoded, and its row becomes nan."""
    _make_folder(tmp_path, tokenizer_config=EOS)
    tokenizer = Tokenizer.from_folder(tmp_path)
    largest = tokenizer.vocab_size - 1
    token = tokenizer.backend.id_to_token(largest)
    (row,) = tokenizer.encode_with_special([token])
    assert row.tolist() == [largest]
    with pytest.raises(ValueError, match="no embedding"):
        dataclasses.replace(tokenizer, embedding_size=largest).encode_with_special([token])
