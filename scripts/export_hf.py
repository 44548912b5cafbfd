"""The command `warp-jax export`: see warp_jax/commands/export.py."""

from warp_jax import commands

commands.run("export")
