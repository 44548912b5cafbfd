"""Typed settings: a config, validated once, before anything is written."""

from warp_jax.settings.settings import Settings, check_devices, from_config, from_saved

__all__ = ["Settings", "check_devices", "from_config", "from_saved"]
