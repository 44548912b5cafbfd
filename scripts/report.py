"""The command `warp-jax report`: see warp_jax/commands/report.py."""

from warp_jax import commands

commands.run("report")
