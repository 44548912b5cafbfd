"""The command `warp-jax merge`: see warp_jax/commands/merge.py."""

from warp_jax import commands

commands.run("merge")
