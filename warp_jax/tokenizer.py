"""A byte-level BPE tokenizer trained on the corpus, through the `tokenizers` library."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"


class Tokenizer:
    """Text to ids and back; `pad_id`, `bos_id` and `eos_id` are its special tokens."""

    def __init__(self, backend: tokenizers.Tokenizer):
        self._backend = backend
        self.vocab_size: int = backend.get_vocab_size()
        self.pad_id, self.bos_id, self.eos_id = (self._special(token) for token in (PAD, BOS, EOS))

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
        """Read a tokenizer.json."""
        return cls(tokenizers.Tokenizer.from_file(str(path)))

    def save(self, path: Path) -> None:
        """Write a tokenizer.json."""
        self._backend.save(str(path))

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int32 ids of each text, without special tokens."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(e.ids, np.int32) for e in encodings]

    def decode(self, token_ids: np.ndarray, mask: np.ndarray) -> list[str]:
        """Texts of the rows of token_ids [B, S] where mask [B, S] is True; special tokens are left out."""
        rows = [row[keep].tolist() for row, keep in zip(token_ids, mask, strict=True)]
        return self._backend.decode_batch(rows, skip_special_tokens=True)

    def _special(self, token: str) -> int:
        token_id = self._backend.token_to_id(token)
        if token_id is None:
            raise ValueError(f"tokenizer: has no special token {token!r}; train it with Tokenizer.train")
        return token_id
