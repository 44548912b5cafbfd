"""Toy programs compiled for real TPU topologies."""

import importlib.util
import json
import math
import os
import re
import shlex

import jax
import numpy as np
import pytest

from tests.commands import run, script_command
from tests.settings_of import settings_of
from warp_jax.models import apply, partitioning
from warp_jax.models.transformer import TransformerConfig
from warp_jax.parallel import meshes
from warp_jax.tpu_fit import compile

if importlib.util.find_spec("libtpu") is None:
    pytest.skip("libtpu is not installed: pip install 'warp_jax[tpu-aot]'", allow_module_level=True)

os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_LOG_DIR": "disabled", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

from jax.experimental import topologies

SIZES = {"width": 256, "num_heads": 4, "num_kv_heads": 2, "head_dim": 128, "mlp_dim": 512, "num_layers": 2}
RL = ("start of a run", compile.COPY, "generation", "reward", "update", "KL to SFT", "Gram matrix", "merge", "LITI")
NAMES = (*RL, "SFT step", "reward model step")
SETTINGS = {
    "mesh": (1, 2, 2),
    "tokenizer.vocab_size": 512,
    "model.dtype": "bfloat16",
    "model.remat": "full",
    "model.logits_chunk": 64,
    "sampling.prompt_tokens": 128,
    "sampling.max_new_tokens": 128,
    "rl.batch_size": 8,
    "rl.num_microbatches": 2,
    "evaluation.batch_size": 8,
    "evaluation.dtype": "bfloat16",
    **{f"model.architecture.{name}": size for name, size in SIZES.items()},
}


def _config(**settings):
    return settings_of({**SETTINGS, **settings})


def _plan(topology, config, **options):
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
    return compile.make_plan(config, devices)


@pytest.fixture(autouse=True)
def _strict_promotion():
    """Overrides the strict one of conftest.py: optax raises a float to an integer power."""


@pytest.fixture(scope="module")
def toy():
    """The plan of a toy config on four chips, and all its programs, compiled."""
    plan = _plan("v5e:2x2", _config())
    return plan, {program.name: compile.compile_program(program) for program in plan.programs}


def _bytes(tree):
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree) if hasattr(x.dtype, "itemsize"))


def test_every_program_of_the_loop_is_compiled(toy):
    """Fails when a program is left out, or one of them does not compile for TPU."""
    _, compiled = toy
    assert tuple(compiled) == NAMES
    assert not [c.error for c in compiled.values() if c.error]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_replicated_by_accident(toy, name):
    """Fails when a rule leaves an axis out, or a program asks for an argument whole on every chip."""
    plan, compiled = toy
    program = next(p for p in plan.programs if p.name == name)
    chips = plan.mesh.shape["tensor"] if name == "generation" else plan.mesh.size  # its copy is whole along fsdp
    assert compiled[name].arguments == pytest.approx(_bytes(program.args) / chips, rel=0.02)


def test_generation_moves_no_weights(toy):
    """Fails when a weight is gathered for a token: more would be sent than the activations of its rows."""
    plan, compiled = toy
    model = SIZES | {"rows": 4, "bytes": 2}
    activations = model["rows"] * model["width"] * model["bytes"]
    moved = sum(t.bytes for t in compiled["generation"].traffic.per_loop_step.values())
    assert 0 < moved < 8 * SIZES["num_layers"] * activations
    gathered = sum(t.bytes for t in compiled[compile.COPY].traffic.once.values())
    largest = max(compile.chip_bytes(leaf) for leaf in jax.tree.leaves(plan.resident[compile.COPY]))
    assert gathered == largest / 2  # half of the leaf is on the chip already


def test_attention_of_the_update_is_the_splash_kernel(toy):
    """Fails when whole sequences of a size that the kernel takes go through the plain attention."""
    plan, _ = toy
    update = next(p for p in plan.programs if p.name == "update")
    assert "splash" in update.call.lower(*update.args).as_text()


def test_a_mesh_over_two_slices():
    """Fails when an axis other than data goes over the network between slices."""
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2", num_slices=2)
    mesh = meshes.make_mesh((2, 2, 2), topology.devices)
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    assert {len(set(block.flat)) for block in slices} == {1}
    assert len(set(slices.flat)) == 2


def test_too_large_is_refused_with_a_setting_that_fits(tmp_path):
    """Fails when a program that does not fit passes, or what is suggested does not fit either: the copy for generation
    of 3.5e9 embedding weights, of which XLA refuses a whole one on each chip, and half of one fits.
    """
    config = {
        "mesh": (1, 4, 1),
        "model.trainable": "layers/0/",
        "rewards.sentiment.weight": 0.0,
        "rewards.length.weight": 1.0,
        "tokenizer.vocab_size": 860_160,
        "model.architecture.width": 4096,
    }
    flags = [f"--config.{name}={value}".replace(" ", "") for name, value in {**SETTINGS, **config}.items()]
    out = tmp_path / "fit.json"
    command = script_command(
        "compile_for_tpu.py", "--config=configs/tiny.py", "--topology=v5e:2x2", f"--programs={compile.COPY}", *flags
    )
    result = run([*command, f"--json={out}"])
    assert result.returncode == 3, result.stderr
    assert f"DOES NOT FIT: {compile.COPY}" in result.stdout
    assert f"{compile.COPY} alone is too large" in result.stdout
    assert json.loads(out.read_text())["suggestion"] == {"mesh": [1, 2, 2]}
    _, _, advice = result.stdout.rpartition("It fits with ")
    kept = [flag for flag in command if not flag.startswith("--config.mesh=")]  # given twice, tuples become one
    again = run([*kept, *shlex.split(advice)])
    assert again.returncode == 0, again.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--topology=v5e:3x4"], "topology: v5e:3x4"),
        (["--topology=v5e:2x2", "--mesh=4,1", "--config.rl.num_microbatches=4"], "rl.batch_size: got 8"),
    ],
)
def test_bad_input_is_refused(flags, message):
    """Fails with a traceback of libtpu or of a sharding, or with the verdict that all fits."""
    result = run(script_command("compile_for_tpu.py", "--config=configs/tiny.py", *flags))
    assert (result.returncode, result.stderr.count("error: ")) == (2, 1)
    assert message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "lm_head"])
def test_no_logit_of_a_tpu_is_rounded(tied):
    """Fails when the head's product comes out in bfloat16 on a v5e, and is widened after."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    mesh = meshes.make_mesh((1, 2, 2), devices)
    model = TransformerConfig(vocab_size=768, dtype="bfloat16", tied_head=tied, **SIZES)
    params = partitioning.with_shardings(mesh, apply.param_shapes(model))
    rows = jax.ShapeDtypeStruct((2, 16), np.int32, sharding=meshes.batch_sharding(mesh))
    mask = jax.ShapeDtypeStruct((2, 16), bool, sharding=meshes.batch_sharding(mesh))
    text = jax.jit(apply.make_apply_fn(model, mesh)).lower(params, rows, mask).compile().as_text()
    shapes = r"\[(?:1,16|16),384\]"  # one row of 16 tokens and half of the vocabulary on each chip
    assert re.search(rf"= f32{shapes}", text)
    assert not re.search(rf"= bf16{shapes}", text)


def test_evaluation_in_float32_is_planned():
    """Fails when a plan has the memory of a bfloat16 evaluation for a float32 one."""
    plans = [_plan("v5e:2x2", _config(**{"evaluation.dtype": dtype})) for dtype in ("bfloat16", "float32")]
    names = [[program.name for program in plan.programs] for plan in plans]
    copy, generation = f"{compile.COPY}{compile.EVALUATION}", f"generation{compile.EVALUATION}"
    assert set(names[1]) - set(names[0]) == {copy}
    programs = {program.name: program for program in plans[1].programs}
    kinds = [
        {leaf.dtype.name for leaf in jax.tree.leaves(programs[name].args[0])} for name in (generation, "generation")
    ]
    assert kinds == [{"float32"}, {"float32", "bfloat16"}]
