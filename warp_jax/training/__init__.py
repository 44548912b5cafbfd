"""Sampling, scoring and optimising policies."""
