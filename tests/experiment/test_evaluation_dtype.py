"""Dtypes of the compiled programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.settings_of import settings_of
from warp_jax.evaluation import measure
from warp_jax.experiment import architecture, programs
from warp_jax.generation import sampling
from warp_jax.models import apply
from warp_jax.parallel import meshes
from warp_jax.settings import from_config
from warp_jax.training import reinforce
from warp_jax.types import PromptBatch

SETTINGS = settings_of()
MESH = meshes.make_mesh((1, 1, 1), jax.devices()[:1])


def _programs(model_dtype, evaluation_dtype):
    settings = settings_of({"model.dtype": model_dtype, "evaluation.dtype": evaluation_dtype})
    model = architecture.policy_config(settings.model, settings.vocab_size)
    params = apply.random_params(model, MESH, 0)
    return programs.make_programs(settings, MESH, model, trained=params, frozen={}, stop_ids=(2,), pad_id=0), params


@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")])
def test_evaluation_computes_in_its_own_dtype(dtypes):
    """Fails when the evaluation samples or scores in the dtype of the model, or is compiled twice for equal dtypes."""
    made, params = _programs(*dtypes)
    assert (made.evaluation_sampler is made.sampler) == (dtypes[0] == dtypes[1])
    kinds = [
        {leaf.dtype.name for leaf in jax.tree.leaves(jax.eval_shape(s.lay_out, params))}
        for s in (made.sampler, made.evaluation_sampler)
    ]
    assert [("bfloat16" in kind) for kind in kinds] == [dtype == "bfloat16" for dtype in dtypes]
    batch = PromptBatch(jnp.full((8, 4), 5, jnp.int32), jnp.ones((8, 4), bool), jnp.arange(8, dtype=jnp.int32))
    rollout = made.evaluation_sampler(params, batch, jax.random.key(0))
    other = apply.random_params(architecture.policy_config(SETTINGS.model, SETTINGS.vocab_size), MESH, 1)
    exact, _ = _programs("float32", "float32")
    kls = [np.asarray(p.kl_to_sft(other, params, {}, rollout)) for p in (made, exact)]
    assert (np.abs(kls[0] / kls[1] - 1).max() < 1e-6) == (dtypes[1] == "float32")


def test_every_program_has_its_dtype(monkeypatch):
    """Mutations: model, cache or weights of the evaluation's sampler in the dtype of training; sampler or scorer of
    training in the dtype of the evaluation."""
    monkeypatch.setattr(programs, "make_apply_fn", lambda model, mesh: model.dtype)
    monkeypatch.setattr(sampling, "make_sampler", lambda mesh, params, **options: options)
    monkeypatch.setattr(reinforce, "make_programs", lambda mesh, params, rule: rule)
    monkeypatch.setattr(measure, "make_kl_to_sft", lambda score_kl: score_kl)
    made, _ = _programs("bfloat16", "float32")
    for sampler, dtype in ((made.sampler, "bfloat16"), (made.evaluation_sampler, "float32")):
        assert (sampler["apply_fn"], sampler["make_cache"].args[0].dtype, sampler["dtype"]) == (dtype,) * 3
    assert made.train[0].score_fn.args == ("bfloat16",)
    assert made.kl_to_sft.args == ("float32",)


def test_configs_of_earlier_versions_evaluate_in_the_dtype_of_the_model():
    """Fails when a resumed workdir changes the dtype of its evaluations half way."""
    settings = settings_of({"model.dtype": "bfloat16"}).as_json()
    del settings["evaluation"]["dtype"]
    assert from_config(settings).evaluation.dtype == "bfloat16"
