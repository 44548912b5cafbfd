"""Plans on eight simulated devices: memory by hand, and the search for a setting that fits."""

import functools
import operator
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from configs import gemma_7b
from tests.settings_of import settings_of
from warp_jax.parallel import meshes
from warp_jax.settings import check_devices
from warp_jax.tpu_fit import compile, memory
from warp_jax.training import supervised


def _config(**settings):
    return settings_of({"mesh": (2, 2, 2), **settings})


def _plan(config):
    return compile.make_plan(config, jax.devices()[:8])


REFUSED = {"rl.batch_size": 10, "rl.num_microbatches": 4, "rl.samples_per_prompt": 16, "evaluation.batch_size": 2}


@pytest.mark.parametrize(("path", "value"), REFUSED.items(), ids=str)
def test_what_the_program_refuses_is_not_planned(path, value):
    """Fails when a config that warp_jax.main refuses is said to fit."""
    with pytest.raises(ValueError, match=r"want a multiple of"):
        _plan(_config(**{path: value}))


def test_the_checks_are_of_the_mesh_that_is_planned():
    """Fails when a batch is checked against the devices that are here: 128 completions in 4 parts over 64 chips."""
    settings = settings_of({"rl.num_microbatches": 4}, gemma_7b)
    check_devices(settings, meshes.batch_devices(AbstractMesh((1, 32, 8), meshes.AXES)))
    with pytest.raises(ValueError, match=r"rl.batch_size: got 128, want a multiple of 256"):
        check_devices(settings, meshes.batch_devices(AbstractMesh((1, 64, 8), meshes.AXES)))


# Bytes per chip of configs/tiny.py on mesh 2, 2, 2: matrices are split over fsdp and tensor, keys and values (one
# head) over fsdp, norms not at all.
EMBED, QO, KV, MLP, NORMS = 300 * 16, 2 * 16 * 16, 2 * 16 * 8, 3 * 16 * 32, 5 * 16
POLICY = 4 * (EMBED / 4 + 2 * (QO + MLP) / 4 + 2 * KV / 2 + NORMS)
COPY = 4 * (EMBED / 2 + 2 * (QO + MLP) / 2 + 2 * KV + NORMS)
SAMPLED = 4 * 5 + 4 + 6 * 9 + 4 * 10 * 16  # of an evaluation: a prompt, a completion and the states of both
RESIDENT = {
    "policy": POLICY,
    "anchor": POLICY,
    "Adam moments": 2 * POLICY + 8,  # and two counters of steps
    "init": POLICY,
    "SFT": POLICY,
    "frozen weights": 0,
    compile.COPY: COPY,
    "reward model": POLICY + 4 * 16 / 2,
    "frozen weights of the reward model": 0,
}
SUPERVISED = ("SFT step", "reward model step")


@pytest.fixture(scope="module")
def plan():
    """The plan of configs/tiny.py on eight devices."""
    return _plan(_config())


def test_updates_of_different_runs_are_planned():
    """Fails when the update of a run with settings of its own is left out, or an equal one is compiled twice."""
    runs = {"rl.whiten": True}, {}, {"seed": 4}, {"rl.whiten": True, "seed": 7}
    plan = _plan(_config(**{"warp.num_runs": 4, "warp.runs": runs}))
    assert [p.name for p in plan.programs if p.name.startswith("update")] == ["update", "update (run 2)"]


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_an_update_gets_the_rollout_that_is_sampled(top_p):
    """Fails when the bits of the kept tokens are left out of the update, or have another shape."""
    programs = {program.name: program for program in _plan(_config(**{"sampling.top_p": top_p})).programs}
    generation, update = programs["generation"], programs["update"]
    sampled, planned = jax.eval_shape(generation.call, *generation.args), update.args[2]
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(sampled)] == [
        (x.shape, x.dtype) for x in jax.tree.leaves(planned)
    ]
    assert (planned.allowed is None) == (top_p == 1)


def _co_resident(plan):
    return {p.name: compile.chip_bytes(p.co_resident) for p in plan.programs}


def test_what_is_alive_by_hand(plan):
    """Fails when a tree is left out, or is taken as split along an axis that it is whole on."""
    assert {name: compile.chip_bytes(tree) for name, tree in plan.resident.items()} == RESIDENT


def test_co_resident_memory_of_each_program_by_hand(plan):
    """Fails when something alive is forgotten, or an argument counts twice."""
    every = sum(RESIDENT.values())
    between = RESIDENT["SFT"] + RESIDENT["reward model"]
    assert _co_resident(plan) == {
        "start of a run": between,
        compile.COPY: every - max(4 * EMBED / 2, 4 * 2 * 16 * 32 / 2) - 4 * NORMS,
        "generation": every - COPY,
        "reward": every - RESIDENT["reward model"],
        "generation (evaluation)": every - COPY,
        "reward (evaluation)": every - RESIDENT["reward model"],
        "update": every - 4 * POLICY - 8,
        "KL to SFT": every - 2 * POLICY + 2 * 16 / 4 * SAMPLED,  # two batches of 16 in a call
        "Gram matrix": between,
        "merge": between,
        "LITI": between,
        "SFT step": RESIDENT["SFT"],  # the weights that it started from
        "reward model step": between,
    }


def test_held_out_texts_are_planned_if_there_are_any(plan):
    """Fails when they are forgotten, or have the length or number of completions."""
    texts = {"evaluation.text": "held_out.jsonl", "evaluation.text_rows": 32, "evaluation.text_tokens": 24}
    (program,) = [p for p in _plan(_config(**texts)).programs if p.name == f"held-out texts{compile.EVALUATION}"]
    assert compile.chip_bytes(program.args) == POLICY + 16 / 4 * 24 * 5  # ids and mask of a batch
    assert compile.chip_bytes(program.co_resident) == sum(RESIDENT.values()) - POLICY
    program.call.lower(*program.args)
    assert program.name not in [p.name for p in plan.programs]


def test_supervised_stages_are_planned_where_they_run(plan):
    """Fails when a stage before RL is not checked, or gets another batch than the loss takes, or has no moments."""
    steps = {p.name: p for p in plan.programs if p.name in SUPERVISED}
    assert {name: compile.chip_bytes(step.args) for name, step in steps.items()} == {
        "SFT step": 3 * POLICY + 8 + 8 / 4 * 16 * 5,  # ids and mask of two rows of 16 tokens
        "reward model step": 3 * RESIDENT["reward model"] + 8 + 8 / 4 * (10 * 5 + 4),
    }
    for step in steps.values():
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer power
            step.call.lower(*step.args)


def test_supervised_stages_of_responses_get_their_batches():
    """Fails when the mask of the responses is not planned, or pairs get labels, so that another program is compiled."""
    fields = {"response_field": "answer", "chosen_field": "good", "rejected_field": "bad", "prompt_template": "{text}"}
    changes = {f"data.{name}": value for name, value in fields.items()} | {"reward_model.loss": "bradley_terry"}
    steps = {p.name: p for p in _plan(_config(**changes)).programs if p.name in SUPERVISED}
    for name, length in (("SFT step", 16), ("reward model step", 10)):
        batch = steps[name].args[-1]
        assert {key: (x.shape, x.dtype) for key, x in batch.items()} == {
            "token_ids": ((8, length), np.int32),
            "mask": ((8, length), np.bool_),
            supervised.COUNTED: ((8, length), np.bool_),
        }


def test_a_supervised_stage_has_moments_of_what_it_trains():
    """Fails when frozen weights get moments, or a reward model that a folder brings is trained."""
    plan = _plan(_config(**{"rewards.sentiment.source": "models/of_a_folder", "model.trainable": "layers/1/"}))
    assert compile.chip_bytes(plan.resident["reward model"]) == RESIDENT["reward model"]
    (step,) = [p for p in plan.programs if p.name in SUPERVISED]
    layer = 4 * ((QO + MLP) / 4 + KV / 2 + 2 * 16)
    assert compile.chip_bytes(step.args) == POLICY + 2 * layer + 8 + 8 / 4 * 16 * 5
    assert tuple(step.co_resident) == ("SFT",)


def test_frozen_weights_of_the_reward_model_count_once():
    """Fails when they are an argument of a program and co-resident too, or are forgotten."""
    plan = _plan(_config(**{"reward_model.trainable": "layers/1/|score"}))
    trained = 4 * ((QO + MLP) / 4 + KV / 2 + 2 * 16) + 4 * 16 / 2
    steps = {p.name: p for p in plan.programs}
    assert compile.chip_bytes(steps["reward model step"].args) == (
        RESIDENT["reward model"] + 2 * trained + 8 + 8 / 4 * (10 * 5 + 4)
    )
    assert _co_resident(plan)["reward model step"] == RESIDENT["SFT"] + trained
    assert _co_resident(plan)["reward"] == sum(RESIDENT.values()) - RESIDENT["reward model"]
    assert _co_resident(plan)["SFT step"] == RESIDENT["SFT"]


def test_without_a_copy_generation_reads_the_policy_itself():
    """Fails when the policy counts twice: as an argument of generation and as co-resident."""
    plan = _plan(_config(mesh=(4, 1, 2), **{"model.trainable": "layers/1/"}))
    generation = next(p for p in plan.programs if p.name == "generation")
    assert compile.COPY not in plan.resident
    assert tuple(generation.co_resident) == ("anchor", "Adam moments", "init", "SFT", *compile.REWARD)


def test_factors_are_planned_with_the_weights_that_they_make():
    """Fails when the policy is planned as whole weights, moments are those of weights, the update lacks the start of
    the run, generation reads factors, or SFT trains the targets alone.
    """
    plan = _plan(_config(**{"model.lora.rank": 4}))
    inputs, outputs = 4 * 16 + 2 * 16 + 32, 16 + 8 + 8 + 16 + 2 * 32 + 16  # q, k, v, o; gate and up; down
    factors = 4 * 4 * 2 * (inputs / 2 + (outputs - 16) / 2 + 16)  # rank 4; B of k and v is whole: one head
    kernels = 4 * (2 * (QO + MLP) / 4 + 2 * KV / 2)
    sizes = {name: compile.chip_bytes(tree) for name, tree in plan.resident.items()}
    assert sizes["anchor"] == sizes["init"] == sizes["SFT"] == sizes[compile.EXPANDED] == kernels
    assert sizes["frozen weights"] == POLICY - kernels
    assert sizes["policy"] == factors
    assert sizes["Adam moments"] == 2 * sizes["policy"] + 8
    steps = {p.name: p for p in plan.programs}
    every = sum(sizes.values())
    resident = {name: every - value for name, value in _co_resident(plan).items()}  # what a program reads, or is absent
    read = sizes["policy"] + sizes["anchor"] + sizes["Adam moments"] + sizes["frozen weights"] + sizes["init"]
    assert resident["update"] == read
    assert resident[compile.EXPANDED] == sizes["policy"] + sizes["init"] + sizes[compile.EXPANDED]
    read = sizes[compile.EXPANDED] + sizes["SFT"] + sizes["frozen weights"]
    assert resident["KL to SFT"] == read - 2 * 16 / 4 * SAMPLED
    assert compile.chip_bytes(steps["SFT step"].args) == 3 * POLICY + 8 + 8 / 4 * 16 * 5
    assert compile.chip_bytes(steps["SFT step"].co_resident) == POLICY
    with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer power
        for name in ("start of a run", compile.EXPANDED, "update"):
            steps[name].call.lower(*steps[name].args)


def test_names_can_be_given_in_a_list(plan):
    """Fails when a name has the comma that parts the names of --programs."""
    assert not [p.name for p in plan.programs if "," in p.name]


MODEL_NAMES = ("start of a run", "generation", "reward", "update", "KL to SFT", "SFT step")


def _search(monkeypatch, settings, needs, names=()):
    """Run `memory.search` with a limit of 1 byte, `needs(name, config)` bytes per program, and tensor at most 2."""
    tried = []

    def make_plan(config):
        tried.append(config)
        assert len(tried) < 100
        check_devices(config, meshes.batch_devices(AbstractMesh(config.mesh, meshes.AXES)))
        if config.mesh[2] > 2:
            raise ValueError("tensor")
        same = config.evaluation.batch_size == config.rl.batch_size
        names = [*MODEL_NAMES, *([] if same else ["generation (evaluation)", "reward (evaluation)"])]
        programs = tuple(compile.Program(name, config, (), {}) for name in names)
        return compile.Plan(AbstractMesh(tuple(config.mesh), meshes.AXES), programs, {})

    def compile_program(program):
        size = needs(program.name, program.call)
        return compile.Compiled(program.name, 0.0, 0, 0, size, 0, compile.NO_TRAFFIC)

    monkeypatch.setattr(memory, "compile_program", compile_program)
    config = _config(**settings)
    check_plan = functools.partial(memory.check, limit=1, on_program=lambda done: None)
    failing = check_plan(make_plan(config), names).failing
    found = memory.search(config, failing, names, make_plan=make_plan, check_plan=check_plan)
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
        ("SFT step", {"sft.num_microbatches": 2}, {"sft.num_microbatches": 2}),
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
        return all(operator.attrgetter(path)(config) == value for path, value in wanted.items())

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
    assert _search(monkeypatch, many, nothing) == (None, memory.MOST_TRIES)


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


def test_co_resident_memory_counts():
    """Fails when a program is judged by what XLA sees alone, or not by the limit, or not by what the compiler says."""
    fits = compile.Compiled("generation", 1.5, 1, 1, 4, 2, compile.NO_TRAFFIC)
    over = compile.Compiled("update", 61.0, 1, 0, 5, 2, compile.NO_TRAFFIC)
    refused_by_xla = compile.Compiled("merge", 2.0, 1, 0, 0, 1, compile.NO_TRAFFIC, "Used 9.0G of 4.0G hbm")
    found = memory.Fit((fits, over, refused_by_xla), {}, 6, 4)
    assert [fits.total, over.total] == [6, 7]
    assert found.failing == ["update", "merge"]
    assert found._replace(limit=5).failing == ["generation", "update", "merge"]
    assert found._replace(limit=7).failing == ["merge"]


class _Fake:
    """A jitted function whose compilation gives these bytes, or this error."""

    def __init__(self, error=""):
        self.error = error

    def lower(self, *args):
        return self

    def compile(self):
        if self.error:
            raise jax.errors.JaxRuntimeError(self.error)
        return self

    def memory_analysis(self):
        return types.SimpleNamespace(argument_size_in_bytes=7, temp_size_in_bytes=11, peak_memory_in_bytes=13)

    def as_text(self):
        return "HloModule empty\n\nENTRY main {\n  ROOT x = f32[] parameter(0)\n}\n"


@pytest.fixture
def small_plan():
    """Two programs with 32 and 48 co-resident bytes per chip: a row of 8 float32 is split over 4 chips, or whole."""
    mesh = meshes.make_mesh((2, 2, 2), jax.devices()[:8])
    split, whole = meshes.batch_sharding(mesh), meshes.replicated(mesh)
    arrays = {
        "split": jax.ShapeDtypeStruct((8, 2), jnp.float32, sharding=split),
        "whole": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=whole),
    }
    programs = [
        compile.Program("one", _Fake(), (arrays["split"],), {"whole": arrays["whole"]}),
        compile.Program("two", _Fake("RESOURCE_EXHAUSTED: too large"), (arrays["whole"],), arrays),
    ]
    return compile.Plan(mesh, tuple(programs), arrays)


def test_compiled_programs_are_weighed(small_plan):
    """Fails when co-resident memory is not added, or an out-of-memory error of the compiler ends the program."""
    heard = []
    found = memory.check(small_plan, limit=45, on_program=heard.append)
    one, two = found.programs
    assert (one.arguments, one.temporaries, one.peak, one.co_resident, one.total) == (7, 11, 13, 32, 45)
    assert (two.arguments, two.co_resident, two.error) == (32, 16 + 32, "RESOURCE_EXHAUSTED: too large")
    assert (found.resident, found.chips, found.limit) == ({"split": 16, "whole": 32}, 8, 45)
    assert heard == [one, two]
    one = memory.check(small_plan, ["one"], limit=44, on_program=heard.append)
    assert ([p.name for p in one.programs], one.failing) == (["one"], ["one"])
    with pytest.raises(ValueError, match="'three', want all, or some of: one, two"):
        memory.check_names(small_plan, ["one", "three"])


def test_other_errors_of_the_compiler_are_not_hidden():
    """Fails when a bug is reported as a program that is too large."""
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        compile.compile_program(compile.Program("one", _Fake("INTERNAL"), (), {}))
