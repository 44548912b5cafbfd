"""Merging folders, against float64 numpy and against merging in memory."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from warp_jax import cli, merging
from warp_jax.merging import chunking, on_disk
from warp_jax.merging.on_disk import Settings, merge_folders
from warp_jax.storage import checkpoint

ROOT = Path(__file__).parents[2]
SHAPES = {
    "model.embed_tokens.weight": (40, 8),
    **{f"model.layers.{i}.mlp.up_proj.weight": (300, 21) for i in range(3)},
    **{f"model.layers.{i}.input_layernorm.weight": (8,) for i in range(3)},
    "model.norm.weight": (8,),
}
IDS = {"rope.positions": np.arange(6)}


def _units():
    layers = [[name for name in SHAPES if f"layers.{i}." in name] for i in range(3)]
    return [["model.embed_tokens.weight"], *layers, ["model.norm.weight"]]


def _model(seed, init=None, dtype=np.float32):
    rng = np.random.default_rng(seed)
    scale, start = (0.02, {}) if init is None else (0.004, init)
    return {
        name: (rng.normal(0, scale, shape) + np.float64(start.get(name, 0.0))).astype(dtype)
        for name, shape in SHAPES.items()
    }


def _save(path, model, files=1):
    path.mkdir()
    names = list(model)
    for number in range(files):
        file = "model.safetensors" if files == 1 else f"model-{number}.safetensors"
        safetensors.numpy.save_file({n: model[n] for n in names[number::files]}, path / file, {"format": "pt"})
    if files > 1:
        weight_map = {name: f"model-{i % files}.safetensors" for i, name in enumerate(names)}
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "torch_dtype": "float32"}))
    (path / "tokenizer.json").write_text("{}")
    return path


def _load(path):
    return {k: v for file in path.glob("*.safetensors") for k, v in safetensors.numpy.load_file(file).items()}


def _folders(tmp_path, count=2, dtype=np.float32, files=1):
    init = _model(0, dtype=dtype)
    policies = [_model(1 + m, init, dtype) for m in range(count)]
    paths = [_save(tmp_path / "init", init | IDS, files)]
    paths += [_save(tmp_path / f"run_{m}", policy | IDS) for m, policy in enumerate(policies)]
    return init, policies, paths


def _exact(init, policies, eta, weight=0.5, method="slerp"):
    """SLERP of two task vectors (or of two full weights) per unit, then LITI, in float64."""
    merged = {}
    for names in _units():
        start = np.concatenate([init[n].astype(np.float64).ravel() for n in names])
        origin = 0 * start if method == "slerp_full_weights" else start
        first, second = (np.concatenate([p[n].astype(np.float64).ravel() for n in names]) - origin for p in policies)
        angle = np.arccos(first @ second / np.linalg.norm(first) / np.linalg.norm(second))
        mixed = (np.sin((1 - weight) * angle) * first + np.sin(weight * angle) * second) / np.sin(angle)
        parts = np.split((1 - eta) * start + eta * (origin + mixed), np.cumsum([init[n].size for n in names])[:-1])
        merged |= {n: part.reshape(init[n].shape) for n, part in zip(names, parts, strict=True)}
    return merged


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize(("method", "chunk"), [("slerp", 4096), ("slerp", 1 << 20), ("slerp_full_weights", 1 << 20)])
def test_merge_is_the_formula_rounded_once(tmp_path, monkeypatch, dtype, method, chunk):
    """Fails when a chunk is missing or misplaced, each chunk has its own angle, or eta is swapped with 1 - eta."""
    monkeypatch.setattr(chunking, "MAX_CHUNK", chunk)
    init, policies, (start, *paths) = _folders(tmp_path, dtype=dtype)
    merge_folders(start, paths, tmp_path / "out", Settings(method, etas=(0.3, 1.0), weights=(0.2,)))
    for eta in (0.3, 1.0):
        merged, exact = _load(tmp_path / "out" / f"eta_{eta:g}"), _exact(init, policies, eta, 0.2, method)
        for name, want in exact.items():
            assert merged[name].dtype == dtype
            rounded = want.astype(dtype).astype(np.float64)
            assert np.abs(merged[name].astype(np.float64) - want).max() <= 1.001 * np.abs(rounded - want).max()


def test_a_folder_of_several_files_keeps_its_layout(tmp_path):
    """Fails when tensors change files, the index or the sidecars are lost, or integers are merged; when the merge takes
    over the report of init's export.
    """
    init, policies, (start, *paths) = _folders(tmp_path, files=3)
    (start / "warp_export.json").write_text("{}")
    report = merge_folders(start, paths, tmp_path / "out", Settings())
    out = tmp_path / "out" / "eta_1"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == json.loads((start / "model.safetensors.index.json").read_text())["weight_map"]
    assert json.loads((out / "config.json").read_text())["model_type"] == "llama"
    assert (out / "tokenizer.json").read_text() == "{}"
    assert not (out / "warp_export.json").exists()
    merged = _load(out)
    np.testing.assert_array_equal(merged["rope.positions"], IDS["rope.positions"])
    np.testing.assert_allclose(merged["model.norm.weight"], _exact(init, policies, 1.0)["model.norm.weight"], rtol=1e-6)
    assert report["copied"] == ["rope.positions"]


def test_report_has_the_geometry(tmp_path):
    """Fails when angles are of tensors, tensors outside layers are not listed, or a file's hash is missing."""
    init, policies, (start, *paths) = _folders(tmp_path)
    merge_folders(start, paths, tmp_path / "out", Settings(etas=(0.3,)))
    report = json.loads((tmp_path / "out" / on_disk.REPORT).read_text())
    units = {unit["name"]: unit for unit in report["units"]}
    assert set(units) == {"model.embed_tokens.weight", *(f"model.layers.{i}" for i in range(3)), "model.norm.weight"}
    assert report["not_in_a_layer"] == ["model.embed_tokens.weight", "model.norm.weight"]
    tree = {name.replace(".", "/"): jnp.asarray(value) for name, value in init.items()}
    others = [{name.replace(".", "/"): jnp.asarray(value) for name, value in p.items()} for p in policies]
    inner = merging.gram(tree, others, stacked=None)
    degrees = np.degrees(merging.angles(inner.matrix))
    found = {name.removesuffix(".weight").replace(".", "/"): unit["angles_degrees"] for name, unit in units.items()}
    for name, matrix in zip(inner.names, degrees, strict=True):
        np.testing.assert_allclose(found[name], matrix, rtol=1e-5, atol=1e-4)
    assert len(report["xxh3_128"]) == 3
    assert all(len(value) == 32 for value in report["xxh3_128"].values())
    assert "merged 2 policies over 5 units (2 tensors outside layers)" in on_disk.summary_line(report)


@pytest.mark.parametrize("method", list(merging.METHODS))
@pytest.mark.parametrize("count", [2, 3])
def test_every_method_is_the_one_in_memory(tmp_path, method, count):
    """Fails when a method's units, weights or starting point differ between files and arrays."""
    init, policies, (start, *paths) = _folders(tmp_path, count)
    merge_folders(start, paths, tmp_path / "out", Settings(method=method, etas=(0.3,)))
    merged = _load(tmp_path / "out" / "eta_0.3")
    arrays = [{name.replace(".", "/"): jnp.asarray(v) for name, v in model.items()} for model in (init, *policies)]
    want = merging.merge(arrays[0], arrays[1:], method, liti_rate=0.3, stacked=None)
    for name in SHAPES:
        np.testing.assert_allclose(merged[name], want[name.replace(".", "/")], rtol=3e-7, atol=1e-9)


def test_karcher_takes_a_weight_for_each_policy(tmp_path):
    """Fails when weights are dropped, or taken for those of the recursion."""
    init, policies, (start, *paths) = _folders(tmp_path, 3)
    settings = Settings(method="karcher", etas=(0.3,), weights=(0.2, 0.7, 0.1))
    merge_folders(start, paths, tmp_path / "out", settings)
    merged = _load(tmp_path / "out" / "eta_0.3")
    arrays = [{name.replace(".", "/"): jnp.asarray(v) for name, v in model.items()} for model in (init, *policies)]
    want = merging.karcher(arrays[0], arrays[1:], (0.2, 0.7, 0.1), liti_rate=0.3, stacked=None)
    for name in SHAPES:
        np.testing.assert_allclose(merged[name], want[name.replace(".", "/")], rtol=3e-7, atol=1e-9)


def test_etas_that_grow_with_depth(tmp_path):
    """Fails when the shares are of other units, are applied to one eta only, or are not in the report."""
    init, policies, (start, *paths) = _folders(tmp_path)
    report = merge_folders(start, paths, tmp_path / "out", Settings(etas=(0.3, 1.0), lines_alpha=0.2))
    shares = {"model.embed_tokens.weight": 0.2, "model.norm.weight": 0.2}
    shares |= {f"model.layers.{i}": share for i, share in enumerate((0.2, 0.6, 1.0))}
    assert {unit["name"]: pytest.approx(unit["eta_share"]) for unit in report["units"]} == shares
    assert all(row["share"] == pytest.approx(1, abs=1e-4) for unit in report["units"] for row in unit["delivered"])
    for eta in (0.3, 1.0):
        merged = _load(tmp_path / "out" / f"eta_{eta:g}")
        for unit, share in shares.items():
            want = _exact(init, policies, eta * share)
            for name in [name for name in SHAPES if name.startswith(unit)]:
                np.testing.assert_allclose(merged[name], want[name], rtol=1e-6, atol=1e-9)


def test_the_report_has_the_spread_over_orders(tmp_path):
    """Fails when the spread is of coefficients in place of weights, of one unit, or given where the order is chosen."""
    init, policies, (start, *paths) = _folders(tmp_path, 3)
    report = merge_folders(start, paths, tmp_path / "out", Settings())
    arrays = [{name.replace(".", "/"): jnp.asarray(v) for name, v in model.items()} for model in (init, *policies)]
    for names, unit in zip(_units(), report["units"], strict=True):

        def merged(order, names=names):
            tree = merging.slerp(arrays[0], [arrays[1 + m] for m in order], stacked=None)
            return np.concatenate([np.float64(tree[n.replace(".", "/")]).ravel() for n in names])

        given = merged((0, 1, 2))
        length = np.linalg.norm(given - np.concatenate([np.float64(init[n]).ravel() for n in names]))
        want = max(np.linalg.norm(merged(order) - given) for order in itertools.permutations(range(3))) / length
        assert unit["order_spread"] == pytest.approx(want, rel=1e-4)
    worst = max(report["units"], key=lambda unit: unit["order_spread"])
    says = f"by up to {worst['order_spread']:.1%} of its distance from init ({worst['name']})"
    assert says in on_disk.order_line(report)
    for number, settings in enumerate((Settings("karcher"), Settings(weights=(0.5, 0.5)))):
        assert on_disk.order_line(merge_folders(start, paths, tmp_path / f"other_{number}", settings)) == ""


def test_skipped_tensors_are_kept_from_init(tmp_path):
    """Fails when a skipped tensor is compared or merged, its bytes change, or a policy's extra tensor is refused."""
    init, policies, _ = _folders(tmp_path)
    head = {"lm_head.weight": np.arange(12, dtype=np.float16)}
    start = _save(tmp_path / "with_head", init | head | IDS)
    longer = np.concatenate([policies[0]["model.embed_tokens.weight"]] * 2)
    first = policies[0] | {"model.embed_tokens.weight": longer, "embed_tokens_extra": longer} | IDS
    second = {name: value for name, value in policies[1].items() if "embed" not in name} | IDS
    paths = [_save(tmp_path / name, model) for name, model in (("longer", first), ("without", second))]
    settings = Settings(etas=(0.3,), skip=r"embed_tokens|^lm_head\.", dtype="float64")
    report = merge_folders(start, paths, tmp_path / "out", settings)
    merged, exact = _load(tmp_path / "out" / "eta_0.3"), _exact(init, policies, 0.3)
    assert set(merged) == {*SHAPES, *head, *IDS}
    for name, kept in ((n, (init | head)[n]) for n in ("model.embed_tokens.weight", "lm_head.weight")):
        np.testing.assert_array_equal(merged[name], kept)
        assert merged[name].dtype == kept.dtype
    assert merged["model.norm.weight"].dtype == np.float64
    for name in set(SHAPES) - {"model.embed_tokens.weight"}:
        np.testing.assert_allclose(merged[name], exact[name], rtol=1e-12)
    assert sorted(report["skipped"]) == ["lm_head.weight", "model.embed_tokens.weight"]
    assert report["not_in_a_layer"] == ["model.norm.weight"]
    assert on_disk.summary_line(report).endswith("; 2 tensors kept from init")


def test_a_tensor_that_only_a_policy_has_can_be_skipped(tmp_path):
    """Fails when init must have a tensor to skip."""
    init, policies, (start, *_) = _folders(tmp_path)
    head = {"value_head.weight": np.ones(8, np.float32)}
    paths = [_save(tmp_path / f"with_head_{m}", policy | head | IDS) for m, policy in enumerate(policies)]
    report = merge_folders(start, paths, tmp_path / "out", Settings(skip="value_head"))
    assert _load(tmp_path / "out" / "eta_1").keys() == init.keys() | IDS
    assert report["skipped"] == []


def test_skipped_layers_count_for_the_depth(tmp_path):
    """Fails when L is the number of merged layers: the same layer would have another rate."""
    _, _, (start, *paths) = _folders(tmp_path)
    report = merge_folders(start, paths, tmp_path / "out", Settings(lines_alpha=0.2, skip=r"layers\.2\."))
    shares = {unit["name"]: unit["eta_share"] for unit in report["units"] if "layers" in unit["name"]}
    assert shares == pytest.approx({"model.layers.0": 0.2, "model.layers.1": 0.6})


@pytest.mark.parametrize(
    ("skip", "message"),
    [("embedings", "skip: got 'embedings', which matches no tensor"), ("(", "want a regular"), ("", "to merge; want")],
)
def test_a_skip_that_cannot_be_meant_is_refused(tmp_path, skip, message):
    """Fails when a typo skips nothing in silence, or a wrong expression ends in a traceback."""
    _, _, (start, *paths) = _folders(tmp_path)
    with pytest.raises(ValueError, match=message):
        merge_folders(start, paths, tmp_path / "out", Settings(skip=skip))


def test_dtype_is_chosen(tmp_path):
    """Fails when the result is rounded twice, or the config still names the old dtype."""
    init, policies, (start, *paths) = _folders(tmp_path)
    merge_folders(start, paths, tmp_path / "out", Settings(dtype="bfloat16"))
    merged = _load(tmp_path / "out" / "eta_1")
    for name, want in _exact(init, policies, 1.0).items():
        np.testing.assert_array_equal(merged[name], want.astype(ml_dtypes.bfloat16))
    assert json.loads((tmp_path / "out" / "eta_1" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_orbax_checkpoints_merge_by_layer(tmp_path):
    """Fails when stacked layers share one angle."""
    rng = np.random.default_rng(0)
    shapes = {"embed": {"embedding": (6, 4)}, "layers": {"mlp": {"kernel": (3, 4, 4)}, "norm": {"scale": (3, 4)}}}

    def tree():
        return jax.tree.map(
            lambda s: jnp.asarray(rng.normal(size=s), jnp.float32), shapes, is_leaf=lambda x: type(x) is tuple
        )

    trees = [tree() for _ in range(3)]
    paths = [tmp_path / f"params_{number}" for number in range(3)]
    for path, params in zip(paths, trees, strict=True):
        checkpoint.save_params(path, params)
    report = merge_folders(paths[0], paths[1:], tmp_path / "out", Settings(etas=(0.3,)))
    want = merging.slerp_liti(trees[0], trees[1:], 0.3)
    merged = _load(tmp_path / "out" / "eta_0.3")
    np.testing.assert_allclose(merged["layers/mlp/kernel"], want["layers"]["mlp"]["kernel"], rtol=3e-7)
    np.testing.assert_allclose(merged["embed/embedding"], want["embed"]["embedding"], rtol=3e-7)
    assert [unit["name"] for unit in report["units"]] == ["embed", "layers/0", "layers/1", "layers/2"]


# ---------------------------------------------------------------- bad input


def _change(paths, kind):
    """Damage the second policy; returns settings and what the error must say."""
    _, first, second = (_load(path) for path in paths)
    name = "model.layers.1.mlp.up_proj.weight"
    init = _load(paths[0])
    options = {}
    if kind == "missing":
        second.pop(name)
        message = f"run_1: tensor '{name}' is missing"
    elif kind == "surplus":
        second["extra"] = second[name]
        message = "init: tensor 'extra' is missing"
    elif kind == "shape":
        second[name] = second[name].T.copy()
        message = rf"tensor '{name}' has shape \(21, 300\), want \(300, 21\)"
    elif kind == "dtype":
        second[name] = second[name].astype(np.float16)
        message = f"tensor '{name}' is float16, want float32 as in .*init; or set --dtype"
    elif kind in ("nan", "inf"):
        second[name][7, 3] = float(kind)
        message = f"run_1: tensor '{name}' holds NaN or Inf"
    elif kind == "opposite":
        second = {n: v if n in IDS else 2 * init[n] - v for n, v in first.items()}
        message = (
            r"task vectors are opposite or cancel out in model.embed_tokens.weight, model.layers.0, .*where slerp has"
        )
    elif kind == "identical":
        second = init
        message = "run_1: identical to init"
    elif kind == "integers":
        second["rope.positions"] = second["rope.positions"] + 1
        message = "'rope.positions': int64 values differ"
    elif kind == "memory":
        options["memory_gb"] = 1e-6
        message = r"memory_gb: got 1e-06, want 0.\d+ or more for 2 policies"
    elif kind == "memory nan":
        options["memory_gb"] = np.nan
        message = "memory_gb: got nan, want"
    elif kind == "weight nan":
        options["weights"] = (np.nan,)
        message = "weights: got .*nan.*, want numbers from -1000 to 1000"
    elif kind == "weights":
        options["weights"] = (0.2, 0.3)
        message = "weights: got 2 for 2 policies, want 1"
    safetensors.numpy.save_file(second, paths[2] / "model.safetensors")
    return Settings(**options), message


TENSORS = ["missing", "surplus", "shape", "dtype", "nan", "inf", "opposite", "identical", "integers"]


@pytest.mark.parametrize("kind", [*TENSORS, "memory", "memory nan", "weight nan", "weights"])
def test_bad_input_leaves_nothing(tmp_path, kind):
    """Fails when this input is merged, its tensor is not named, or a folder is left."""
    _, _, paths = _folders(tmp_path)
    settings, message = _change(paths, kind)
    before = set(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        merge_folders(paths[0], paths[1:], tmp_path / "out", settings)
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("etas", [(), (0.3, 0.3), (1, 1 + 1e-9), (-0.1,), (0.3, np.nan), (np.inf,), (1e308,)])
def test_etas_are_distinct_and_finite(tmp_path, etas):
    """Fails when two etas share a folder, or an eta gives weights that are NaN or Inf."""
    with pytest.raises(ValueError, match=r"etas: got .*, want distinct numbers from 0 to 1000"):
        merge_folders(tmp_path, [tmp_path], tmp_path / "out", Settings(etas=etas))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Settings(weights=(0.2, 0.3)), "weights: got 2 for 2 policies, want 1"),
        (Settings("karcher", weights=(0.2, 0.3)), "want numbers from 0 to 1 that add up to 1 for karcher"),
        (Settings("ties"), "method: got 'ties', want one of slerp, "),
    ],
)
def test_bad_weights_are_refused_before_any_is_read(tmp_path, settings, message):
    """Fails when the weights of the policies are checked after hours of reading; the folder has none to read."""
    with pytest.raises(ValueError, match=message):
        merge_folders(tmp_path, [tmp_path, tmp_path], tmp_path / "out", settings)


def test_no_space_leaves_nothing(tmp_path, monkeypatch):
    """Fails when a full disk is noticed only while writing."""
    _, _, paths = _folders(tmp_path)
    before = set(tmp_path.iterdir())
    monkeypatch.setattr(on_disk.shutil, "disk_usage", lambda path: _Usage())
    with pytest.raises(ValueError, match="GB of free disk"):
        merge_folders(paths[0], paths[1:], tmp_path / "out", Settings())
    assert set(tmp_path.iterdir()) == before


class _Usage:
    free = 1000


def test_of_two_merges_at_once_the_first_to_end_is_kept(tmp_path, monkeypatch):
    """Fails when the second overwrites the first, or deletes what it is writing."""
    _, _, paths = _folders(tmp_path)
    before = set(tmp_path.iterdir())
    write_merges = on_disk._Job.write_merges

    def merge_meanwhile(job, *args):
        monkeypatch.undo()
        delivered = write_merges(job, *args)
        merge_folders(paths[0], paths[1:], tmp_path / "out", Settings(etas=(0.3,)))
        return delivered

    monkeypatch.setattr(on_disk._Job, "write_merges", merge_meanwhile)
    with pytest.raises(FileExistsError, match="out: another process wrote it first"):
        merge_folders(paths[0], paths[1:], tmp_path / "out", Settings(etas=(1.0,)))
    assert set(tmp_path.iterdir()) == before | {tmp_path / "out"}
    assert (tmp_path / "out" / "eta_0.3").is_dir()


def test_an_interrupted_merge_leaves_nothing_and_a_killed_one_no_result(tmp_path, monkeypatch):
    """Fails when the folder appears before it is complete, or leftovers of a killed merge block the next."""
    _, _, paths = _folders(tmp_path)
    leftover = tmp_path / ".out.partial"
    leftover.mkdir()
    (leftover / "eta_1").mkdir()
    before = set(tmp_path.iterdir()) - {leftover}

    def stop(*args):
        assert not (tmp_path / "out").exists()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(on_disk.SafetensorsWriter, "close", stop)
        with pytest.raises(KeyboardInterrupt):
            merge_folders(paths[0], paths[1:], tmp_path / "out", Settings())
    assert set(tmp_path.iterdir()) == before
    leftover.mkdir()
    merge_folders(paths[0], paths[1:], tmp_path / "out", Settings())
    assert set(tmp_path.iterdir()) == before | {tmp_path / "out"}
    with pytest.raises(ValueError, match="out exists and is not overwritten"):
        merge_folders(paths[0], paths[1:], tmp_path / "out", Settings())


def _merge_program(*arguments):
    command = [sys.executable, "scripts/merge.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_program(tmp_path):
    """Fails when the command line is not passed on."""
    init, policies, (start, *paths) = _folders(tmp_path)
    policies_flag = f"--policies={paths[0]},{paths[1]}"
    options = ("--etas=0.3,1", "--weights=0.2", "--lines_alpha=1", "--skip=layers.2")
    result = _merge_program(f"--init={start}", policies_flag, *options, f"--out={tmp_path}/out")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("merged 2 policies over 4 units")
    assert "2 tensors kept from init" in result.stdout
    assert json.loads((tmp_path / "out" / on_disk.REPORT).read_text())["lines_alpha"] == 1
    merged = _load(tmp_path / "out" / "eta_0.3")
    np.testing.assert_allclose(
        merged["model.norm.weight"], _exact(init, policies, 0.3, 0.2)["model.norm.weight"], rtol=1e-6
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--init={init}", "--out={out}"], "--policies is missing"),
        (["--init={init}", "--policies={init}", "--out={out}"], "identical to init"),
        (["--init={init}", "--policies={init}", "--out={out}", "--etas=a"], "want numbers separated by commas"),
        (
            ["--init={init}", "--policies={init}", "--out={out}", "--etas=nan"],
            "etas: got (nan,), want distinct numbers",
        ),
        (["--init={init}", "--policies={init}", "--out={out}", "--method=ties"], "ties"),
        (["--init={init}", "--policies={bin}", "--out={out}"], "a pickle"),
    ],
)
def test_bad_command_lines_are_one_line_and_exit_code_2(tmp_path, arguments, message):
    """Fails when any of these ends in a traceback, or leaves a folder."""
    start = _save(tmp_path / "init", _model(0))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "pytorch_model.bin").write_bytes(b"")
    names = {"init": start, "out": tmp_path / "out", "bin": tmp_path / "bin"}
    result = _merge_program(*(argument.format(**names) for argument in arguments))
    assert result.returncode == cli.BAD_INPUT, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))
