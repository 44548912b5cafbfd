"""The parts of the documentation site that are made from the code: docs/hooks."""

import runpy
import sys

import pytest
from ml_collections import config_dict

from configs import default
from tests.commands import ROOT, run


@pytest.fixture
def hook():
    """Read a file of docs/hooks by its name."""
    return lambda name: runpy.run_path(str(ROOT / "docs" / "hooks" / f"{name}.py"))


def _leaves(config, prefix=""):
    for name, value in config.items():
        if isinstance(value, config_dict.ConfigDict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value.to_dict() if isinstance(value, config_dict.ConfigDict) else value


def test_the_table_has_every_setting_with_its_default(hook):
    """Fails when a setting is left out, stands in another group, or has another default than in a job."""
    rows, group = {}, None
    for line in hook("config_table")["tables"]((ROOT / "configs" / "default.py").read_text()).splitlines():
        if line.startswith("## "):
            group = line.removeprefix("## config").removeprefix(".")
        elif line.startswith("| `"):
            name, _, value, _ = line.removeprefix("| ").split(" | ", 3)
            rows[f"{group}.{name.strip('`')}".removeprefix(".")] = eval(value.strip("`"))
    assert rows == dict(_leaves(default.get_config()))


def test_a_row_has_type_range_and_all_comments(hook):
    """Fails when a bound is lost or turned round, or only one of two comments of a setting is kept."""
    source = (
        "def get_config():\n"
        "    config.warp = ConfigDict()  # the averages\n"
        "    # where the anchor\n"
        "    # goes\n"
        "    config.warp.ema_rate = 0.01  # per step | 0 = stays\n"
        "    config.warp.merge = 'slerp'\n"
    )
    assert hook("config_table")["tables"](source).splitlines()[4:] == [
        "## config.warp",
        "",
        "the averages",
        "",
        "| setting | type | default | meaning |",
        "|---|---|---|---|",
        r"| `ema_rate` | float, ≥ 0, ≤ 1 | `0.01` | where the anchor goes per step \| 0 = stays |",
        "| `merge` | one of slerp, karcher, slerp_symmetric, lerp, task_arithmetic, model_stock, slerp_full_weights "
        "| `'slerp'` |  |",
    ]


def test_flags_are_those_of_each_program():
    """Fails when a flag of a program is missing, or one of another program or of absl is listed."""
    code = """import flag_tables as tables
for name in ("warp_jax/commands/status.py", "warp_jax/main.py", "warp_jax/commands/status.py"):
    print(*[flag.name for flag in tables.flags_of(tables.ROOT / name)])
"""
    result = run([sys.executable, "-c", code], PYTHONPATH=f"{ROOT}:{ROOT / 'docs' / 'hooks'}")
    first, main, again = result.stdout.splitlines()
    assert first == again == "verify"
    assert {"config", "workdir", "run"} < set(main.split())


def test_docstrings_are_plain_text(hook):
    """Fails when a formula becomes markup, a sign begins emphasis, or a section loses its arguments."""
    lines = ["The *length* |d| of `a * b`:", "    |d| = 1", "Then text.", "", "Args:", "  x: *y.", ""]
    assert hook("docstrings")["to_rst"](lines) == [
        *(r"The \*length\* \|d\| of `a * b`:", "", "::", "", "    |d| = 1", "", "Then text."),
        *("", "Args:", r"  x: \*y.", ""),
    ]
