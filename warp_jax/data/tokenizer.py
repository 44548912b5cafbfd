"""Text to ids and back by the `tokenizers` library: a byte-level BPE trained on the corpus, or a model folder's own."""

import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"


class SpecialTokens(NamedTuple):
    """The ids that frame a text, and what a chat template needs.

    bos_id: what is put before a text, None if nothing is; eos_id: what is put after one; stop_ids: all that end a turn,
    eos_id first; texts: how the special tokens are written, by role ("bos_token", "eos_token", ...); embedding_size:
    ids from here on have no embedding, None if not known.
    """

    pad_id: int
    bos_id: int | None
    eos_id: int
    stop_ids: tuple[int, ...]
    texts: Mapping[str, str]
    chat_template: str | None
    embedding_size: int | None = None


class Tokenizer:
    """Text to ids and back. `pad_id`, `bos_id`, `eos_id`, `stop_ids` and `chat_template` are those of SpecialTokens,
    `special_tokens` its texts; `vocab_size` is the largest id + 1, `text_vocab_size` that of the tokens that stand for
    text, without special ones such as images. A model's embedding may have more rows.
    """

    def __init__(self, backend: tokenizers.Tokenizer, special: SpecialTokens | None = None):
        """special: by default PAD, BOS and EOS, as `train` makes them."""
        special = _trained_special(backend) if special is None else special
        self._backend = backend
        self._lock = threading.Lock()
        ids = set(backend.get_vocab(with_added_tokens=True).values())
        self.vocab_size: int = max(ids) + 1
        unread = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
        self.text_vocab_size: int = max(ids - unread, default=0) + 1
        self.pad_id, self.bos_id, self.eos_id = special.pad_id, special.bos_id, special.eos_id
        self.stop_ids = special.stop_ids
        self.special_tokens = dict(special.texts)
        self.chat_template = special.chat_template
        self._embedding_size = special.embedding_size or self.vocab_size

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learn merges from texts; every byte is a token, so nothing is unknown."""
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[PAD, BOS, EOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        return cls(backend)

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Read the tokenizer.json of a trained tokenizer."""
        return cls(tokenizers.Tokenizer.from_file(str(path)))

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer":
        """Read tokenizer.json of a Hugging Face model folder, and what the files beside it say of its special tokens.

        Padding and truncation that the file asks for are left out. bos_id follows add_bos_token where it is written,
        else what the tokenizer itself puts before a text. A model that names no pad token is padded with eos_id: masks
        say which tokens are real, so an id in the padding never counts as an end. Raises ValueError, naming the file.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"{folder}: has no tokenizer.json; want a model folder as transformers saves it")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{path}: is not a tokenizer: {_one_line(error)}; fetch the file again") from error
        backend.no_padding()
        backend.no_truncation()
        return cls(backend, _ModelFolder(folder, backend).special())

    def to_json(self) -> str:
        """The content of a tokenizer.json; the special tokens of a model folder are in its other files."""
        return self._backend.to_str(pretty=True)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int32 ids of each text, without special tokens: one that a text spells out is plain text."""
        return self._encode(texts, as_plain_text=True)

    def encode_with_special(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int32 ids of each text, where special tokens that it spells out become their ids, and none is added.

        For rendered chat prompts. As in transformers, what a user's message spells out counts as well. ValueError if
        that is a token which the model cannot read, such as one that stands for an image.
        """
        rows = self._encode(texts, as_plain_text=False)
        for text, row in zip(texts, rows, strict=True):
            if len(row) and row.max() >= self._embedding_size:
                token = self._backend.id_to_token(int(row.max()))
                raise ValueError(f"prompt {text[:60]!r}...: has {token!r}, which the model has no embedding for")
        return rows

    def decode(self, token_ids: np.ndarray, mask: np.ndarray) -> list[str]:
        """Texts of the rows of token_ids [B, S] where mask [B, S] is True; special tokens are left out."""
        rows = [row[keep].tolist() for row, keep in zip(token_ids, mask, strict=True)]
        return self._backend.decode_batch(rows, skip_special_tokens=True)

    def decode_answers(
        self, prompt_ids: np.ndarray, prompt_mask: np.ndarray, answer_ids: np.ndarray, answer_mask: np.ndarray
    ) -> tuple[list[str], list[str]]:
        """Texts of prompts and of their answers, whose sum is the text of the whole.

        Decoded alone, an answer of a SentencePiece model loses the space before its first word.
        """
        prompts = self.decode(prompt_ids, prompt_mask)
        alone = self.decode(answer_ids, answer_mask)
        both = np.concatenate([prompt_ids, answer_ids], 1), np.concatenate([prompt_mask, answer_mask], 1)
        answers = [
            whole.removeprefix(prompt) if whole.startswith(prompt) else answer  # a character cut in two is no prefix
            for whole, prompt, answer in zip(self.decode(*both), prompts, alone, strict=True)
        ]
        return prompts, answers

    def _encode(self, texts: Sequence[str], *, as_plain_text: bool) -> list[np.ndarray]:
        with self._lock:  # the switch belongs to the backend, not to the call
            self._backend.encode_special_tokens = as_plain_text
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(e.ids, np.int32) for e in encodings]


def _trained_special(backend: tokenizers.Tokenizer) -> SpecialTokens:
    pad_id, bos_id, eos_id = (_trained_id(backend, token) for token in (PAD, BOS, EOS))
    texts = {"pad_token": PAD, "bos_token": BOS, "eos_token": EOS}
    return SpecialTokens(pad_id, bos_id, eos_id, stop_ids=(eos_id,), texts=texts, chat_template=None)


def _trained_id(backend: tokenizers.Tokenizer, token: str) -> int:
    token_id = backend.token_to_id(token)
    if token_id is None:
        raise ValueError(f"tokenizer: has no special token {token!r}; train it with Tokenizer.train")
    return token_id


class _ModelFolder:
    """The JSON files beside a tokenizer.json, and what they say together."""

    def __init__(self, folder: Path, backend: tokenizers.Tokenizer):
        self._folder, self._backend = folder, backend
        self._settings = _read_object(folder / "tokenizer_config.json")
        self._older = _read_object(folder / "special_tokens_map.json")
        self._generation = _read_object(folder / "generation_config.json")
        self._model = _read_object(folder / "config.json")
        self._texts = self._special_texts()

    def special(self) -> SpecialTokens:
        """Raises ValueError where the files contradict each other or name what the vocabulary lacks."""
        self._check_added_tokens()
        ends = self._model_ids("eos_token_id")
        eos_id = self._id_of("eos_token", ends)
        if eos_id is None:
            raise ValueError(f"{self._folder}: names no end of text; want eos_token in tokenizer_config.json")
        pad_id = self._id_of("pad_token", self._model_ids("pad_token_id"))
        pad_id = eos_id if pad_id is None else pad_id
        stop_ids = tuple(dict.fromkeys((eos_id, *ends)))
        size = (self._model.get("text_config") or self._model).get("vocab_size")
        special = SpecialTokens(pad_id, self._bos_id(), eos_id, stop_ids, self._texts, self._chat_template(), size)
        self._check_embedding(special)
        return special

    def _special_texts(self) -> dict[str, str]:
        """Texts by role: tokenizer_config.json and the older special_tokens_map.json, which must agree."""
        texts, older = _token_texts(self._settings), _token_texts(self._older)
        for role in ("bos_token", "eos_token", "pad_token"):
            # a null in the first is an answer too: Qwen names no bos_token
            if role in older and role in self._settings and texts.get(role) != older[role]:
                raise ValueError(
                    f"{self._folder}: {role} is {texts.get(role)!r} in tokenizer_config.json and {older[role]!r} in "
                    "special_tokens_map.json; correct one of them"
                )
        return older | texts

    def _id_of(self, role: str, otherwise: Sequence[int] = ()) -> int | None:
        if role not in self._texts:
            return otherwise[0] if otherwise else None
        token_id = self._backend.token_to_id(self._texts[role])
        if token_id is None:
            raise ValueError(
                f"{self._folder}: {role} {self._texts[role]!r} is not in the vocabulary of tokenizer.json; "
                "correct tokenizer_config.json"
            )
        return token_id

    def _bos_id(self) -> int | None:
        bos_id, wanted = self._id_of("bos_token"), self._settings.get("add_bos_token")
        if wanted and bos_id is None:
            raise ValueError(f"{self._folder}/tokenizer_config.json: add_bos_token is true, but there is no bos_token")
        if wanted is None:  # then it is for tokenizer.json to say
            wanted = self._backend.encode("a", add_special_tokens=True).ids[:1] == [bos_id]
        return bos_id if wanted else None

    def _model_ids(self, key: str) -> list[int]:
        """An id or a list of ids in generation_config.json, else in config.json; negative ones stand for none."""
        name, value = "generation_config.json", self._generation.get(key)
        if value is None:
            name, value = "config.json", self._model.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        for token_id in ids:
            if type(token_id) is not int or (token_id >= 0 and self._backend.id_to_token(token_id) is None):
                raise ValueError(f"{self._folder / name}: {key} has {token_id!r}, which is not an id of tokenizer.json")
        return [token_id for token_id in ids if token_id >= 0]

    def _check_added_tokens(self) -> None:
        for token_id, token in (self._settings.get("added_tokens_decoder") or {}).items():
            found = self._backend.token_to_id(_text_of(token) or "")
            if str(found) != token_id:
                raise ValueError(
                    f"{self._folder}: {_text_of(token)!r} has id {token_id} in tokenizer_config.json and {found} in "
                    "tokenizer.json; take both from one model"
                )

    def _check_embedding(self, special: SpecialTokens) -> None:
        size = special.embedding_size
        largest = max(special.pad_id, special.bos_id or 0, *special.stop_ids)
        if size is not None and largest >= size:
            raise ValueError(
                f"{self._folder}: {self._backend.id_to_token(largest)!r} has id {largest} in tokenizer.json, but "
                f"vocab_size in config.json is {size}; take both from one model"
            )

    def _chat_template(self) -> str | None:
        """chat_template.jinja wins over tokenizer_config.json, as in transformers; of several the one named default."""
        path = self._folder / "chat_template.jinja"
        if path.is_file():
            return path.read_text(encoding="utf-8")
        template = self._settings.get("chat_template")
        if isinstance(template, list):
            named = [entry["template"] for entry in template if entry["name"] == "default"]
            template = named[0] if named else template
        if not (template is None or isinstance(template, str)):
            raise ValueError(f"{self._folder}/tokenizer_config.json: chat_template is no text, and none named default")
        return template


def _token_texts(settings: Mapping[str, Any]) -> dict[str, str]:
    texts = {role: _text_of(token) for role, token in settings.items() if role.endswith("_token")}
    return {role: text for role, text in texts.items() if text is not None}


def _text_of(token: Any) -> str | None:
    """A special token as the files write it: its text, or an object with its text."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _read_object(path: Path) -> dict[str, Any]:
    """The object of a JSON file; empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON: {_one_line(error)}; fetch the file again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__}, want a JSON object; fetch the file again")
    return value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
