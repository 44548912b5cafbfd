"""Answers and benchmarks of exported policies."""
