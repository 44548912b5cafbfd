"""scripts/report.py on workdirs that are not finished, old or wrong."""

import json

import pytest

from tests.commands import run, script_command
from tests.report import hand_made
from warp_jax import files
from warp_jax.report import compared


def test_an_unfinished_workdir_without_its_data(tmp_path):
    """Fails when a job in the middle, or one whose data are gone, has no report, or the page does not say so."""
    workdir = hand_made.write(tmp_path / "w", hand_made.points()[:4])
    result = run(script_command("report.py", workdir))
    assert result.returncode == 0, result.stderr
    page = (workdir / "report.html").read_text()
    (data,) = json.loads(page.partition('id="data">')[2].partition("</script>")[0])["workdirs"]
    assert [row["stage"] for row in data["rows"]] == ["sft", "policy", "policy", "merged", "liti"]
    assert data["answers"].startswith("The held-out prompts could not be read again: ")
    assert not data["progress"]["finished"]
    assert {"part": "iteration_2/run_1", "state": "not begun"} in data["progress"]["parts"]


@pytest.mark.parametrize(
    ("arguments", "want"),
    [
        ([], "error: want one or several workdirs"),
        (["w", "v"], "error: --out: want the HTML file to write"),
        (["--out=o", "a/w", "w"], "error: want workdirs with different names, got a/w w"),
        (["empty"], "has no config.json"),
        (["w"], "want a workdir whose SFT policy is evaluated"),
        (["broken"], "is not what was written; delete it to make it again"),
    ],
)
def test_bad_input_is_one_line(tmp_path, arguments, want):
    """Fails when a wrong call ends in a traceback, or code 0."""
    hand_made.write(tmp_path / "w")
    hand_made.write(tmp_path / "broken")
    files.write_bytes(tmp_path / "broken" / "evaluations" / "sft.npz", b"")
    (tmp_path / "empty").mkdir()
    given = [x if x.startswith("--") else str(tmp_path / x) for x in arguments]
    result = run(script_command("report.py", *given))
    assert result.returncode == (74 if arguments == ["broken"] else 2)
    assert want.replace("a/w w", f"{tmp_path}/a/w {tmp_path}/w") in result.stderr
    assert result.stderr.count("\n") == 1


def test_only_settings_that_differ_are_listed():
    """Fails when an equal setting is listed, a nested one is not, or values stand under the wrong name."""
    other = hand_made.SETTINGS.replace({"warp.ema_rate": 0.3, "front.etas": (0.7,)})
    rows = compared.differences({"a": hand_made.SETTINGS, "b": other})
    assert rows == [
        {"setting": "front.etas", "a": "[0.5, 1.0]", "b": "[0.7]"},
        {"setting": "warp.ema_rate", "a": f"{hand_made.SETTINGS.warp.ema_rate}", "b": "0.3"},
    ]
