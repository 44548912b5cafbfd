"""The command `warp-jax compare`: see warp_jax/commands/compare.py."""

from warp_jax import commands

commands.run("compare")
