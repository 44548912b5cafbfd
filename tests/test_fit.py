"""Whether programs fit, on eight devices that are here: sums by hand, and the search for a setting that fits."""

import jax
import pytest
from jax.sharding import AbstractMesh

from configs import gemma_7b, tiny
from warp_jax import aot, architecture, fit, sharding, validation


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


# Of configs/tiny.py, bytes on a chip of mesh 2, 2, 2: matrices are split over fsdp and tensor, keys and values (one
# head) over fsdp, norms not at all.
EMBED, QO, KV, MLP, NORMS = 300 * 16, 2 * 16 * 16, 2 * 16 * 8, 3 * 16 * 32, 5 * 16
POLICY = 4 * (EMBED / 4 + 2 * (QO + MLP) / 4 + 2 * KV / 2 + NORMS)
COPY = 4 * (EMBED / 2 + 2 * (QO + MLP) / 2 + 2 * KV + NORMS)
RESIDENT = {
    "policy": POLICY,
    "anchor": POLICY,
    "Adam moments": 2 * POLICY + 8,  # and two counters of steps
    "init": POLICY,
    "SFT": POLICY,
    "frozen weights": 0,
    aot.COPY: COPY,
    "reward model": POLICY + 4 * 16 / 2,
}


@pytest.fixture(scope="module")
def plan():
    """Of configs/tiny.py on eight devices."""
    return _plan(_config())


def _beside(plan):
    return {p.name: sum(aot.chip_bytes(plan.resident[name]) for name in p.beside) for p in plan.programs}


def test_what_is_alive_by_hand(plan):
    """Fails when a tree is left out, or is taken as split along an axis that it is whole on."""
    assert {name: aot.chip_bytes(tree) for name, tree in plan.resident.items()} == RESIDENT


def test_what_is_beside_each_program_by_hand(plan):
    """Fails when something alive is forgotten, or an argument counts twice."""
    every = sum(RESIDENT.values())
    between = RESIDENT["SFT"] + RESIDENT["reward model"]
    assert _beside(plan) == {
        "start of a run": between,
        aot.COPY: every - POLICY,
        "generation": every - COPY,
        "reward": every - RESIDENT["reward model"],
        "generation (evaluation)": every - COPY,
        "reward (evaluation)": every - RESIDENT["reward model"],
        "update": every - 4 * POLICY - 8,
        "KL to SFT": every - 2 * POLICY,
        "merge": between,
        "LITI": between,
    }


def test_without_a_copy_generation_reads_the_policy_itself():
    """Fails when the policy counts as an argument of generation and as beside it."""
    plan = _plan(_config(mesh=(4, 1, 2), **{"model.trainable": "layers/1/"}))
    generation = next(p for p in plan.programs if p.name == "generation")
    assert aot.COPY not in plan.resident
    assert generation.beside == ("anchor", "Adam moments", "init", "SFT", "reward model")


def test_names_can_be_given_in_a_list(plan):
    """Fails when a name has the comma that parts the names of --programs."""
    assert not [p.name for p in plan.programs if "," in p.name]


def test_advice_is_for_a_shell():
    """Fails when brackets are not quoted, which a shell would read as its own."""
    advice = fit.advice([("model.remat", "full"), ("mesh", (1, 4, 16))])
    assert advice == "It fits with --config.model.remat=full '--config.mesh=(1,4,16)'"
    assert "No nearby setting" in fit.advice(None)
