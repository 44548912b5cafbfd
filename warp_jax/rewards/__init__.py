"""Reward functions: learned, from a folder, on decoded text, and the gold reward."""
