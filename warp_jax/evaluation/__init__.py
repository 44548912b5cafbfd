"""Measuring policies on held-out prompts, comparing fronts, and the report."""
