"""Text to token ids and back: a byte-level BPE trained on the corpus, or the tokenizer of a model folder."""

import dataclasses
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from warp_jax import files

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """Text to token ids and back, and the special tokens and the chat template of a model."""

    backend: tokenizers.Tokenizer
    pad_id: int  # pads the rows of a batch; masks are False there
    bos_id: int | None  # comes before a text, None if nothing does
    eos_id: int  # comes after a text
    stop_ids: tuple[int, ...]  # all that end a turn, eos_id first
    special_tokens: dict[str, str]  # texts of the special tokens by role ("bos_token", "eos_token", ...)
    chat_template: str | None = None  # Jinja
    embedding_size: int | None = None  # rows of the model's embedding, None if not known
    _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock, init=False)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Train a byte-level BPE on texts. Every byte is a token, so no text is unknown."""
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
        return cls._trained(backend)

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Read the tokenizer.json of a trained tokenizer."""
        return cls._trained(tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8")))

    @classmethod
    def _trained(cls, backend: tokenizers.Tokenizer) -> "Tokenizer":
        texts = {"pad_token": PAD, "bos_token": BOS, "eos_token": EOS}
        vocabulary = backend.get_vocab()
        if missing := [token for token in texts.values() if token not in vocabulary]:
            raise ValueError(f"tokenizer: has no special token {missing[0]!r}; train it with Tokenizer.train")
        pad_id, bos_id, eos_id = (vocabulary[token] for token in texts.values())
        return cls(backend, pad_id, bos_id, eos_id, (eos_id,), texts)

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer":
        """Load the tokenizer of a Hugging Face model folder: tokenizer.json, and special tokens from the other files.

        Padding and truncation in tokenizer.json are ignored. bos_id follows add_bos_token; if that is missing, it is
        the token that the tokenizer itself puts before a text. If the model has no pad token, pad_id is eos_id: masks
        mark the padding, so it never counts as the end of a text. Raises ValueError, naming the file.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"{folder}: has no tokenizer.json; want a model folder that transformers saved")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises no narrower type
            reason = " ".join(str(error).split())
            raise ValueError(f"{path}: is not a tokenizer: {reason}; download it again") from error
        backend.no_padding()
        backend.no_truncation()
        return _ModelFolder(folder, backend).tokenizer()

    @property
    def vocab_size(self) -> int:
        """The largest id + 1; the model's embedding may have more rows."""
        return max(self.backend.get_vocab().values()) + 1

    @property
    def text_vocab_size(self) -> int:
        """The largest id of a token that is not special, + 1."""
        special = {i for i, token in self.backend.get_added_tokens_decoder().items() if token.special}
        return max(set(self.backend.get_vocab().values()) - special, default=0) + 1

    def to_json(self) -> str:
        """Return the content of tokenizer.json, without the special tokens in other files of a model folder."""
        return self.backend.to_str(pretty=True)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode texts to int32 ids. A special token that is written out in a text is encoded as plain text."""
        return self._encode(texts, as_plain_text=True)

    def encode_with_bos(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode texts as `encode` does, each after the BOS token if the model has one."""
        bos = np.array([] if self.bos_id is None else [self.bos_id], np.int32)
        return [np.append(bos, row) for row in self.encode(texts)]

    def encode_with_special(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode rendered chat prompts to int32 ids: special tokens written out in a text become their ids.

        No token is added. As in transformers, special tokens that a user's message contains count too. Raises
        ValueError for a token without an embedding, such as the token for an image.
        """
        rows = self._encode(texts, as_plain_text=False)
        for text, row in zip(texts, rows, strict=True):
            if self.embedding_size and len(row) and row.max() >= self.embedding_size:
                token = self.backend.id_to_token(int(row.max()))
                raise ValueError(f"prompt {text[:60]!r}...: has {token!r}, which the model has no embedding for")
        return rows

    def decode(self, token_ids: np.ndarray, mask: np.ndarray) -> list[str]:
        """Decode the tokens of token_ids [B, S] where mask [B, S] is True, without special tokens."""
        rows = [row[keep].tolist() for row, keep in zip(token_ids, mask, strict=True)]
        return self.backend.decode_batch(rows, skip_special_tokens=True)

    def decode_whole(self, rows: Sequence[np.ndarray]) -> list[str]:
        """Decode rows of token ids with their special tokens."""
        return self.backend.decode_batch([row.tolist() for row in rows], skip_special_tokens=False)

    def decode_answers(
        self, prompt_ids: np.ndarray, prompt_mask: np.ndarray, answer_ids: np.ndarray, answer_mask: np.ndarray
    ) -> tuple[list[str], list[str]]:
        """Decode prompts and their answers so that prompt + answer is the text of both together.

        An answer that is decoded alone loses the space before its first word in SentencePiece models.
        """
        prompts = self.decode(prompt_ids, prompt_mask)
        alone = self.decode(answer_ids, answer_mask)
        both = np.concatenate([prompt_ids, answer_ids], 1), np.concatenate([prompt_mask, answer_mask], 1)
        answers = [
            whole.removeprefix(prompt) if whole.startswith(prompt) else answer  # a character may be split between both
            for whole, prompt, answer in zip(self.decode(*both), prompts, alone, strict=True)
        ]
        return prompts, answers

    def _encode(self, texts: Sequence[str], *, as_plain_text: bool) -> list[np.ndarray]:
        with self._lock:  # the option is set on the shared backend
            self.backend.encode_special_tokens = as_plain_text
            encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(e.ids, np.int32) for e in encodings]


class _ModelFolder:
    """The JSON files of a model folder, read for its special tokens."""

    def __init__(self, folder: Path, backend: tokenizers.Tokenizer):
        self._folder, self._backend = folder, backend
        self._settings = _read_object(folder / "tokenizer_config.json")
        self._older = _read_object(folder / "special_tokens_map.json")
        self._generation = _read_object(folder / "generation_config.json")
        self._model = _read_object(folder / "config.json")
        self._texts = self._special_texts()

    def tokenizer(self) -> Tokenizer:
        """Add the special tokens to the backend. Raises ValueError if files disagree or name an unknown token."""
        self._check_added_tokens()
        ends = self._model_ids("eos_token_id")
        eos_id = self._id_of("eos_token", ends)
        if eos_id is None:
            raise ValueError(f"{self._folder}: no EOS token, want eos_token in tokenizer_config.json")
        pad_id = self._id_of("pad_token", self._model_ids("pad_token_id"))
        pad_id = eos_id if pad_id is None else pad_id
        bos_id = self._bos_id()
        stop_ids = tuple(dict.fromkeys((eos_id, *ends)))
        size = (self._model.get("text_config") or self._model).get("vocab_size")
        largest = max(pad_id, bos_id or 0, *stop_ids)
        if size is not None and largest >= size:
            raise ValueError(
                f"{self._folder}: {self._backend.id_to_token(largest)!r} has id {largest} in tokenizer.json, but "
                f"vocab_size in config.json is {size}; take both from one model"
            )
        return Tokenizer(self._backend, pad_id, bos_id, eos_id, stop_ids, self._texts, self._chat_template(), size)

    def _special_texts(self) -> dict[str, str]:
        """Texts by role, from tokenizer_config.json and the older special_tokens_map.json, which must agree."""
        texts, older = _token_texts(self._settings), _token_texts(self._older)
        for role in ("bos_token", "eos_token", "pad_token"):
            # null in tokenizer_config.json counts as well: Qwen has no bos_token
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
            raise ValueError(f"{self._folder}/tokenizer_config.json: add_bos_token is true, but bos_token is missing")
        if wanted is None:  # then tokenizer.json decides
            wanted = self._backend.encode("a", add_special_tokens=True).ids[:1] == [bos_id]
        return bos_id if wanted else None

    def _model_ids(self, key: str) -> list[int]:
        """Ids under a key of generation_config.json, or else of config.json. Negative ids mean none."""
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

    def _chat_template(self) -> str | None:
        """chat_template.jinja, or else tokenizer_config.json, as in transformers; of several, the one named default."""
        path = self._folder / "chat_template.jinja"
        if path.is_file():
            return path.read_text(encoding="utf-8")
        template = self._settings.get("chat_template")
        if isinstance(template, list):
            template = next((entry["template"] for entry in template if entry["name"] == "default"), template)
        if not isinstance(template, str | None):
            raise ValueError(
                f"{self._folder}/tokenizer_config.json: chat_template is not a text, and no template is named default"
            )
        return template


def _token_texts(settings: Mapping[str, Any]) -> dict[str, str]:
    texts = {role: _text_of(token) for role, token in settings.items() if role.endswith("_token")}
    return {role: text for role, text in texts.items() if text is not None}


def _text_of(token: Any) -> str | None:
    """Text of a special token, which the files write as a text or as an object with "content"."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _read_object(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file; empty if the file is missing."""
    return files.read_json(path) if path.is_file() else {}
