"""`python -m warp_jax.commands`, the same as warp-jax."""

from warp_jax import commands

commands.main()
