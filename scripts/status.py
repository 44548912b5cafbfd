"""The command `warp-jax status`: see warp_jax/commands/status.py."""

from warp_jax import commands

commands.run("status")
