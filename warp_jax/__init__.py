"""WARP (Weight Averaged Rewarded Policies, arXiv 2406.16768) in JAX and Flax."""
