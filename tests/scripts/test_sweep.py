"""scripts/sweep.py: command lines that main reads back exactly, and a local run with a stub in main's place."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags

from configs import quickstart, sweep_baselines, sweep_baselines_tiny, sweep_ema_rate, sweep_figures
from tests.settings_of import typed
from warp_jax import cli

ROOT = Path(__file__).parents[2]
SWEEP = [sys.executable, "scripts/sweep.py"]
HEAD = "from configs import tiny\nfrom configs.tiny import get_config\nimport numpy as np\n"
# stands for warp_jax.main: notes its arguments; leaves what a finished job leaves, but for workdirs named bad and empty
STUB = """
import json, sys
from pathlib import Path
from absl import flags
from ml_collections import config_flags
from warp_jax.settings import from_config
sys.path.insert(0, "")
config, workdir = config_flags.DEFINE_config_file("config"), flags.DEFINE_string("workdir", None, "")
flags.FLAGS(sys.argv)
folder = Path(workdir.value)
with (folder.parent / "calls").open("a") as file:
    print(folder.name, config.value.warp.ema_rate, file=file)
if folder.name == "bad":
    sys.exit(3)
if folder.name != "empty":
    folder.mkdir()
    settings = json.dumps(from_config(config.value.to_dict()).as_json())
    for name, text in (("config.json", settings), ("summary.json", "{}"), ("report.html", "")):
        (folder / name).write_text(text)
"""
TABLE = "import sys\nprint('table of', *sys.argv[1:])"
DRIVER = """
import sys
sys.path[:0] = [""]
import functools
import itertools
import types
from absl import app
from tests.settings_of import typed
from warp_jax import cli
from warp_jax.commands import sweep
sweep.PROGRAM, sweep.COMPARE = [sys.executable, sys.argv[1]], [sys.executable, sys.argv[2]]
del sys.argv[1:3]
sweep.time = types.SimpleNamespace(monotonic=itertools.count(0, 60).__next__)  # a minute between two looks
app.run(sweep.main, flags_parser=functools.partial(cli.parse_flags, required=(), example=""))
"""


def _start(command, *arguments):
    return subprocess.run([*command, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=False)


def _run_stub(folder, config, *arguments):
    """The script with stubs in place of both programs that it starts."""
    for name, text in (("stub.py", STUB), ("table.py", TABLE)):
        (folder / name).write_text(text)
    driver = [sys.executable, "-c", DRIVER, folder / "stub.py", folder / "table.py"]
    return _start(driver, f"--config={config}", f"--out={folder}", *arguments)


def _config(folder, body):
    path = folder / "a sweep.py"
    path.write_text(f"{HEAD}{body}\n")
    return path


def _as_main_reads(line):
    """The workdir and config that main makes of a command line of a shell."""
    words = shlex.split(line)
    assert words[:3] == ["python", "-m", "warp_jax.main"]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=words[2:])
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    values(words[2:])
    return values.workdir, values["config"].value


def test_the_sweep_over_ema_rate():
    """Fails when a rate of the sweep is lost, its order changes, or it is no delta of the quickstart."""
    done = _start(SWEEP, "--config=configs/sweep_ema_rate.py", "--out=runs/x", "--print")
    assert (done.returncode, done.stderr) == (0, "")
    rates = ["0.0", "0.003", "0.01", "0.03"]
    names = ["ema_rate_0", "ema_rate_0.003", "ema_rate_0.01", "ema_rate_0.03"]
    head = "python -m warp_jax.main --config=configs/sweep_ema_rate.py --workdir=runs/x/"
    assert done.stdout.splitlines() == [
        f"{head}{name} --config.warp.ema_rate={rate}" for name, rate in zip(names, rates, strict=True)
    ]
    assert sweep_ema_rate.get_config().to_json() == quickstart.get_config().to_json()


@pytest.mark.parametrize("module", [sweep_baselines, sweep_baselines_tiny])
def test_every_baseline_is_valid_and_changes_something_else(module):
    """Fails when a baseline is no valid config, equals another one, lengths and sizes belong to another config, or a
    run ends before its anchor has moved.
    """
    points = {}
    module.sweep(points.__setitem__)
    base = typed(module.get_config())
    found = {name: base.replace(changes) for name, changes in points.items()}
    assert found["warp"] == base
    assert len({str(settings) for settings in found.values()}) == len(points) > 20
    three = {name: (settings.warp.merge, settings.warp.num_runs) for name, settings in found.items() if "three" in name}
    assert three == {"karcher_of_three": ("karcher", 3), "slerp_of_three": ("slerp", 3)}
    steps = sum(base.warp.steps_per_iteration)
    for name, rate in (("one_run_as_long", base.warp.ema_rate), ("sft_anchor_as_long", 0.0)):
        assert (found[name].warp.steps_per_iteration, found[name].warp.ema_rate) == ((2 * steps,), rate)
    assert found["one_run_batch_as_large"].rl.batch_size == 2 * base.rl.batch_size
    assert all(x.warp.anchor_every < min(x.warp.steps_per_iteration) for x in found.values())
    assert found["sft_anchor_0.3"].warp.steps_per_iteration == (steps,)
    assert found["lerp_as_far"].front.etas[-1] == pytest.approx(1.41 * base.front.etas[-1])


def test_every_figure_of_the_map_has_a_point():
    """Fails when a point of the figures is no valid config or equals another one, or the map names one that is not."""
    points = {}
    sweep_figures.sweep(points.__setitem__)
    base = typed(sweep_figures.get_config())
    found = {name: base.replace(changes) for name, changes in points.items()}
    same = {name for name, settings in found.items() if settings in (base, found["steps_9_of_9"])}
    assert same == {"steps_9_of_9", "runs_2", "liti_rate_0.3"}  # each is the point of another figure too
    assert found["averages_of_one_run"].keep.steps[-1] == base.warp.steps_per_iteration[0]
    text = Path("docs/paper_map.md").read_text()
    named = {name for names in re.findall(r"`figures ([\w.,]+)[` ]", text) for name in names.split(",")}
    assert named - {"POINT"} == set(points)


VALUES = {
    "warp.ema_rate": 1e-7 / 3,
    "warp.liti_rate": 1,  # a whole number for a float
    "warp.num_iterations": 1,
    "warp.steps_per_iteration": (5,),
    "front.etas": (0, 0.1, 1 / 3),
    "model.architecture.qk_norm": True,
    "mesh": (1, -1, 1),
    "seed": 7,
    "data.prompt_template": """it's "{text}" $HOME `x` \\n = #é, (1, 2)""",
    "data.label_field": "",
    "gold.source": "",
    "rewards.sentiment.source": "length",
    "model.architecture.sliding_window": 3,
    "model.architecture.local_pattern": (True, False),
}


def test_values_survive_the_command_line(tmp_path):
    """Fails when a float is rounded, text is not quoted or is quoted twice, or a tuple, bool or empty value is lost."""
    body = f"def sweep(add):\n    add('all', {VALUES!r})\n    add('numpy', {{'warp.ema_rate': np.float64(0.1), "
    body += "'front.etas': list(np.linspace(0, 1, 3))})"
    jobs = tmp_path / "jobs.txt"
    done = _start(SWEEP, f"--config={_config(tmp_path, body)}", f"--out={tmp_path}/o u t", f"--jobs={jobs}")
    assert (done.returncode, done.stderr) == (0, "")
    first, second = jobs.read_text().splitlines()
    workdir, config = _as_main_reads(first)
    assert workdir == f"{tmp_path}/o u t/all"
    for path, want in VALUES.items():
        got = config
        for key in path.split("."):
            got = got[key]
        assert got == want
        assert type(got) is (float if path == "warp.liti_rate" else type(want))
    _, config = _as_main_reads(second)
    assert (config.warp.ema_rate, config.front.etas) == (0.1, (0.0, 0.5, 1.0))


def test_a_value_for_all_points(tmp_path):
    """Fails when --config.x is dropped or wins over a point's own value, or --only takes all or lets a typo pass."""
    body = "def sweep(add):\n    for seed in (1, 2, 3):\n        add(f's{seed}', {'seed': seed, 'rl.batch_size': 4})"
    common = ["--config.rl.kl_coef=0.25", "--config.rl.batch_size=8"]
    done = _start(SWEEP, f"--config={_config(tmp_path, body)}", *common, f"--out={tmp_path}", "--only=s3,s2", "--print")
    read = [_as_main_reads(line) for line in done.stdout.splitlines()]
    assert [(Path(workdir).name, config.seed) for workdir, config in read] == [("s2", 2), ("s3", 3)]
    assert {(config.rl.kl_coef, config.rl.batch_size) for _, config in read} == {(0.25, 4)}
    done = _start(SWEEP, f"--config={tmp_path}/a sweep.py", f"--out={tmp_path}", "--only=s2,s9", "--print")
    assert (done.returncode, done.stdout) == (cli.BAD_INPUT, "")
    assert done.stderr == "error: --only: got s9, want names of the sweep: s1, s2, s3\n"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("", "has no sweep(add)"),
        ("def sweep(add): pass", "adds no point"),
        (
            "def sweep(add): add('a', {'warp.ema_rat': 0.1})",
            "config.warp.ema_rat: no setting 'ema_rat', did you mean ema_rate?",
        ),
        ("def sweep(add): add('a', {'warp.num_runs': 2.0})", "num_runs"),
        ("def sweep(add): add('a', {'seed': True})", "seed"),
        ("def sweep(add): add('a', {'data.chat': 1})", "config.data.chat: got 1"),
        ("def sweep(add): add('a', {'warp.ema_rate': 1.5})", "point a: config.warp.ema_rate: got 1.5"),
        ("def sweep(add): add('a', {'data.source': 5})", "config.data.source: got 5"),
        ("def sweep(add): add('a', {'front.etas': 0.5})", "config.front.etas: got 0.5"),
        ("def sweep(add): add('a', {'data.source': 'x\\ny'})", "no line break"),
        ("def sweep(add): add('a', {'seed=1 --config.seed': 2})", "want the path of a config value"),
        ("def sweep(add): add('../a', {'seed': 2})", "it names a folder"),
        ("def sweep(add): add('a', {'seed': 1}); add('a', {'seed': 2})", "two points have the name 'a'"),
    ],
)
def test_a_bad_sweep_starts_nothing(body, message, tmp_path):
    """Fails when a point that main would refuse or misread is let through, or ends in a traceback."""
    body = body.replace("(add): add", "(add): add('fine', {'seed': 3}); add")
    done = _run_stub(tmp_path, _config(tmp_path, body))
    assert (done.returncode, done.stdout) == (cli.BAD_INPUT, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert not (tmp_path / "calls").exists()


@pytest.mark.parametrize("flag", ["--print", "--jobs={}/jobs.txt"])
def test_a_bad_point_has_no_command(flag, tmp_path):
    """Fails when a point that main would refuse is checked only before a start."""
    body = "def sweep(add):\n    for rate in (0.5, 1.5):\n        add(f'{rate}', {'warp.ema_rate': rate})"
    done = _start(SWEEP, f"--config={_config(tmp_path, body)}", f"--out={tmp_path}", flag.format(tmp_path))
    assert (done.returncode, done.stdout) == (cli.BAD_INPUT, "")
    assert done.stderr.startswith("error: sweep, point 1.5: config.warp.ema_rate: got 1.5")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "jobs.txt").exists()


def test_points_run_one_after_another(tmp_path):
    """Fails when a failure stops the sweep or is forgotten, no report counts as success, a finished point of this
    config runs again or of another one is skipped, the time left is wrong, or the table has an unfinished point."""
    body = "def sweep(add):\n    for i, name in enumerate(('one', 'bad', 'empty', 'two')):\n"
    config = _config(tmp_path, body + "        add(name, {'warp.ema_rate': i / 10})")
    done = _run_stub(tmp_path, config)
    assert done.returncode == 1
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == ["one 0.0", "bad 0.1", "empty 0.2", "two 0.3"]
    assert done.stdout == f"table of {tmp_path}/one {tmp_path}/two\n"
    assert done.stderr.splitlines()[:2] == ["0 of 4 points are finished", "[1/4] one: started"]
    assert "[2/4] bad: started, about 6.0 min left" in done.stderr  # 2 minutes for one, three to go
    assert "[4/4] two: started, about 1.3 min left" in done.stderr
    assert "bad: failed with exit code 3\n" in done.stderr
    assert "empty: failed with exit code 0 and no report" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("failed: bad, empty; ")
    made = tmp_path / "two" / "config.json"
    made.write_text(json.dumps(json.loads(made.read_text()) | {"seed": 99}))
    (tmp_path / "calls").unlink()
    done = _run_stub(tmp_path, config, "--only=one,two")
    assert (tmp_path / "calls").read_text() == "two 0.3\n"
    assert "1 of 2 points are finished" in done.stderr


def test_a_point_is_finished_if_its_config_has_the_commits_of_its_sources(tmp_path):
    """Fails when the commit that main writes into config.json makes a finished point run again, or count as failed."""
    config = _config(tmp_path, "def sweep(add):\n    add('one', {'data.source': 'hf://org/data/main'})")
    _run_stub(tmp_path, config)
    made = tmp_path / "one" / "config.json"
    made.write_text(made.read_text().replace("hf://org/data", f"hf://org/data@{'a' * 40}"))
    done = _run_stub(tmp_path, config)
    assert done.returncode == 0
    assert "1 of 1 points are finished" in done.stderr


def test_the_programs():
    """Fails when main or the table's program is another one, or is gone."""
    code = "from warp_jax.commands import sweep; print(*sweep.PROGRAM); sweep.subprocess.run(sweep.COMPARE)"
    done = _start([sys.executable, "-u", "-c", code])
    assert done.stdout == f"{sys.executable} -m warp_jax.main\n"
    assert done.stderr.startswith("error: want finished workdirs")
