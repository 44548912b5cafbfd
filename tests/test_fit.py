"""Whether programs fit, on eight devices that are here: sums by hand, and the search for a setting that fits."""

import jax
import pytest
from jax.sharding import AbstractMesh

from configs import gemma_7b, tiny
from warp_jax import aot, architecture, sharding, validation


def _config(**settings):
    config = tiny.get_config()
    config.update_from_flattened_dict({"mesh": (2, 2, 2), **settings})
    return config


def _plan(config):
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:8])
    return aot.make_plan(config, mesh, *architecture.planned(config))


REFUSED = {"rl.batch_size": 10, "rl.num_microbatches": 4, "rl.samples_per_prompt": 16, "evaluation.batch_size": 2}


@pytest.mark.parametrize(("path", "value"), REFUSED.items(), ids=str)
def test_what_the_program_refuses_is_not_planned(path, value):
    """Fails when a config that warp_jax.main refuses is said to fit."""
    with pytest.raises(ValueError, match=r"want a multiple of"):
        _plan(_config(**{path: value}))


def test_the_checks_are_of_the_mesh_that_is_planned():
    """Fails when a batch is checked against the devices that are here: 128 completions in 4 parts over 64 chips."""
    config = gemma_7b.get_config()
    validation.check_values(config, AbstractMesh((1, 32, 8), sharding.AXES))
    with pytest.raises(ValueError, match=r"rl.batch_size: got 128, want a multiple of 256"):
        validation.check_values(config, AbstractMesh((1, 64, 8), sharding.AXES))
