"""Protocol of the programs that scripts/benchmark.py starts: run a stage of training for each line of input.

Completions of mixed length: nobody can choose the length of a completion, so a stop token is made as likely as needed.
"""

import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

LEARNING_RATE, EMA_RATE, KL_COEF = 1e-6, 0.01, 0.1
STOP = 0  # the token that ends a completion of mixed length; pads too
NEVER, ALWAYS = -1e4, 1e4  # log-odds that round to the probabilities 0 and 1
THREADS = len(os.sched_getaffinity(0))
SHAPE = re.compile(r"([1-9]\d*)x([1-9]\d*)\+(?:([1-9]\d*)-)?([1-9]\d*)")
Facts = Mapping[str, float]  # of a run: `tokens` of all completions, `generate_s`, seconds of that part of a step


class Work(NamedTuple):
    """Work of a program: sequences of a model like SmolLM2-135M, in float32."""

    stage: str  # decode, score, update, rl_step, merge or evaluate (of 1,024 prompts; warp_jax only)
    batch: int
    prompt: int  # tokens of each prompt
    shortest: int  # tokens of a completion: lengths are drawn evenly from shortest to longest
    longest: int
    samples: int = 2  # completions of each prompt
    trained_layers: int = 0  # the last so many layers are trained; 0 = all weights (warp_jax only)
    is_plain: bool = False  # without WARP's average: the anchor is fixed (warp_jax only)
    vocab: int = 49152
    width: int = 576
    layers: int = 30
    heads: int = 9
    kv_heads: int = 3
    mlp: int = 1536

    @property
    def is_mixed(self) -> bool:
        """True if completions differ in length."""
        return self.shortest < self.longest

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int, int]:
        """Vocabulary, width, layers, heads, key-value heads, head size and mlp width."""
        head = self.width // self.heads
        return self.vocab, self.width, self.layers, self.heads, self.kv_heads, head, self.mlp


def parse_shape(shape: str) -> tuple[int, int, int, int] | None:
    """Batch, prompt, shortest and longest completion of a shape such as 16x32+64 or 16x32+16-64; None if it is none."""
    found = SHAPE.fullmatch(shape)
    if not found or (found[3] and int(found[3]) > int(found[4])):
        return None
    return int(found[1]), int(found[2]), int(found[3] or found[4]), int(found[4])


def stop_log_odds(work: Work) -> list[float]:
    """Log-odds of the stop token at each token of a completion that has not ended before: [longest].

    At token t, counted from 1, the probability is 0 below `shortest`, else 1 / (longest + 1 - t). So every length from
    shortest to longest is equally likely.
    """
    left = range(work.longest - 1, -1, -1)  # tokens that may follow
    return [
        NEVER if t < work.shortest else (-math.log(after) if after else ALWAYS) for t, after in enumerate(left, start=1)
    ]


class Clock:
    """Times the runs of a stage. Prints one JSON object a run: its seconds, the peak memory so far, and its facts."""

    def __init__(self) -> None:
        self._began = time.perf_counter()

    def tick(self, facts: Facts) -> None:
        """End a run, and wait for the line that starts the next one; exit if there is none."""
        seconds = time.perf_counter() - self._began
        print(json.dumps({"seconds": seconds, "peak_bytes": peak_bytes(), **facts}), flush=True)
        if not sys.stdin.readline():
            sys.exit()
        self._began = time.perf_counter()


def peak_bytes() -> int:
    """Largest resident memory of this process. The peak that getrusage knows may be that of the parent process."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def work_of_arguments() -> Work:
    """The work that the first argument describes."""
    return Work(**json.loads(sys.argv[1]))


def serve(make: Callable[[Work], Callable[[], Facts]]) -> None:
    """Make the stage of the first argument and run it once, unasked; then run it for each line of standard input."""
    run, clock = make(work_of_arguments()), Clock()
    while True:
        clock.tick(run())
