"""A whole job whose runs train LoRA factors: configs/tiny.py with rank 8."""

import jax
import numpy as np
import pytest
import safetensors.numpy

from tests.commands import TINY, kill_when, main_command, run, script_command, start, train
from warp_jax import merging, trees
from warp_jax.evaluation import measure
from warp_jax.experiment import export, stages
from warp_jax.models import freezing
from warp_jax.storage.lora_folder import LoraFolder
from warp_jax.storage.weight_files import open_weights

SETTINGS = (
    TINY,
    "--config.model.lora.rank=8",
    "--config.model.lora.targets=layers/1/|layers/0/attention",
    "--config.warp.num_iterations=1",
    "--config.warp.steps_per_iteration=(6,)",
    "--config.front.etas=(0.3, 1.0)",
    "--config.keep.anchor=True",
    "--config.keep.steps=(3,)",
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A workdir made by one job."""
    return train(tmp_path_factory.mktemp("whole") / "run", *SETTINGS)


def _flat(tree):
    return {trees.path_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _results(workdir):
    """What an unbroken job leaves: metrics, evaluations and front, byte by byte."""
    names = ("metrics.jsonl", "*.npz", "front.csv", "geometry.json")
    return {path.relative_to(workdir): path.read_bytes() for name in names for path in workdir.rglob(name)}


def test_a_killed_job_goes_on_to_the_same_bits(whole, tmp_path):
    """Fails when a resumed run draws A again, or loses factors, moments or anchor."""
    workdir = tmp_path / "run"
    state = workdir / "iteration_1" / "run_2" / "state" / "4"
    kill_when(state, start(main_command(*SETTINGS, f"--workdir={workdir}")))
    assert not (workdir / "front.csv").exists()
    train(workdir, *SETTINGS)
    assert _results(workdir) == _results(whole)


def test_saved_weights_are_whole_and_change_in_the_targets_alone(whole):
    """Fails when factors are saved, a weight outside the targets moves, the merge is not that of the saved policies, or
    the anchor is that of averaged factors.
    """
    job = stages.Workdir(whole)
    sft = _flat(job.load("sft")[0])
    names = ("run_1", "run_2", "run_1/anchor", "run_1/step_3", "merged")
    found = {name: job.load(f"iteration_1/{name}")[0] for name in names}
    ranks = {}
    for name, tree in found.items():
        moved = {leaf for leaf, values in _flat(tree).items() if np.abs(values - sft[leaf]).max() > 0}
        assert len(moved) == 4 + 7, name
        assert all(leaf.endswith("/kernel") for leaf in moved)
        assert not any(leaf.startswith("layers_from_0/mlp") for leaf in moved)
        ranks[name] = max(
            np.linalg.matrix_rank(_flat(tree)[leaf][0] - sft[leaf][0], tol=1e-5) for leaf in moved if "mlp" in leaf
        )
    assert max(ranks["run_1"], ranks["run_2"], ranks["run_1/step_3"]) <= 8 < ranks["run_1/anchor"]
    assert 8 < ranks["merged"] <= 16
    policies = [freezing.split(found[name], *job.settings.model.trained)[0] for name in ("run_1", "run_2")]
    start = freezing.split(job.load("sft")[0], *job.settings.model.trained)[0]
    want, merged = _flat(merging.slerp(start, policies)), _flat(found["merged"])
    for name, leaf in want.items():
        np.testing.assert_allclose(merged[name], leaf, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_a_stage_as_an_adapter(whole, tmp_path):
    """Fails when the base model is another stage than SFT, the printed loss is not that of the folder, or the policy
    that is compared is another one.
    """
    out, policy = tmp_path / "adapter", tmp_path / "policy"
    flags = (f"--workdir={whole}", "--stage=iteration_1/run_1")
    result = run(script_command("export_hf.py", *flags, "--lora_rank=8", "--prompts=16", f"--out={out}"))
    assert result.returncode == 0, result.stderr
    assert "of the displacement from SFT (relative Frobenius norm), at most " in result.stdout
    export.export_stage(whole, "sft", tmp_path / "sft")
    export.export_stage(whole, "iteration_1/run_1", policy)
    read = LoraFolder(out, open_weights(tmp_path / "sft"))
    for name, want in safetensors.numpy.load_file(policy / "model.safetensors").items():
        np.testing.assert_allclose(read.view(name, 0, want.size), want.reshape(-1), rtol=0, atol=1e-6)
    found = export.export_stage(whole, "liti:0.3", tmp_path / "small", lora_rank=2, prompts=16)
    assert 0.1 < found["cut"]["total"] <= found["cut"]["largest"] < 1
    assert found["cut"]["of"].startswith("model.layers.")
    front = measure.load_evaluation(whole / "evaluations" / "liti_i1_e0.3.npz")
    assert found["compared"]["sft_kl"]["stage"] == pytest.approx(front.sft_kl[:16].mean(), rel=1e-3)
    assert found["compared"]["sft_kl"]["exported"] != found["compared"]["sft_kl"]["stage"]
    with pytest.raises(ValueError, match="lora_rank: got 2, want 0: reward_model is no adapter of SFT"):
        export.export_stage(whole, "reward_model", tmp_path / "wrong", lora_rank=2)
