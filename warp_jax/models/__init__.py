"""The language model: one decoder-only transformer."""
