"""The notebook of the documentation, executed from its first cell to its last."""

import re

import pytest

from tests.commands import ENV, ROOT

nbformat = pytest.importorskip("nbformat", reason="needs nbformat: pip install -e '.[test]'")
nbclient = pytest.importorskip("nbclient", reason="needs nbclient: pip install -e '.[test]'")
pytest.importorskip("ipykernel", reason="needs ipykernel: pip install -e '.[test]'")

NOTEBOOK = ROOT / "docs" / "warp_in_ten_minutes.ipynb"


@pytest.fixture
def executed(tmp_path, monkeypatch):
    """The notebook with its outputs. Its cell that installs packages is skipped: these are the installed ones."""
    for name, value in (ENV | {"TMPDIR": str(tmp_path), "IPYTHONDIR": str(tmp_path / "ipython")}).items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
    return nbclient.NotebookClient(notebook, timeout=300, resources=resources).execute()


def _printed(notebook):
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    return "".join(output.text for output in outputs if output.get("name") == "stdout"), outputs


def test_the_notebook_shows_what_it_says(executed):
    """Fails when a cell fails, the reward does not rise, the merge by hand is not the job's, or the plot is missing."""
    printed, outputs = _printed(executed)
    assert "lerp {'0': [0.5, 0.5], '1': [1.0, 1.0]}" in printed
    assert "slerp {'0': [0.707, 0.707], '1': [1.0, 1.0]}" in printed
    assert float(re.search(r"\(\+([\d.]+) standard errors\)", printed)[1]) > 2
    assert "equal: True" in printed
    assert any("image/png" in output.get("data", {}) for output in outputs)


def test_the_notebook_is_stored_without_outputs():
    """Fails when outputs are committed: they make the file large, and each run changes them."""
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert cells
    assert not any(cell.outputs or cell.execution_count for cell in cells)
