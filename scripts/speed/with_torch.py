"""The same stages in transformers and torch, for scripts/benchmark.py."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import transformers
from protocol import EMA_RATE, KL_COEF, LEARNING_RATE, Work, serve


def make(work: Work) -> Callable[[], Any]:
    """Return the stage in transformers and torch: generate, and REINFORCE with an anchor written by hand."""
    config = transformers.LlamaConfig(
        vocab_size=work.vocab,
        hidden_size=work.width,
        num_hidden_layers=work.layers,
        num_attention_heads=work.heads,
        num_key_value_heads=work.kv_heads,
        intermediate_size=work.mlp,
        tie_word_embeddings=True,
        eos_token_id=None,
        pad_token_id=0,
        dtype="float32",
    )
    torch.manual_seed(0)
    policy = transformers.LlamaForCausalLM(config)
    anchor = copy.deepcopy(policy).requires_grad_(requires_grad=False)
    optimizer = torch.optim.Adam(policy.parameters(), lr=LEARNING_RATE)
    prompts = torch.randint(work.vocab, (work.batch // work.samples, work.prompt)).repeat_interleave(work.samples, 0)
    completions = torch.randint(work.vocab, (work.batch, work.new))
    rewards = torch.arange(work.batch, dtype=torch.float32)

    @torch.no_grad()
    def decode() -> Any:
        options: dict[str, Any] = {"max_new_tokens": work.new, "min_new_tokens": work.new}
        mask = torch.ones_like(prompts)
        ids = policy.generate(prompts, attention_mask=mask, do_sample=True, top_k=0, top_p=1.0, **options)
        return ids[:, work.prompt :]

    def logps(model: Any, completions: Any) -> Any:
        ids = torch.cat([prompts, completions], dim=1)
        logits = model(ids[:, :-1], logits_to_keep=work.new, use_cache=False).logits
        return -torch.nn.functional.cross_entropy(logits.transpose(1, 2), completions, reduction="none")

    def update(completions: Any) -> None:
        with torch.no_grad():
            anchored = logps(anchor, completions)
        scored = logps(policy, completions)
        shaped = rewards - KL_COEF * (scored - anchored).sum(1).detach()
        groups = shaped.reshape(-1, work.samples)
        others = (groups.sum(1, keepdim=True) - groups) / (work.samples - 1)
        loss = -((groups - others).reshape(-1) * scored.sum(1)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for old, new in zip(anchor.parameters(), policy.parameters(), strict=True):
                old.lerp_(new, EMA_RATE)

    @torch.no_grad()
    def score() -> Any:
        return logps(policy, completions)

    return {
        "decode": decode,
        "score": score,
        "update": lambda: update(completions),
        "rl_step": lambda: update(decode()),
    }[work.stage]


if __name__ == "__main__":
    serve(make)
