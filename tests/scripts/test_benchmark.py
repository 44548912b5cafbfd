"""The programs that scripts/benchmark.py times: they run, and do the work that they are asked for."""

import gc
import importlib
import json
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.commands import ROOT, run, script_command
from warp_jax import merging

SIZES = {"vocab": 64, "width": 24, "layers": 3, "heads": 3, "kv_heads": 1, "mlp": 16}
TINY = {"batch": 4, "prompt": 3, "shortest": 5, "longest": 5, **SIZES}
MIXED = {"batch": 400, "prompt": 3, "shortest": 3, "longest": 8, **SIZES}


@pytest.fixture
def programs(monkeypatch):
    for folder in ("scripts", "scripts/speed"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    yield importlib.import_module
    names = [name for name in sys.modules if name.startswith(("with_", "speed", "protocol"))]
    for name in names:
        sys.modules.pop(name)


def _check_lengths(lengths):
    counts = np.bincount(lengths, minlength=9)
    assert counts[:3].sum() == 0
    assert counts.sum() == counts[3:9].sum() == 400
    assert np.all(np.abs(counts[3:9] - 400 / 6) < 4 * np.sqrt(400 / 6))


@pytest.mark.parametrize("program", ["with_jax", "with_torch"])
@pytest.mark.parametrize("stage", ["decode", "score"])
def test_each_program_computes_as_many_tokens(programs, program, stage):
    """Fails when a stage ends early, or one library samples or scores other sizes than the other."""
    work = programs("protocol").Work(stage, **TINY)
    assert programs(program).make(work)()["tokens"] == 4 * 5


@pytest.mark.slow
def test_an_evaluation_has_all_its_prompts(programs):
    """Fails when an evaluation leaves out prompts, or tokens of their completions."""
    work = programs("protocol").Work("evaluate", **TINY)
    assert programs("with_jax").make(work)()["tokens"] == 1024 * 5


def test_stop_token_makes_every_length_equally_likely(programs):
    """Fails when the probability at a token is not 1 / (lengths left), or lengths are off by one."""
    protocol = programs("protocol")
    work = protocol.Work("decode", **MIXED)
    odds = np.exp(np.array(protocol.stop_log_odds(work)).clip(-700, 700))
    stops = odds / (1 + odds)
    lengths = stops * np.cumprod([1, *(1 - stops[:-1])])
    np.testing.assert_allclose(lengths, [0, 0, *[1 / 6] * 6], atol=1e-12)


def test_warp_jax_samples_lengths_evenly(programs):
    """Fails when the lengths in warp_jax are not those that are asked for, or depend on the row."""
    work, program = programs("protocol").Work("decode", **MIXED), programs("with_jax")
    model = program.make_model(work)
    with jax.numpy_dtype_promotion("standard"):  # as outside the tests
        rollout = program.make_generate(work, model)(model.trained)
    lengths = np.asarray(rollout.completion_mask.sum(1))
    _check_lengths(lengths)
    last = np.take_along_axis(np.asarray(rollout.completion_ids), lengths[:, None] - 1, axis=1)
    assert np.all(last == 0)


def test_each_row_counts_its_own_tokens(programs):
    """Fails when the probability of the stop token follows the step of the loop instead of the row's own tokens."""
    work, program = programs("protocol").Work("decode", **MIXED), programs("with_jax")
    so_far = np.array([1, 2, 5, 7])  # tokens of each completion; 3 of the prompt before them
    cache = types.SimpleNamespace(valid=jnp.asarray(np.arange(20) < 3 + so_far[:, None]))
    logits = jax.random.normal(jax.random.key(0), (4, 1, 64))
    changed, _ = program.with_mixed_lengths(lambda *args: (logits, cache), work)(None, None, None, cache)
    stops = jax.nn.softmax(changed[:, 0])[:, 0]
    np.testing.assert_allclose(stops, [0, 1 / 6, 1 / 3, 1], atol=1e-6)
    np.testing.assert_array_equal(changed[..., 1:], logits[..., 1:])


def test_transformers_sample_lengths_evenly(programs):
    """Fails when the lengths in transformers are not those that are asked for, or tokens after the stop count."""
    work, program = programs("protocol").Work("decode", **MIXED), programs("with_torch")
    completions, facts = program.Training(work).decode()
    lengths = program.mask_of(work, completions).sum(1)
    _check_lengths(lengths.numpy())
    assert facts["tokens"] == lengths.sum()
    for row, length in zip(completions.tolist(), lengths.tolist(), strict=True):
        assert row.index(0) == length - 1


@pytest.mark.slow
@pytest.mark.parametrize("trained_layers", [0, 1])
def test_an_update_trains(programs, trained_layers):
    """Fails when the update of the benchmark does nothing, or freezes no layer."""
    work = programs("protocol").Work("rl_step", **TINY, trained_layers=trained_layers)
    with jax.numpy_dtype_promotion("standard"):
        facts = programs("with_jax").make(work)()
    assert facts["grad_norm"] > 0
    assert facts["tokens"] == 4 * 5


def test_torch_trains_on_mixed_lengths(programs):
    """Fails when the update in torch does nothing, or trains on tokens after the stop token."""
    work, program = programs("protocol").Work("rl_step", **{**MIXED, "batch": 4}), programs("with_torch")
    facts = program.make(work)()
    assert facts["grad_norm"] > 0
    assert 4 * 3 <= facts["tokens"] <= 4 * 8
    completions = torch.tensor([[5, 0, 7, 8], [5, 6, 7, 0]])
    one, other = (program.Training(work._replace(batch=2)) for _ in range(2))
    one.update(completions)
    other.update(torch.where(completions == 8, 9, completions))
    assert all(map(torch.equal, one.policy.parameters(), other.policy.parameters()))


@pytest.mark.parametrize("is_plain", [False, True])
def test_plain_means_a_fixed_anchor(programs, monkeypatch, is_plain):
    """Fails when plain REINFORCE computes the average, or WARP does not."""
    monkeypatch.setattr(merging, "ema_update", merging.ema_update)  # to be restored
    work, program = programs("protocol").Work("update", **TINY, is_plain=is_plain), programs("with_jax")
    state, step = program.make_update(work, program.make_model(work))
    before = jax.tree.leaves(jax.tree.map(np.array, state.anchor_params))
    with jax.numpy_dtype_promotion("standard"):
        state, _ = step(state, program.rollout_of(work))
    after = jax.tree.leaves(state.anchor_params)
    assert all(map(np.array_equal, before, after)) == is_plain


@pytest.mark.parametrize(("stage", "copies"), [("decode", 1), ("update", 4), ("rl_step", 5), ("merge", 3)])
def test_a_stage_holds_only_what_it_needs(programs, stage, copies):
    """Fails when a stage keeps copies of the weights that a job would not hold."""
    gc.collect()
    before = sum(x.nbytes for x in jax.live_arrays())
    work, program = programs("protocol").Work(stage, **TINY), programs("with_jax")
    stage_fn = program.make(work)
    gc.collect()
    held = sum(x.nbytes for x in jax.live_arrays()) - before
    weights = sum(x.size * 4 for x in jax.tree.leaves(program.make_model(work).trained))
    assert held / weights == pytest.approx(copies, abs=0.1)
    del stage_fn


def test_torch_merges_as_warp_jax_does(programs):
    """Fails when the merge that the benchmark compares with is another one."""
    rng = np.random.default_rng(0)
    shapes = {"layers.0.a": (4, 3), "layers.0.b": (5,), "layers.1.a": (4, 3), "embed": (7, 2)}
    init, first, second = ({k: rng.normal(size=v).astype(np.float32) for k, v in shapes.items()} for _ in range(3))
    merged = programs("with_torch").slerp(*({k: torch.tensor(v) for k, v in p.items()} for p in (init, first, second)))
    ours = merging.slerp(*_named(init), [*_named(first, second)], stacked=None)
    for name, value in _named(merged)[0].items():
        np.testing.assert_allclose(value, ours[name], rtol=1e-5, atol=1e-5)


def _named(*policies):
    return [{name.replace(".", "/"): jnp.asarray(value) for name, value in p.items()} for p in policies]


@pytest.mark.parametrize("name", ["trl", "tunix"])
def test_other_trainers_train(name):
    """Fails when the step of TRL or Tunix does not run, or counts other tokens."""
    pytest.importorskip(name)
    work = {**TINY, "stage": "rl_step"}
    command = [sys.executable, ROOT / f"scripts/speed/with_{name}.py", json.dumps(work)]
    ended = subprocess.run(command, input="\n", capture_output=True, text=True, check=True)
    facts = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
    assert [fact["tokens"] for fact in facts] == [20, 20]


@pytest.mark.slow
def test_a_worker_runs_when_asked(programs):
    """Fails when a worker counts the run that compiles, or hides why its program ended."""
    sides, protocol = programs("speed.sides"), programs("speed.protocol")
    work = protocol.Work("decode", **TINY)
    with sides.Worker(sys.executable, "with_torch.py", work) as worker:
        worker.run()
        worker.run()
    assert [fact["tokens"] for fact in worker.runs] == [20, 20]
    unknown = sides.Worker(sys.executable, "with_torch.py", work._replace(stage="dance"))
    with pytest.raises(RuntimeError, match=r"^with_torch.py ended: KeyError: 'dance'$"), unknown:
        pass


def test_a_command_ends_with_its_file(programs):
    """Fails when a command is not measured up to the file that ends it, or its failure is not reported."""
    sides = programs("speed.sides")
    code = "import os, sys, time; time.sleep(1); os.mkdir(sys.argv[1]); open(sys.argv[1] + '/rows', 'w').write('1')"
    endless = sides.Command(ROOT, ["-c", f"{code}; time.sleep(100)", "{workdir}"], until="rows")
    began = time.monotonic()
    with endless:
        endless.run()
    assert time.monotonic() - began < 60
    assert 1 < endless.runs[0]["seconds"] < 30
    assert endless.runs[0]["peak_bytes"] > 1e6
    with (
        pytest.raises(RuntimeError, match="failed: NameError: name 'nobody' is not defined"),
        sides.Command(ROOT, ["-c", "nobody"]),
    ):
        pass


def test_disturbed_pairs_are_repeated(programs):
    """Fails when a disturbed pair counts, the sides do not take turns, or a busy machine is never given up."""
    sides, order = programs("speed.sides"), []

    class Fake(sides.Side):
        def __init__(self, name, loads):
            super().__init__()
            self.name, self.loads = name, iter(loads)

        def run(self):
            order.append(self.name)
            self.runs.append({"seconds": 1.0, "others": next(self.loads), "number": len(order)})

    ours, theirs = Fake("ours", [0, 0.1, 0.3, 0]), Fake("theirs", [0, 0.9, 0, 0.2])
    assert sides.run_pairs([ours, theirs], 2, 0.2) == 2
    assert order == ["ours", "theirs", *["theirs", "ours"] * 3]
    assert [fact["number"] for fact in ours.runs] == [1, 8]
    assert [fact["number"] for fact in theirs.runs] == [2, 7]
    with pytest.raises(sides.DisturbedError, match=r"^other processes used more than 0.2 cores during 3 pairs"):
        sides.run_pairs([Fake("ours", [1] * 3)], 2, 0.2)


def test_the_cores_of_others_are_counted(programs):
    """Fails when the work of a side counts as that of other processes, or that of others is not seen."""
    sides = programs("speed.sides")
    busy = "import time\nwhile time.process_time() < 1: pass"  # a second of processor time, however busy the machine is
    spin = sides.Command(ROOT, ["-c", busy])
    used = spin._cpu_seconds()
    spin.run()
    assert spin._cpu_seconds() - used > 0.9
    before = sides.busy_seconds()
    subprocess.run([sys.executable, "-c", busy], check=True)
    assert sides.busy_seconds() - before > 0.9


def test_an_environment_is_made_once(programs, monkeypatch, tmp_path):
    """Fails when packages are installed again, or not again for other versions or after a failure."""
    peers, commands = programs("speed.peers"), []

    def fake_run(command, **options):
        commands.append([*map(str, command)])
        if "venv" in command:
            command[-1].mkdir()
        return types.SimpleNamespace(returncode=int("bad" in command), stdout="", stderr="pip says\nno such package")

    monkeypatch.setattr(peers.subprocess, "run", fake_run)
    for wanted in (("a==1",), ("a==1",), ("a==2",)):
        assert peers.python_of("peer", wanted, tmp_path) == tmp_path / "peer/bin/python"
    assert [command[-1] for command in commands] == [str(tmp_path / "peer"), "a==1", str(tmp_path / "peer"), "a==2"]
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"^peer: .* failed: no such package$"):
            peers.python_of("peer", ("bad",), tmp_path)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--shapes=16x32", "--shapes: got '16x32', want such as 16x32+64 or 16x32+16-64"),
        ("--shapes=16x32+64-16", "--shapes: got '16x32+64-16', want such as 16x32+64 or 16x32+16-64"),
        ("--shapes=3x32+64", "--shapes: got '3x32+64', want an even number of sequences: a prompt has 2 completions"),
        ("--against=nobody", "--against: got 'nobody', want torch, trl, llama_cpp, tunix, plain, or the folder of"),
        ("--stages=startup", "--stages: got 'startup', want with --against=torch some of decode, score, update"),
    ],
)
def test_bad_flags_are_refused(flag, message):
    """Fails when a flag is not checked before programs are started."""
    ended = run(script_command("benchmark.py", flag))
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"error: {message}")
    assert ended.stderr.count("\n") == 1
