"""Config files; each has get_config(). Import them from warp_jax.configs, which a wheel has too (docs/commands.md)."""
