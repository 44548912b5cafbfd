"""The command `warp-jax best-of-n`: see warp_jax/commands/best_of_n.py."""

from warp_jax import commands

commands.run("best-of-n")
