"""Cost of a stage of training: a fit of its seconds to the work that follows from its sizes."""

import numpy as np
from etils import epy
from speed.protocol import Work, parse_shape

with epy.lazy_imports():  # at its first use: --help does not wait for it
    from scipy import optimize

SIZES = {  # fields of Work
    "135M": {},
    "81M": {"layers": 15},
    "23M": {"layers": 10, "width": 288, "heads": 4, "kv_heads": 2, "mlp": 768, "vocab": 49152},
}


def weights(work: Work) -> tuple[int, int]:
    """Weights in the matrix products of all layers, and of the head."""
    head = work.sizes[5]
    attention = work.width * head * 2 * (work.heads + work.kv_heads)
    return work.layers * (attention + 3 * work.width * work.mlp), work.vocab * work.width


def work_of(stage: str, size: str, shape: str) -> Work:
    """The work of a stage, with two completions of each prompt."""
    batch, prompt, shortest, longest = parse_shape(shape) or (0, 0, 0, 0)
    return Work(stage, batch, prompt, shortest, longest, **SIZES[size])


def costs(work: Work) -> dict[str, float]:
    """TFLOP of products, GB of weights that are read, and of the cache of keys and values.

    decode: each prompt once, each completion token once; each step reads all weights and all columns of the cache.
    update: of a token, the forward pass of policy and anchor takes 2 FLOP a weight each, the backward pass 4; the head
    sees completions only.
    """
    layers, head = weights(work)
    new = work.batch * work.longest
    if work.stage == "decode":
        prompts = work.batch // work.samples * work.prompt
        column = 2 * work.layers * work.kv_heads * work.sizes[5] * work.batch
        return {
            "tflop": 2 * (layers * (prompts + new) + head * new) / 1e12,
            "weights_gb": 4 * (layers + head) * work.longest / 1e9,
            "cache_gb": 4 * column * (work.prompt + work.longest) * work.longest / 1e9,
        }
    tflop = 8 * (layers * (work.batch * work.prompt + new) + head * new) / 1e12
    return {"tflop": tflop, "weights_gb": 4 * (layers + head) / 1e9}


def fit(points: list[dict[str, float]]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names of the terms, seconds per unit of each, and the relative error of each point."""
    names = [name for name in points[0] if name != "seconds"]
    terms = np.array([[point[name] for name in names] for point in points])
    seconds = np.array([point["seconds"] for point in points])
    found, _ = optimize.nnls(terms / seconds[:, None], np.ones(len(points)))
    return names, found, terms @ found / seconds - 1
