"""The same stages in transformers and torch, for scripts/benchmark.py."""

import copy
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from protocol import EMA_RATE, KL_COEF, LEARNING_RATE, STOP, THREADS, Facts, Work, serve, stop_log_odds

torch.set_num_threads(THREADS)
Tensors = Mapping[str, torch.Tensor]


class MixedLengths(transformers.LogitsProcessor):  # type: ignore[misc]  # the base class has no types
    """Give the stop token the probabilities of `stop_log_odds`."""

    def __init__(self, work: Work) -> None:
        self._prompt, self._log_odds = work.prompt, stop_log_odds(work)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Change the logits [B, V] of the token after input_ids [B, S]."""
        scores = scores.index_fill(1, torch.tensor([STOP]), -torch.inf)
        scores[:, STOP] = scores.logsumexp(1) + self._log_odds[input_ids.shape[1] - self._prompt]
        return scores


def generation_options(work: Work) -> dict[str, Any]:
    """Arguments of `generate` for completions of the lengths that are asked for."""
    if work.is_mixed:
        return {"logits_processor": transformers.LogitsProcessorList([MixedLengths(work)]), "eos_token_id": STOP}
    return {"min_new_tokens": work.longest}


def make_model(work: Work) -> transformers.LlamaForCausalLM:
    """The model with random weights."""
    config = transformers.LlamaConfig(
        vocab_size=work.vocab,
        hidden_size=work.width,
        num_hidden_layers=work.layers,
        num_attention_heads=work.heads,
        num_key_value_heads=work.kv_heads,
        intermediate_size=work.mlp,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=STOP,
        dtype="float32",
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def mask_of(work: Work, completions: torch.Tensor) -> torch.Tensor:
    """True up to and including the first stop token: bool [B, C]."""
    stops = (completions == STOP) if work.is_mixed else torch.zeros_like(completions, dtype=torch.bool)
    return stops.cumsum(1) - stops.long() == 0


class Training:
    """generate of transformers, and REINFORCE with an anchor written by hand."""

    def __init__(self, work: Work) -> None:
        self.work, self.policy = work, make_model(work)
        self.prompts = torch.randint(1, work.vocab, (work.batch // work.samples, work.prompt))
        self.prompts = self.prompts.repeat_interleave(work.samples, 0)
        self.completions = torch.randint(1, work.vocab, (work.batch, work.longest))
        if work.stage in ("update", "rl_step"):
            self.anchor = copy.deepcopy(self.policy).requires_grad_(requires_grad=False)
            self.optimizer = torch.optim.Adam(self.policy.parameters(), lr=LEARNING_RATE)

    def decode(self) -> tuple[torch.Tensor, Facts]:
        """Sample completions: int64 [B, C]."""
        began, work = time.perf_counter(), self.work
        options = {"max_new_tokens": work.longest, "do_sample": True, "top_k": 0, "top_p": 1.0}
        mask = torch.ones_like(self.prompts)
        with torch.no_grad():
            ids = self.policy.generate(self.prompts, attention_mask=mask, **options, **generation_options(work))
        completions = ids[:, work.prompt :]
        tokens = int(mask_of(work, completions).sum())
        return completions, {"tokens": tokens, "generate_s": time.perf_counter() - began}

    def score(self) -> Facts:
        """Score completions of full length."""
        with torch.no_grad():
            return {"tokens": self._logps(self.policy, self.completions).numel()}

    def update(self, completions: torch.Tensor) -> Facts:
        """One step on completions."""
        work, mask = self.work, mask_of(self.work, completions)
        with torch.no_grad():
            anchored = self._logps(self.anchor, completions)
        scored = self._logps(self.policy, completions)
        ratios = ((scored.detach() - anchored) * mask).sum(1)
        groups = (torch.arange(work.batch) - KL_COEF * ratios).reshape(-1, work.samples)
        others = (groups.sum(1, keepdim=True) - groups) / (work.samples - 1)
        loss = -((groups - others).reshape(-1) * (scored * mask).sum(1)).mean()
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            for old, new in zip(self.anchor.parameters(), self.policy.parameters(), strict=True):
                old.lerp_(new, EMA_RATE)
        return {"tokens": int(mask.sum()), "grad_norm": float(norm)}

    def step(self) -> Facts:
        """Sample, then update on what was sampled."""
        completions, facts = self.decode()
        return {**self.update(completions), **facts}

    def _logps(self, model: Any, completions: torch.Tensor) -> torch.Tensor:
        ids = torch.cat([self.prompts, completions], dim=1)
        logits = model(ids[:, :-1], logits_to_keep=completions.shape[1], use_cache=False).logits
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), completions.flatten(), reduction="none")
        return -losses.reshape(completions.shape)


def unit_of(name: str) -> str:
    """The layer of a tensor, or its own name."""
    before, is_layer, after = name.partition("layers.")
    return before + is_layer + after.partition(".")[0] if is_layer else name


def slerp(init: Tensors, first: Tensors, second: Tensors) -> dict[str, torch.Tensor]:
    """SLERP of two policies at weight 1/2, with one angle a layer, as anyone would write it."""
    units: dict[str, list[str]] = {}
    for name in init:
        units.setdefault(unit_of(name), []).append(name)
    merged = {}
    for names in units.values():
        one, two = (torch.cat([(p[name] - init[name]).flatten() for name in names]) for p in (first, second))
        angle = torch.arccos(torch.dot(one, two) / (one.norm() * two.norm()))
        both = (one + two) * torch.sin(angle / 2) / torch.sin(angle)
        parts = both.split([init[name].numel() for name in names])
        merged |= {name: init[name] + part.view_as(init[name]) for name, part in zip(names, parts, strict=True)}
    return merged


def make_merge(work: Work) -> Callable[[], Facts]:
    """Merge two policies near the initial weights."""
    init = dict(make_model(work).requires_grad_(requires_grad=False).named_parameters())
    policies = [{name: x + 2e-4 * torch.randn(x.shape) for name, x in init.items()} for _ in range(2)]

    def merge() -> Facts:
        return {"weights": sum(x.numel() for x in slerp(init, *policies).values())}

    return merge


def make(work: Work) -> Callable[[], Facts]:
    """Return the stage."""
    if work.stage == "merge":
        return make_merge(work)
    training = Training(work)
    return {
        "decode": lambda: training.decode()[1],
        "score": training.score,
        "update": lambda: training.update(training.completions),
        "rl_step": training.step,
    }[work.stage]


if __name__ == "__main__":
    serve(make)
