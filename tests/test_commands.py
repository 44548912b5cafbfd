"""The command warp-jax: its overview, subcommands, completion, and configs by name, also away from the checkout."""

import runpy
import shlex
import subprocess
import sys

import pytest

from tests.commands import ENV, ROOT
from warp_jax import cli, commands

WARP_JAX = [sys.executable, "-P", "-m", "warp_jax.commands"]  # -P: as the installed program, which is in bin/
BAD = "error: flag --config=tiny: config.warp."
FRONTS = {path.stem for path in ROOT.glob("scripts/*.py") if "commands.run(" in path.read_text()}


def _start(folder, command, *arguments):
    """Run a command in another folder than the checkout, as after an installation."""
    env = ENV | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([*command, *arguments], cwd=folder, env=env, capture_output=True, text=True, check=False)


def test_the_overview_fits_a_screen_and_imports_nothing(tmp_path):
    """Fails when a command is not listed, the text is larger than a screen, or absl is imported, which takes longer."""
    program = "import sys; from warp_jax import commands; commands.main()"
    code = f"try:\n  exec({program!r})\nfinally:\n  print(*{{'absl', 'jax', 'numpy'}} & sys.modules.keys())"
    done = _start(tmp_path, [sys.executable, "-c", code], "--help")
    lines = done.stdout.splitlines()
    assert (done.returncode, lines.pop()) == (0, "")
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 100
    listed = [line.split()[0] for line in lines if line.startswith("  ") and not line.startswith("  warp-jax ")]
    assert listed == list(commands.COMMANDS)


def test_every_command_but_run_and_completion_has_a_front():
    """Fails when a script of the documents is gone, or starts another command."""
    modules = {command.module.rpartition(".")[2] for command in commands.COMMANDS.values()}
    assert modules - {"main", "completion", "export"} | {"export_hf"} == FRONTS
    for name in FRONTS:
        wanted = {"compile_for_tpu": "compile", "export_hf": "export", "best_of_n": "best-of-n"}.get(name, name)
        assert f'commands.run("{wanted}")' in (ROOT / "scripts" / f"{name}.py").read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "start"),
    [
        ([], 2, ""),
        (["reprot"], 2, "error: unknown command 'reprot': did you mean report? See warp-jax --help\n"),
        (["--config=tiny"], 2, "error: unknown command '--config=tiny': want one of run, sweep, "),
        (["completion", "tcsh"], 2, "error: completion: got 'tcsh', want one of bash, zsh, fish\n"),
        (["run", "--config=tinny", "--workdir=x"], 2, "error: flag --config=tinny: no config 'tinny', want the path"),
        (["run", "--wrkdir=x"], 2, "error: no flag --wrkdir; did you mean --workdir?\n"),
        (["status", "--logdir=x"], 2, "error: no flag --logdir; see --help, or try runs/quickstart\n"),
        (["run", "--config=tiny"], 2, "error: --workdir is missing; try --config=quickstart --workdir=runs/quickst"),
        (
            ["run", "--config=tiny", "--workdir=x", "--config.warp.ema_rat=1"],
            2,
            f"{BAD}ema_rat: no setting 'ema_rat', did you mean ema_rate?\n",
        ),
        (
            ["run", "--config=tiny", "--workdir=x", "--config.warp.zz=1"],
            2,
            f"{BAD}zz: no setting 'zz', want one of anchor, ",
        ),
    ],
)
def test_a_wrong_call_is_one_line(tmp_path, arguments, code, start):
    """Fails when a typo has no hint, names are not listed, or a wrong call ends in a traceback or with code 0."""
    done = _start(tmp_path, WARP_JAX, *arguments)
    assert done.returncode == code
    assert done.stderr.startswith(start)
    assert done.stderr.count("\n") == bool(arguments)
    assert "Traceback" not in done.stderr
    assert "tinny" not in done.stderr or f"one of {', '.join(cli.config_names())}; did you mean tiny?" in done.stderr


def test_the_help_of_a_command(tmp_path):
    """Fails when a required flag has no mark, another one has, a default is not shown, absl's own flags are listed, or
    the exit code is absl's 1.
    """
    done = _start(tmp_path, WARP_JAX, "merge", "--help", "--nonsense")
    flags = {line[2:].split()[0]: line for line in done.stdout.splitlines() if line[2:4] == "--"}
    assert (done.returncode, done.stderr) == (0, "")
    assert {name for name, line in flags.items() if line[0] == "*"} == {"--init", "--policies", "--out"}
    assert "Default: slerp." in done.stdout
    assert "--verbosity" not in flags
    assert flags.keys() >= {"--etas", "--method", "--memory_gb"}


def test_the_version(tmp_path):
    """Fails when --version without a command prints no version, or the flag asks for a config."""
    done = _start(tmp_path, WARP_JAX, "--version")
    assert (done.returncode, done.stdout.partition(" ")[0], done.stderr) == (0, "warp_jax", "")


def test_ctrl_c_while_jax_is_imported(tmp_path):
    """Fails when the handler of the interrupt imports the half-imported JAX again, and ends with that error."""
    jax = "import sys\nif hasattr(sys, 'again'):\n    raise AttributeError\nsys.again = True\nraise KeyboardInterrupt"
    (tmp_path / "jax.py").write_text(jax)
    done = _start(tmp_path, WARP_JAX, "run", "--config=tiny", "--workdir=x")
    assert (done.returncode, done.stderr) == (130, "error: stopped by SIGINT\n")


def test_every_config_is_found_by_its_name_without_the_checkout(monkeypatch, tmp_path):
    """Fails when a config imports from the folder configs/, which no wheel has, or is not in the package."""
    monkeypatch.setitem(sys.modules, "configs", None)  # import fails
    monkeypatch.chdir(tmp_path)
    assert set(cli.config_names()) == {path.stem for path in ROOT.glob("configs/*.py")} - {"__init__"}
    for name in cli.config_names():
        assert runpy.run_path(cli.find_config(name))["get_config"]().warp.num_runs >= 1


def test_a_file_comes_before_a_name(monkeypatch, tmp_path):
    """Fails when a path is looked up as a name, a name hides a file, or the argument of get_config is lost."""
    monkeypatch.chdir(tmp_path)
    assert cli.find_config("tiny:x") == f"{ROOT}/warp_jax/configs/tiny.py:x"
    for name in ("tiny", "mine.py"):
        (tmp_path / name).touch()
        assert cli.find_config(f"{name}:x") == f"{name}:x"
    (tmp_path / "quickstart").mkdir()
    assert cli.find_config("quickstart") == f"{ROOT}/warp_jax/configs/quickstart.py"
    with pytest.raises(ValueError, match=r"no config 'configs/nosuch.py', want the path .* or one of default, "):
        cli.find_config("configs/nosuch.py")


def test_a_users_config_builds_on_ours_and_on_its_neighbours(tmp_path):
    """Fails when a file outside the checkout cannot import our configs, or a module beside it, or a sweep takes no
    name or prints the place of the installation instead.
    """
    (tmp_path / "rates.py").write_text("RATES = (0.1, 0.2)")
    (tmp_path / "mine.py").write_text(
        "import rates\nfrom warp_jax.configs.tiny import get_config\n"
        "def sweep(add):\n    for rate in rates.RATES:\n        add(f'r{rate}', {'warp.ema_rate': rate})\n"
    )
    done = _start(tmp_path, WARP_JAX, "sweep", "--config=mine.py", "--out=o", "--print")
    head = "python -m warp_jax.main --config="
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        f"{head}mine.py --workdir=o/r{rate} --config.warp.ema_rate={rate}" for rate in (0.1, 0.2)
    ]
    done = _start(tmp_path, WARP_JAX, "sweep", "--config=sweep_ema_rate", "--out=o", "--print", "--only=ema_rate_0.01")
    assert done.stdout == f"{head}sweep_ema_rate --workdir=o/ema_rate_0.01 --config.warp.ema_rate=0.01\n"


def _complete(tmp_path, *words):
    """What bash offers for the last word."""
    script = _start(tmp_path, WARP_JAX, "completion", "bash").stdout
    arguments = shlex.join(["warp-jax", words[-1], words[-2] if len(words) > 1 else ""])
    call = f"COMP_WORDS=({shlex.join(['warp-jax', *words])}); COMP_CWORD={len(words)}; _warp_jax {arguments}"
    done = _start(tmp_path, ["bash", "-c", f'{script}\n{call}\nprintf "%s\\n" "${{COMPREPLY[@]}}"'])
    assert done.stderr == ""
    return done.stdout.split()


def test_bash_completes_commands_flags_and_configs(tmp_path):
    """Fails when a command, a flag of it, or a name after --config or --config= is not offered, or a wrong one is."""
    assert _complete(tmp_path, "s") == ["sweep", "status", "sample"]
    assert _complete(tmp_path, "merge", "--e") == ["--etas"]
    assert _complete(tmp_path, "export", "--e") == []
    assert _complete(tmp_path, "run", "--con") == ["--config"]
    assert _complete(tmp_path, "run", "--config", "qui") == ["quickstart"]
    assert _complete(tmp_path, "run", "--config", "=", "qui") == ["quickstart"]  # bash splits words at =
    assert "tiny" in _complete(tmp_path, "run", "--config", "=")
    assert _complete(tmp_path, "run", "--config=qui") == ["--config=quickstart"]  # zsh does not
