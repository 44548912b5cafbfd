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
    advice = fit.advice({"model.remat": "full", "mesh": (1, 4, 16)})
    assert advice == "It fits with --config.model.remat=full '--config.mesh=(1,4,16)'"
    assert "No nearby setting" in fit.advice(None)


MODEL_NAMES = ("start of a run", "generation", "reward", "update", "KL to SFT")


def _search(monkeypatch, settings, needs, **options):
    """`fit.search` for a limit of 1 byte where a program needs needs(name, config); at most two chips along tensor."""
    tried = []

    def make_plan(config):
        tried.append(config)
        assert len(tried) < 100
        validation.check_values(config, AbstractMesh(tuple(config.mesh), sharding.AXES))
        if config.mesh[2] > 2:
            raise ValueError("tensor")
        same = config.evaluation.batch_size == config.rl.batch_size
        names = [*MODEL_NAMES, *([] if same else ["generation (evaluation)", "reward (evaluation)"])]
        programs = tuple(aot.Program(name, config, (), ()) for name in names)
        return aot.Plan(AbstractMesh(tuple(config.mesh), sharding.AXES), programs, {})

    def compile_program(plan, program):
        size = needs(program.name, program.call)
        return aot.Compiled(program.name, 0.0, 0, 0, size, 0, aot.NO_TRAFFIC)

    monkeypatch.setattr(fit, "compile_program", compile_program)
    config = _config(**settings)
    names = options.get("names", [])
    failing = fit.check(make_plan(config), 1, names, lambda done: None).failing
    found = fit.search(config, make_plan, failing, 1, on_program=lambda done: None, **options)
    return found, len(tried) - 1


def _fits_if(failing, condition):
    return lambda name, config: 2 if name == failing and not condition(config) else 1


SMALL = {"mesh": (1, 2, 2), "rl.batch_size": 16, "rl.samples_per_prompt": 4, "evaluation.batch_size": 16}
TWICE, FOUR_TIMES = {"rl.num_microbatches": 2}, {"rl.num_microbatches": 4}
REMAT, CHUNK = {"model.remat": "full"}, {"model.logits_chunk": 64}
HALF, QUARTER = {"rl.batch_size": 8}, {"rl.batch_size": 4}


@pytest.mark.parametrize(
    ("failing", "wanted", "changes"),
    [
        ("update", REMAT, REMAT),
        ("update", TWICE, REMAT | TWICE),
        ("update", FOUR_TIMES, REMAT | FOUR_TIMES),
        ("update", CHUNK, REMAT | {"rl.num_microbatches": 8} | CHUNK),
        ("KL to SFT", CHUNK, CHUNK),
        ("KL to SFT", {"evaluation.batch_size": 4}, CHUNK | {"evaluation.batch_size": 4}),
        ("generation (evaluation)", {"evaluation.batch_size": 4}, {"evaluation.batch_size": 4}),
        ("generation", HALF, HALF),
        ("reward", QUARTER, QUARTER),
    ],
    ids=str,
)
def test_the_search_first_leaves_the_experiment_as_it_is(monkeypatch, failing, wanted, changes):
    """Fails when a kind of change is gone, comes in another order, or is not repeated while it helps."""
    settings = SMALL | ({"evaluation.batch_size": 8} if failing.endswith("(evaluation)") else {})

    def is_wanted(config):
        return all(config[path.split(".")[0]][path.split(".")[1]] == value for path, value in wanted.items())

    assert _search(monkeypatch, settings, _fits_if(failing, is_wanted))[0] == changes


def test_the_mesh_comes_before_the_batch(monkeypatch):
    """Fails when weights are not spread over more chips along tensor first, which leaves the experiment as it is."""
    needs = _fits_if("generation", lambda config: config.rl.batch_size == 8)
    found, tries = _search(monkeypatch, SMALL | {"mesh": (1, 4, 1)}, needs)
    assert (found, tries) == ({"mesh": (1, 2, 2), "rl.batch_size": 8}, 3)  # and one refused: tensor 4


def test_a_refused_mesh_is_not_kept(monkeypatch):
    """Fails when the search goes on from a mesh that does not suit the model: no batch would be good there."""
    found, tries = _search(monkeypatch, SMALL, _fits_if("generation", lambda config: config.rl.batch_size == 8))
    assert (found, tries) == (HALF, 2)


def test_suggested_batches_are_those_that_the_program_accepts(monkeypatch):
    """Fails when a batch is offered that does not divide by mesh, microbatches and samples of a prompt."""
    tried = []

    def never(name, config):
        tried.append((config.rl.batch_size, config.rl.num_microbatches))
        return 2 if name == "generation" else 1

    found, _ = _search(monkeypatch, SMALL | FOUR_TIMES, never)
    assert found is None
    assert sorted(set(tried), reverse=True) == [(16, 4), (8, 4), (4, 2)]  # 2 completions are no 4 samples


def test_a_search_without_an_end_is_given_up(monkeypatch):
    """Fails when microbatches double for ever, or tries, each of minutes, have no bound."""
    nothing = _fits_if("update", lambda config: False)
    assert _search(monkeypatch, SMALL, nothing) == (
        None,
        8,
    )  # remat, 2, 4, 8, 16 pieces (refused), logits, 16 pieces, mesh
    many = SMALL | {"rl.batch_size": 2**20, "rl.samples_per_prompt": 2}
    assert _search(monkeypatch, many, nothing) == (None, fit.MOST_TRIES)


def test_every_program_must_fit_after_a_change(monkeypatch):
    """Fails when a change that makes another program too large is taken for a solution."""

    def needs(name, config):
        if name == "KL to SFT":
            return 2 if config.model.remat == "full" and config.evaluation.batch_size > 8 else 1
        return 2 if name == "update" and config.model.remat != "full" else 1

    found, _ = _search(monkeypatch, SMALL | CHUNK, needs)
    assert found == REMAT | {"evaluation.batch_size": 8}
    found, _ = _search(monkeypatch, SMALL | CHUNK, needs, names=["update"])
    assert found == REMAT


def test_a_program_that_gets_a_twin_is_not_lost(monkeypatch):
    """Fails when the batch of evaluation becomes that of training, and nothing of the name that failed is compiled."""

    def needs(name, config):
        rows = config.evaluation.batch_size if name == "generation (evaluation)" else config.rl.batch_size
        return 2 if name == "update" or (name.startswith("generation") and rows > 8) else 1

    found, _ = _search(monkeypatch, SMALL | {"evaluation.batch_size": 32}, needs, names=["generation (evaluation)"])
    assert found == {"evaluation.batch_size": 8, "rl.batch_size": 8}
