"""Evaluating policies on held-out prompts, comparing their fronts, and the report."""
