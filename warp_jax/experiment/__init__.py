"""Algorithm 1 of WARP in one workdir."""
