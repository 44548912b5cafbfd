"""The whole program on configs/tiny.py, and what it says to bad input."""

import csv
import json
import re
import shutil
import signal
import sys

import numpy as np
import pytest
import torch
import transformers
from ml_collections import ConfigDict

from configs import default, karcher, length_penalty_pair, lerp, lora, no_kl, quickstart, sft_anchor, tiny
from tests.commands import TINY, finish, kill_when, main_command, run, script_command, start, wait_for
from tests.settings_of import settings_of, typed
from warp_jax import cli, exit_codes, files, main
from warp_jax.evaluation import columns, measure, points
from warp_jax.experiment import export, inputs, stages
from warp_jax.experiment import workdir as workdirs
from warp_jax.models.apply import make_apply_fn
from warp_jax.rewards import from_folder

COLUMNS = "stage iteration run eta step reward reward_se gold_reward gold_reward_se sft_kl sft_kl_se length distinct_2 "
COLUMNS += "distinct_1 distinct_3 gold_gap gold_gap_se"
ALL = [default, quickstart, tiny, sft_anchor, no_kl, lerp, lora, karcher, length_penalty_pair]


@pytest.fixture(autouse=True)
def _strict_promotion():
    """Overrides the strict one of conftest.py: optax raises a float to an integer power."""


def _leaves(config, prefix=""):
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("tiny") / "run"
    program = [sys.executable, "-m", "tests.recorded_main", str(workdir.parent / "reads.json")]
    result = run([*program, TINY, f"--workdir={workdir}"])
    assert result.returncode == 0, result.stderr
    return tiny.get_config(), workdir, result.stdout.splitlines()[-1]


def _rows(workdir, name="front.csv"):
    with (workdir / name).open() as file:
        return list(csv.DictReader(file))


def test_tiny_run_leaves_everything(tiny_run):
    """Fails when a stage of the algorithm, a column or a picture is missing."""
    config, workdir, line = tiny_run
    rows = _rows(workdir)
    assert list(rows[0]) == COLUMNS.split()
    stages = [(row["stage"], int(row["iteration"]), int(row["run"])) for row in rows if row["stage"] != "liti"]
    per_iteration = [[("policy", i, r) for r in (1, 2) for _ in range(2)] + [("merged", i, 0)] for i in (1, 2)]
    assert stages == [("sft", 0, 0), *per_iteration[0], *per_iteration[1]]
    assert [float(r["eta"]) for r in rows if r["stage"] == "liti"] == list(config.front.etas) * 2
    assert float(rows[0]["sft_kl"]) == pytest.approx(0, abs=1e-5)
    assert (workdir / "front.png").read_bytes().startswith(b"\x89PNG")
    page = (workdir / "report.html").read_text()
    assert "://" not in page
    data = json.loads(page.partition('id="data">')[2].partition("</script>")[0])["workdirs"][0]
    assert [row["reward"] for row in data["rows"]] == [float(row["reward"]) for row in rows]
    assert len(data["answers"]["fronts"]) == 1 + 2 * len(config.front.etas)
    assert [len(run["steps"]) for run in data["curves"]] == [6] * 4
    assert data["progress"]["finished"]
    assert line.startswith("reward ")
    assert list((workdir / "iteration_2" / "run_1").glob("events.out.tfevents*"))
    assert len((workdir / "iteration_2" / "run_1" / "metrics.jsonl").read_text().splitlines()) == 6


def test_front_ends_are_sft_and_the_merge(tiny_run):
    """Fails when eta is turned round: 1 must be the merge."""
    _, workdir, _ = tiny_run
    rows = _rows(workdir)
    for iteration in ("1", "2"):
        merged = next(r for r in rows if r["stage"] == "merged" and r["iteration"] == iteration)
        end = next(r for r in rows if r["stage"] == "liti" and r["iteration"] == iteration and float(r["eta"]) == 1)
        near = next(r for r in rows if r["stage"] == "liti" and r["iteration"] == iteration and float(r["eta"]) == 0.1)
        assert end["sft_kl"] == merged["sft_kl"]
        assert float(near["sft_kl"]) < 0.1 * float(merged["sft_kl"])


def test_started_again_it_only_redraws(tiny_run):
    """Fails when a finished stage runs again, or a changed report setting is refused."""
    _, workdir, _ = tiny_run
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file() and "iteration" in str(p)}
    result = run(main_command(TINY, f"--workdir={workdir}", "--config.front.kl_budget=100"))
    assert "best under 100 nats: eta" in result.stdout
    assert before == {p: p.stat().st_mtime_ns for p in before}


def _results(workdir):
    """What an unbroken job leaves: metrics, evaluations and front, byte by byte."""
    names = ("metrics.jsonl", "*.npz", "front.csv", "geometry.json")
    return {path.relative_to(workdir): path.read_bytes() for name in names for path in workdir.rglob(name)}


def test_a_stopped_and_killed_job_goes_on_to_the_same_result(tiny_run, tmp_path):
    """Fails when a resumed job repeats or skips a run, loses anchor or moments, merges other policies, or lacks rows.

    It is asked to stop while run 1 trains, and killed after the first saved state of run 2.
    """
    _, workdir, _ = tiny_run
    arguments = (TINY, f"--workdir={tmp_path / 'run'}")
    folder = tmp_path / "run" / "iteration_1"
    stopped = start(main_command(*arguments))
    wait_for(folder / "run_1" / "metrics.jsonl", stopped)
    stopped.send_signal(signal.SIGTERM)
    code, _, errors = finish(stopped)
    assert code == 75, errors
    assert "stopped by SIGTERM" in errors.splitlines()[-1]
    assert not (folder / "run_1" / "params").exists()
    kill_when(folder / "run_2" / "state" / "4", start(main_command(*arguments)))
    assert not (tmp_path / "run" / "front.csv").exists()
    assert run(main_command(*arguments)).returncode == 0
    assert _results(tmp_path / "run") == _results(workdir)


def test_another_config_is_refused(tiny_run):
    """Fails when a workdir is silently continued with other settings."""
    _, workdir, _ = tiny_run
    with pytest.raises(ValueError, match=r"warp.ema_rate was 0.01, now 0.3"):
        workdirs.claim(settings_of({"warp.ema_rate": 0.3}), workdir, {})


def test_a_workdir_is_claimed_where_a_kill_left_a_beginning(tmp_path):
    """Fails when a kill while config.json is written leaves a workdir that is refused for ever, or a foreign folder is
    taken.
    """
    (tmp_path / "lock").touch()
    (tmp_path / ".config.json.0123abcd.partial").write_text("{")
    workdirs.claim(settings_of(), tmp_path, {})
    assert files.read_json(tmp_path / "config.json")["seed"] == tiny.get_config().seed
    (tmp_path / "config.json").unlink()
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match="holds other files"):
        workdirs.claim(settings_of(), tmp_path, {})


def test_a_time_limit_may_be_changed(tmp_path):
    """Fails when a job that a slow reward function has ended cannot go on with a longer limit."""
    workdirs.claim(settings_of(), tmp_path, {})
    workdirs.claim(settings_of({"gold.timeout": 3.0, "rewards.sentiment.timeout": 4.0}), tmp_path, {})
    assert files.read_json(tmp_path / "config.json")["gold"]["timeout"] == 3.0
    with pytest.raises(ValueError, match=r"gold\.max_terms was"):
        workdirs.claim(settings_of({"gold.max_terms": 3}), tmp_path, {})


SFT_ANCHOR = {
    "warp.ema_rate": 0.0,
    "warp.num_iterations": 1,
    "warp.num_runs": 1,
    "warp.steps_per_iteration": (600,),
}


@pytest.mark.parametrize("module", ALL, ids=lambda module: module.__name__)
def test_every_config_is_valid_and_locked(module):
    """Fails when a config is not locked (a typo in it would pass), or sets a value that the checks refuse."""
    config = module.get_config()
    with pytest.raises(AttributeError, match="ema_rat"):
        config.warp.ema_rat = 0.5
    config.mesh = (8, 1, 1)
    inputs.check(typed(config))
    assert set(_leaves(config)) == set(_leaves(default.get_config()))


@pytest.mark.parametrize(
    ("module", "delta"),
    [
        (sft_anchor, SFT_ANCHOR),
        (no_kl, {"rl.kl_coef": 0.0}),
        (lerp, {"warp.merge": "lerp"}),
        (lora, {"model.lora": {"rank": 8, "alpha": 16.0, "targets": "layers/"}, "rl.learning_rate": 1e-3}),
        (karcher, {"warp.merge": "karcher", "warp.num_runs": 4}),
        (length_penalty_pair, {"warp.runs": ({"rewards.length.weight": -0.01}, {})}),
    ],
    ids=["sft_anchor", "no_kl", "lerp", "lora", "karcher", "length_penalty_pair"],
)
def test_baselines_are_deltas(module, delta):
    """Fails when a baseline differs from the quickstart in anything else."""
    ours, base = module.get_config().to_dict(), quickstart.get_config().to_dict()
    changed = {
        f"{group}.{name}": value
        for group, values in ours.items()
        if isinstance(values, dict)
        for name, value in values.items()
        if value != base[group][name]
    }
    assert changed == delta


def test_every_leaf_is_read(tiny_run):
    """Fails when a knob is dead: nothing but the checks reads it. Those of a schedule, of clipping, of BEMA and of LoRA
    are read when their method is chosen; tests in tests/training/ set each of them.
    """
    _, workdir, _ = tiny_run
    reads = json.loads((workdir.parent / "reads.json").read_text())
    unread = set(_leaves(default.get_config())) - set(reads)
    chosen = re.compile(r"rl\.(clip|kl)_\w+|warp\.bema\.\w+|model\.lora\.\w+|\w+\.learning_rate_(steps|end)")
    assert {name for name in unread if not chosen.fullmatch(name)} == set()


BAD = [
    ("data.prompt_template", "{txt}", "want names of fields"),
    ("mesh", (3, 1, 1), "3 devices"),
    ("mesh", (1, 1, 8), "choose a smaller 'tensor' axis"),
    ("sampling.tensor", 3, "config.sampling.tensor: got 3, want 0, or a multiple of 1"),
    ("rl.batch_size", 12, "multiple of 8"),
    ("data.source", "nowhere.jsonl", "no such file"),
    ("evaluation.num_prompts", 16_000, "split 'eval' has"),
    ("evaluation.text", "nowhere.jsonl", "config.evaluation.text: got 'nowhere.jsonl', want '' or a .jsonl"),
    ("model.architecture.num_kv_heads", 3, "multiple of num_kv_heads"),
    ("model.lora", {"rank": 2, "alpha": 1.0, "targets": "embed"}, "lora.targets: no weight matches '' and 'embed' and"),
    ("rewards.sentiment.source", "no.module:f", "rewards"),
    ("rewards.sentiment.source", "tfidf", "want 'reward_model', 'length'"),
    ("gold.source", "reward_model", "want 'tfidf'"),
]


@pytest.mark.parametrize(("path", "value", "message"), BAD, ids=str)
def test_bad_values_are_refused_before_anything_is_written(path, value, message, tmp_path):
    """Fails when the check of this value is taken out. Values of a wrong type or range: settings/test_settings.py."""
    with pytest.raises(ValueError, match=message):
        main.check(settings_of({path: value}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=configs/tiny.py", "--workdir={dir}/run", "--config.warp.ema_rat=0.1"], "ema_rate"),
        (["--config=configs/tiny.py", "--workdir={dir}/run", "--config.warp.ema_rate=1.5"], "at most 1"),
        (["--config=configs/tiny.py", "--workdir={dir}/run", "--config.front.etas=(0.1,float('nan'))"], "etas"),
        (["--config=configs/tiny.py", "--workdir={dir}/run", "--config.front.etas=(0.1, 0.1)"], "distinct numbers"),
        (["--config=configs/tiny.py", "--workdir={dir}/run", "--config.mesh=('a', 1, 1)"], "config.mesh"),
        (["--config=configs/tiny.py", "--workdir={dir}/run", "--config.warp.num_runs=two"], "num_runs"),
        (["--config=configs/nosuch.py", "--workdir={dir}/run"], "nosuch.py"),
        (["--config=configs/tiny.py", "--workdir={dir}/file/run"], "cannot write"),
        (["--config=configs/tiny.py"], "--workdir is missing"),
    ],
    ids=[
        "unknown key",
        "out of range",
        "no literal",
        "twice",
        "wrong element",
        "wrong type",
        "no config",
        "unwritable",
        "no workdir",
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, tmp_path):
    """Fails when any of these ends in a traceback, another code, or leaves a folder."""
    (tmp_path / "file").write_text("")
    result = run(main_command(*(argument.format(dir=tmp_path) for argument in arguments)))
    assert result.returncode == cli.BAD_INPUT, result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert not (tmp_path / "run").exists()


REWARDS = """
import os, threading, time

sizes = []

def fails(prompts, completions, rows):
    sizes.append(len(rows))
    if "BROKEN" in os.environ and sizes.count(8) == 3:  # the batch of the third step
        raise SystemExit(0)
    return [len(text) for text in completions]

def hangs(prompts, completions, rows):
    threading.Thread(target=time.sleep, args=(600,)).start()
    time.sleep(600)
"""


def _run_with_reward(folder, function, **environment):
    """One run of four steps, whose reward is a function of a module in a folder."""
    (folder / "users_rewards.py").write_text(REWARDS)
    changes = ["warp.num_iterations=1", "warp.num_runs=1", "warp.steps_per_iteration=(4,)", "evaluation.every=4"]
    changes += ["gold.source=", "data.label_field=", "sft.num_steps=1", "front.etas=(1.0,)"]
    changes += [f"rewards.sentiment.source=users_rewards:{function}"]
    changes += [f"rewards.sentiment.timeout={2 if function == 'hangs' else 60}"]
    command = main_command(TINY, f"--workdir={folder / 'run'}", *(f"--config.{change}" for change in changes))
    return run(command, PYTHONPATH=str(folder), **environment)


def test_a_reward_function_that_fails_in_training_is_one_line(tmp_path):
    """Fails when its sys.exit(0) is the job's, the error has a traceback, or the mended job does not go on."""
    result = _run_with_reward(tmp_path, "fails", BROKEN="1")
    assert result.returncode == exit_codes.USER_FUNCTION, result.stderr
    line = result.stderr.splitlines()[-1]
    assert line.startswith("error: iteration 1 run 1 step 2: config.rewards.sentiment.source 'users_rewards:fails': ")
    assert "raised SystemExit: 0" in line
    assert "of split 'prompts'" in line
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run" / "front.csv").exists()
    result = _run_with_reward(tmp_path, "fails")
    assert result.returncode == 0, result.stderr
    assert len((tmp_path / "run" / "iteration_1" / "run_1" / "metrics.jsonl").read_text().splitlines()) == 4
    assert _rows(tmp_path / "run")[-1]["gold_reward"] == "nan"


def test_a_reward_function_that_hangs_ends_the_job(tmp_path):
    """Fails when the job waits for the function or for a thread that it started, or something is written before."""
    result = _run_with_reward(tmp_path, "hangs")
    assert result.returncode == exit_codes.USER_FUNCTION, result.stderr
    assert result.stderr.count("\n") == 1
    assert "users_rewards:hangs': no result after 2.0 seconds" in result.stderr
    assert not (tmp_path / "run").exists()


def test_geometry_is_per_layer(tiny_run):
    """Fails when the runs share their prompt order (angle 0), or the units are tensors."""
    _, workdir, _ = tiny_run
    geometry = json.loads((workdir / "iteration_1" / "geometry.json").read_text())
    angles = np.array(geometry["angles_degrees"])
    assert geometry["units"] == ["embed", "final_norm", "layers/0", "layers/1"]
    assert ((angles[:, 0, 1] > 1) & (angles[:, 0, 1] < 179)).all()


def test_compare_sets_the_front_against_a_baseline(tiny_run):
    """Fails when the points of a workdir are read under a wrong name, or the baseline's trajectory is not all there."""
    config, workdir, _ = tiny_run
    found = points.read_points(workdir)
    assert columns.as_rows(found, typed(config).evaluation)[1]["reward"] == float(_rows(workdir)[1]["reward"])
    picture = workdir.parent / "compared.png"
    script = [sys.executable, "scripts/compare.py", f"--baseline={workdir}", f"--picture={picture}", str(workdir)]
    result = run(script)
    assert result.returncode == 0, result.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    table = [line for line in result.stdout.splitlines() if line.startswith("| run | run |")]
    assert len(table) == 2 * config.warp.num_iterations * config.warp.num_runs
    assert all(f"| {float(row['reward']):.3f} |" in result.stdout for row in _rows(workdir) if row["stage"] == "policy")


def test_the_report_is_written_again_and_of_several_workdirs(tiny_run):
    """Fails when a report made from the files differs from the job's, or one of several lacks a workdir or a table."""
    _, workdir, _ = tiny_run

    def data_of(page):
        return json.loads(page.read_text().partition('id="data">')[2].partition("</script>")[0])

    (made,) = data_of(workdir / "report.html")["workdirs"]
    other = shutil.copytree(workdir, workdir.parent / "other")
    (other / "report.html").unlink()
    together = workdir.parent / "together.html"
    for arguments in ([str(other)], [f"--out={together}", str(workdir), str(other)]):
        result = run([sys.executable, "scripts/report.py", *arguments])
        assert result.returncode == 0, result.stderr
    ((again,), both) = data_of(other / "report.html")["workdirs"], data_of(together)
    for row in (*made["rows"], *again["rows"]):
        row["export"] = None  # it names the workdir
    for name in ("rows", "curves", "geometry", "budgets", "answers", "tables", "drift", "summary"):
        assert made[name] == again[name], name
    assert [one["name"] for one in both["workdirs"]] == ["run", "other"]
    compared = run([sys.executable, "scripts/compare.py", str(workdir), str(other)]).stdout
    methods = both["compared"][2]["rows"]
    assert [row["method"] for row in methods] == ["run", "other"]
    assert all(f"| {' | '.join(row.values())} |" in compared for row in methods)


def test_best_of_n_of_sft_stands_beside_the_front(tiny_run):
    """Fails when a KL is above its bound, the reward does not rise with N, SFT is not the policy that is sampled, or
    the comparison lacks it."""
    workdir = tiny_run[1]
    result = run(script_command("best_of_n.py", f"--workdir={workdir}", "--n=2,4,8", "--samples=64"))
    assert result.returncode == 0, result.stderr
    rows = _rows(workdir / "best_of_n")
    assert [(row["stage"], int(row["step"])) for row in rows] == [("best_of_n", n) for n in (1, 2, 4, 8)]
    for name in ("reward", "sft_kl"):
        assert np.diff([float(row[name]) for row in rows]).min() > 0
    for row in rows:
        assert float(row["sft_kl"]) <= float(row["kl_bound"]) + 2 * float(row["sft_kl_se"])
    sft = _rows(workdir)[0]
    for name in ("reward", "gold_reward", "length"):
        error = float(sft.get(f"{name}_se", 0.1))
        assert float(rows[0][name]) == pytest.approx(float(sft[name]), abs=4 * error)
    compared = run(script_command("compare.py", workdir))
    assert "| run: best of N | " in compared.stdout
    refused = run(script_command("best_of_n.py", f"--workdir={workdir}", "--n=2,4.5"))
    assert refused.returncode == exit_codes.BAD_INPUT
    assert refused.stderr == "error: --n: got 2,4.5, want whole numbers from 1 to --samples = 128\n"


def test_merges_over_lambda_go_from_run_to_run_through_the_merge(tiny_run):
    """Fails when lambda is the weight of the first run, LERP has another weight than SLERP, or the merge is another."""
    workdir = tiny_run[1]
    result = run(script_command("slerp_weights.py", f"--workdir={workdir}", "--weights=0,0.5,1"))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("lambda ") == 3
    found = {(row["method"], float(row["slerp_weight"])): row for row in _rows(workdir, "slerp_weights.csv")}
    policies = [row for row in _rows(workdir) if row["stage"] == "policy" and row["iteration"] == "1"]
    last = max(int(row["step"]) for row in policies)
    first, second = (row for row in policies if int(row["step"]) == last)
    merged = next(row for row in _rows(workdir) if row["stage"] == "merged")
    for weight, want in ((0.0, first), (0.5, merged), (1.0, second)):
        for name in ("reward", "sft_kl", "gold_reward"):
            assert float(found["slerp", weight][name]) == pytest.approx(float(want[name]), rel=1e-5), (weight, name)
            if weight != 0.5:
                assert float(found["lerp", weight][name]) == pytest.approx(float(want[name]), rel=1e-5)
    assert float(found["lerp", 0.5]["sft_kl"]) < 0.9 * float(merged["sft_kl"])
    refused = run(script_command("slerp_weights.py", f"--workdir={workdir}", "--weights=0,2"))
    assert refused.stderr == "error: --weights: got 0,2, want numbers from 0 to 1\n"


def test_the_reward_model_loads_in_transformers(tiny_run, tmp_path):
    """Fails when the export of a reward model loses its head or its trunk, or is no judge of text."""
    _, workdir, _ = tiny_run
    export.export_stage(workdir, "reward_model", tmp_path / "out")
    kind = transformers.AutoModelForSequenceClassification
    model, found = kind.from_pretrained(tmp_path / "out", output_loading_info=True, dtype=torch.float32)
    assert not any(found[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = np.random.default_rng(5).integers(3, 250, (3, 7)).astype(np.int32)
    with torch.no_grad():
        got = model(torch.from_numpy(ids)).logits.numpy()[:, 0]
    opened = stages.Workdir(workdir)
    params, settings = opened.load("reward_model")
    want, _ = make_apply_fn(settings)(params, ids, np.ones_like(ids, bool))
    np.testing.assert_allclose(got, want[:, -1], rtol=1e-3, atol=1e-7)
    assert np.ptp(got) > 1e-4
    reward = from_folder.load(tmp_path / "out", opened.mesh, "float32")
    row = np.append(opened.tokenizer.bos_id, opened.tokenizer.encode(["a fine film"])[0]).astype(np.int32)[None]
    alone, _ = make_apply_fn(settings)(params, row, np.ones_like(row, bool))
    np.testing.assert_allclose(reward(["a fine"], [" film"], [{}]), alone[:, -1], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_is_compared_with_its_stage(tiny_run, tmp_path, dtype):
    """Fails when rounding is not reported, the exported weights are not those compared, SFT is another policy, or the
    completions are not those of the front.
    """
    workdir = tiny_run[1]
    found = export.export_stage(workdir, "liti:0.3", tmp_path / "out", dtype=dtype, prompts=8)
    assert json.loads((tmp_path / "out" / export.REPORT).read_text()) == found
    compared, delivered = found["compared"], found["delivered"]
    assert compared["prompts"] == compared["completions"] == 16
    front = measure.load_evaluation(workdir / "evaluations" / "liti_i2_e0.3.npz")
    for name in ("reward", "sft_kl"):
        assert compared[name]["stage"] == pytest.approx(getattr(front, name)[:16].mean(), rel=1e-4)
    assert compared["sft_kl"]["stage"] > 0.01
    assert delivered["share"] == pytest.approx(1, abs=1e-6 if dtype == "float32" else 0.5)
    assert (delivered["relative_error"] < 1e-6) == (dtype == "float32")
    assert (compared["sft_kl"]["difference"] == 0) == (dtype == "float32")
    for name in ("reward", "sft_kl"):
        assert compared[name]["exported"] == pytest.approx(compared[name]["stage"], rel=0.5)


def test_an_export_without_a_finite_kl_is_not_compared(tiny_run, tmp_path, monkeypatch):
    """Fails when the export is lost because its policy cannot be measured, or its report holds a nan."""

    def evaluate(examiner, params):
        raise FloatingPointError("sft_kl is nan")

    monkeypatch.setattr(export.measure, "evaluate", evaluate)
    found = export.export_stage(tiny_run[1], "sft", tmp_path / "out", prompts=8)
    assert found["compared"] == {"skipped": "sft_kl is nan"}
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_an_export_that_undoes_the_training_warns():
    """Fails when the share is of the weights in place of their displacement from SFT, or of another dtype."""
    sft = {"layers": {"up": np.full((2, 64), 0.5, np.float32)}, "norm": np.ones(8, np.float32)}
    policy = {"layers": {"up": np.full((2, 64), 0.5001, np.float32)}, "norm": np.full(8, 1.5, np.float32)}
    found = export.delivered(policy, sft, "bfloat16")
    assert found["delivered"]["share"] == pytest.approx(1, abs=1e-5)  # of the whole: the norms moved most
    assert "1 of 2 units are outside 95% to 105%, layers/up gets 0%" in found["warnings"][0]
    assert export.delivered(policy, sft, "float32")["warnings"] == []


def test_an_export_of_sft_warns_of_its_own_rounding():
    """Fails when SFT is rounded without a word, because it has no displacement from itself."""
    exact, other = ({"norm": np.full(8, value, np.float32)} for value in (0.5, 0.5001))
    assert export.delivered(exact, exact, "bfloat16")["warnings"] == []
    found = export.delivered(other, other, "bfloat16")
    assert found["delivered"]["share"] is None
    assert found["warnings"] == ["bfloat16: rounding changes weights that should stay as they are; use --dtype=float32"]


def test_compare_of_one_run_without_gold(tmp_path):
    """Fails when a baseline, which has no angles, or a job without a gold reward ends in a traceback, or a workdir that
    is named twice has two rows.
    """
    numbers = {"sft_reward": 0.1, "final_reward": 0.7, "gain_in_standard_errors": 5.0, "final_gold_reward": None}
    files.write_json(tmp_path / "summary.json", {**numbers, "final_sft_kl": 2.0, "iterations_compared": []})
    files.write_json(tmp_path / "config.json", {"seed": 3})
    files.write_json(tmp_path / "iteration_1" / "geometry.json", {"angles_degrees": [[[0.0]]]})
    result = run([sys.executable, "scripts/compare.py", str(tmp_path), str(tmp_path)])
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("| 0.100 |") == 1
    assert "| 3 | 0.100 | 0.700 | 5.0 | - | 2.00 | - |" in result.stdout
