"""Decoding in llama.cpp, one sequence in float32, for scripts/benchmark.py."""

import itertools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
from protocol import THREADS, Facts, Work, serve


def tensors_of(work: Work) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the weights; the head is the embedding."""
    width, key_width = work.width, work.width // work.heads * work.kv_heads
    yield "token_embd.weight", (work.vocab, width)
    yield "output_norm.weight", (width,)
    for layer in range(work.layers):
        for name, shape in {
            "attn_norm": (width,),
            "attn_q": (width, width),
            "attn_k": (key_width, width),
            "attn_v": (key_width, width),
            "attn_output": (width, width),
            "ffn_norm": (width,),
            "ffn_gate": (work.mlp, width),
            "ffn_up": (work.mlp, width),
            "ffn_down": (width, work.mlp),
        }.items():
            yield f"blk.{layer}.{name}.weight", shape


def write_model(work: Work, path: Path) -> None:
    """Write the model with random weights, and a tokenizer of words that are never used."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(work.prompt + work.longest)
    writer.add_embedding_length(work.width)
    writer.add_block_count(work.layers)
    writer.add_feed_forward_length(work.mlp)
    writer.add_head_count(work.heads)
    writer.add_head_count_kv(work.kv_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(work.width // work.heads)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"word{number}" for number in range(work.vocab)])
    writer.add_token_scores([0.0] * work.vocab)
    writer.add_token_types([gguf.TokenType.NORMAL] * work.vocab)
    shapes = dict(tensors_of(work))
    for name, shape in shapes.items():
        writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * int(np.prod(shape)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():  # one after another, so that writing takes no memory
        is_norm = "norm" in name
        values = np.ones(shape, np.float32) if is_norm else rng.standard_normal(shape, np.float32) * np.float32(0.02)
        writer.write_tensor_data(values)
    writer.close()


def make(work: Work) -> Callable[[], Facts]:
    """Return the stage: a prompt, then tokens drawn from the whole vocabulary at temperature 1."""
    with tempfile.TemporaryDirectory() as folder:
        write_model(work, Path(folder) / "model.gguf")
        model = llama_cpp.Llama(
            str(Path(folder) / "model.gguf"),
            n_ctx=work.prompt + work.longest,
            n_threads=THREADS,
            n_threads_batch=THREADS,
            type_k=llama_cpp.GGML_TYPE_F32,
            type_v=llama_cpp.GGML_TYPE_F32,
            verbose=False,
        )
    prompt = np.random.default_rng(0).integers(1, work.vocab, work.prompt).tolist()
    options = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0, "temp": 1.0, "repeat_penalty": 1.0}

    def decode() -> Facts:
        model.reset()  # else the prompt is still in the cache
        return {"tokens": len(list(itertools.islice(model.generate(prompt, **options), work.longest)))}

    return decode


if __name__ == "__main__":
    serve(make)
