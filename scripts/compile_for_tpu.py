"""The command `warp-jax compile`: see warp_jax/commands/compile_for_tpu.py."""

from warp_jax import commands

commands.run("compile")
