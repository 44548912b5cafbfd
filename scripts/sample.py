"""The command `warp-jax sample`: see warp_jax/commands/sample.py."""

from warp_jax import commands

commands.run("sample")
