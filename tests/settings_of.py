"""Typed settings for tests, from a config file with some values changed."""

from configs import tiny
from warp_jax.settings import Settings, from_config


def typed(config) -> Settings:
    """The settings of a ConfigDict."""
    return from_config(config.to_dict())


def settings_of(changes=None, module=tiny) -> Settings:
    """The settings of configs/tiny.py, or of another config, with changes such as {"rl.kl_coef": 0.2}."""
    return typed(module.get_config()).replace(changes or {})
