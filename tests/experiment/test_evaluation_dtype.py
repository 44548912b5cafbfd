"""Dtypes of the compiled programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.settings_of import settings_of
from warp_jax.experiment import architecture
from warp_jax.experiment.programs import make_programs
from warp_jax.models import apply
from warp_jax.parallel import meshes
from warp_jax.settings import from_config
from warp_jax.types import PromptBatch

SETTINGS = settings_of()
MESH = meshes.make_mesh((1, 1, 1), jax.devices()[:1])


def _programs(model_dtype, evaluation_dtype):
    settings = settings_of({"model.dtype": model_dtype, "evaluation.dtype": evaluation_dtype})
    model = architecture.policy_config(settings.model, settings.vocab_size)
    params = apply.random_params(model, MESH, 0)
    return make_programs(settings, MESH, model, trained=params, frozen={}, stop_ids=(2,), pad_id=0), params


@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")])
def test_evaluation_computes_in_its_own_dtype(dtypes):
    """Fails when the evaluation samples or scores in the dtype of the model, or is compiled twice for equal dtypes."""
    programs, params = _programs(*dtypes)
    assert (programs.evaluation_sampler is programs.sampler) == (dtypes[0] == dtypes[1])
    kinds = [
        {leaf.dtype.name for leaf in jax.tree.leaves(jax.eval_shape(s.lay_out, params))}
        for s in (programs.sampler, programs.evaluation_sampler)
    ]
    assert [("bfloat16" in kind) for kind in kinds] == [dtype == "bfloat16" for dtype in dtypes]
    batch = PromptBatch(jnp.full((8, 4), 5, jnp.int32), jnp.ones((8, 4), bool), jnp.arange(8, dtype=jnp.int32))
    rollout = programs.evaluation_sampler(params, batch, jax.random.key(0))
    other = apply.random_params(architecture.policy_config(SETTINGS.model, SETTINGS.vocab_size), MESH, 1)
    exact, _ = _programs("float32", "float32")
    kls = [np.asarray(p.kl_to_sft(other, params, {}, rollout)) for p in (programs, exact)]
    assert (np.abs(kls[0] / kls[1] - 1).max() < 1e-6) == (dtypes[1] == "float32")


def test_configs_of_earlier_versions_evaluate_in_the_dtype_of_the_model():
    """Fails when a resumed workdir changes the dtype of its evaluations half way."""
    settings = settings_of({"model.dtype": "bfloat16"}).as_json()
    del settings["evaluation"]["dtype"]
    assert from_config(settings).evaluation.dtype == "bfloat16"
