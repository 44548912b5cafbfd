"""The command `warp-jax sweep`: see warp_jax/commands/sweep.py."""

from warp_jax import commands

commands.run("sweep")
