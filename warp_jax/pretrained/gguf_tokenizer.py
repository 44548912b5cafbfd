"""Convert the vocabulary of a GGUF file to a tokenizer of the `tokenizers` library and its JSON files."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

KEYS = re.compile(
    r"(ggml\.(model|pre|tokens|token_type|merges|scores|add_(bos|eos|sep)_token|add_space_prefix|\w+_token_id)"
    r"|chat_template.*)"
)
DEFAULTS: dict[str, dict[str, Any]] = {  # those of llama.cpp; "gpt2": byte-level BPE, "llama": SentencePiece BPE
    "gpt2": {"ggml.add_bos_token": False, "ggml.add_space_prefix": False, "ggml.pre": None},
    "llama": {"ggml.add_bos_token": True, "ggml.add_space_prefix": True},
}
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
PRE_TOKENIZERS = {
    "gpt-2": BYTE_LEVEL,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTE_LEVEL]),
}
RANKING = {"gpt2": "ggml.merges", "llama": "ggml.scores"}  # the field that orders the merges
ROLES = ("bos", "eos", "eot", "padding", "unknown")
NORMAL, SPECIAL, USER_DEFINED = 1, (2, 3), 4  # values of ggml.token_type; special: unknown and control tokens
SPACE = "\u2581"  # replaces a space in SentencePiece's tokens


def read_vocabulary(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Read the metadata "tokenizer.*", without this prefix and with llama.cpp's defaults; reject unknown fields."""
    given = {key.removeprefix("tokenizer."): value for key, value in metadata.items() if key.startswith("tokenizer.")}
    if unknown := [key for key in given if not KEYS.fullmatch(key)]:
        raise ValueError(f"metadata 'tokenizer.{unknown[0]}' is not supported")
    kind = given.get("ggml.model")
    if kind not in RANKING:
        raise ValueError(f"tokenizer.ggml.model {kind!r} is not supported; want one of {', '.join(RANKING)}")
    if missing := [
        key for key in ("ggml.tokens", "ggml.token_type", "ggml.eos_token_id", RANKING[kind]) if key not in given
    ]:
        raise ValueError(f"metadata 'tokenizer.{missing[0]}' is missing")
    values = DEFAULTS[kind] | {f"ggml.{name}_token_id": None for name in ROLES} | given
    for key in ("ggml.add_eos_token", "ggml.add_sep_token", "ggml.add_space_prefix"):
        if values.get(key):
            raise ValueError(f"metadata 'tokenizer.{key}' = True is not supported")
    if values["ggml.add_bos_token"] and values["ggml.bos_token_id"] is None:
        raise ValueError("metadata 'tokenizer.ggml.bos_token_id' is missing, but add_bos_token is true")
    if len(set(values["ggml.tokens"])) < len(values["ggml.tokens"]):
        raise ValueError("metadata 'tokenizer.ggml.tokens' has a token twice")
    return values


def _token(vocabulary: Mapping[str, Any], role: str) -> str | None:
    token_id = vocabulary[f"ggml.{role}_token_id"]
    return None if token_id is None else vocabulary["ggml.tokens"][token_id]


def make_tokenizer(vocabulary: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Build the tokenizer of a vocabulary."""
    rows = list(zip(vocabulary["ggml.tokens"], vocabulary["ggml.token_type"], strict=True))
    if vocabulary["ggml.model"] == "gpt2":
        backend = _byte_level_bpe(vocabulary["ggml.tokens"], vocabulary["ggml.merges"], vocabulary["ggml.pre"])
    else:  # llama.cpp stores user-defined tokens with plain spaces
        rows = [(token.replace(" ", SPACE) if kind == USER_DEFINED else token, kind) for token, kind in rows]
        backend = _sentencepiece_bpe(rows, vocabulary["ggml.scores"], _token(vocabulary, "unknown"))
    # normalized: matched after spaces are replaced, as in SentencePiece
    backend.add_tokens([AddedToken(token, normalized=True) for token, kind in rows if kind == USER_DEFINED])
    backend.add_special_tokens([AddedToken(token, normalized=False) for token, kind in rows if kind in SPECIAL])
    if vocabulary["ggml.add_bos_token"]:
        bos = _token(vocabulary, "bos")
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, vocabulary["ggml.bos_token_id"])]
        )
    return backend


def _byte_level_bpe(tokens: Sequence[str], merges: Sequence[str], pre: str | None) -> tokenizers.Tokenizer:
    """Byte-level BPE as in GPT-2; pre: name of the pre-tokenizer."""
    if pre not in PRE_TOKENIZERS:
        raise ValueError(f"tokenizer.ggml.pre {pre!r} is not supported; want one of {', '.join(PRE_TOKENIZERS)}")
    ids = {token: number for number, token in enumerate(tokens)}
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    if wrong := [pair for pair in pairs if not {*pair, "".join(pair)} <= ids.keys()]:
        raise ValueError(
            f"metadata 'tokenizer.ggml.merges' has {' '.join(wrong[0])!r}, which joins parts that are not tokens"
        )
    backend = tokenizers.Tokenizer(models.BPE(vocab=ids, merges=pairs))
    backend.pre_tokenizer = PRE_TOKENIZERS[pre]
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece_bpe(
    rows: Sequence[tuple[str, int]], scores: Sequence[float], unknown: str | None
) -> tokenizers.Tokenizer:
    """SentencePiece BPE from rows (token, type); a character without a token becomes byte tokens."""
    ids = {token: number for number, (token, _) in enumerate(rows)}
    merges = _merges({token: score for (token, kind), score in zip(rows, scores, strict=True) if kind == NORMAL})
    bpe = models.BPE(vocab=ids, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    backend = tokenizers.Tokenizer(bpe)
    backend.normalizer = normalizers.Replace(" ", SPACE)
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


def _merges(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """All pairs of tokens that join to a token, ordered by its score (highest first), then by the longer left part."""
    cuts = ((token, cut) for token in scores for cut in range(1, len(token)))
    pairs = [(token[:cut], token[cut:]) for token, cut in cuts if token[:cut] in scores and token[cut:] in scores]
    return sorted(pairs, key=lambda pair: (-scores[pair[0] + pair[1]], -len(pair[0])))


def make_generation_config(vocabulary: Mapping[str, Any]) -> dict[str, Any]:
    """Content of generation_config.json; the ends of a text and of a turn both end a completion."""
    ends = [vocabulary[f"ggml.{role}_token_id"] for role in ("eos", "eot")]
    return {
        "bos_token_id": vocabulary["ggml.bos_token_id"],
        "eos_token_id": list(dict.fromkeys(end for end in ends if end is not None)),
        "pad_token_id": vocabulary["ggml.padding_token_id"],
    }


def make_tokenizer_config(vocabulary: Mapping[str, Any], max_length: int) -> dict[str, Any]:
    """Content of tokenizer_config.json; max_length: tokens in the model's context."""
    roles = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    texts = {f"{name}_token": _token(vocabulary, role) for name, role in roles.items()}
    texts["chat_template"] = vocabulary.get("chat_template")
    return {
        **{key: text for key, text in texts.items() if text is not None},
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": vocabulary["ggml.add_bos_token"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
