"""Protocol of the programs that scripts/benchmark.py starts: run a stage of training for each line of input."""

import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

LEARNING_RATE, EMA_RATE, KL_COEF = 1e-6, 0.01, 0.1


class Work(NamedTuple):
    """Work of a program: sequences of `prompt` + `new` tokens of a model like SmolLM2-135M, in float32."""

    stage: str  # decode, score, update, rl_step or evaluate (of 1,024 prompts; warp_jax only)
    batch: int
    prompt: int
    new: int
    samples: int = 2  # completions of each prompt
    trained_layers: int = 0  # the last so many layers are trained; 0 = all weights (warp_jax only)
    vocab: int = 49152
    width: int = 576
    layers: int = 30
    heads: int = 9
    kv_heads: int = 3
    mlp: int = 1536


def serve(make: Callable[[Work], Callable[[], Any]]) -> None:
    """Make the stage of the first argument and run it once; then run it for each line of standard input.

    Prints one JSON object a run, with its seconds and the peak memory so far.
    """
    run = make(Work(**json.loads(sys.argv[1])))
    run()
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        run()
        seconds = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": seconds, "peak_bytes": peak}), flush=True)
