"""Sampling completions: drawing of tokens, prefill and decoding, continuous batching."""
