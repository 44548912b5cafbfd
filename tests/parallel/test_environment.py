"""What a start notes about itself."""

import subprocess

from warp_jax.parallel import environment


def test_the_commit_is_that_of_this_project(tmp_path, monkeypatch):
    """Fails when the repository that a copy is installed in counts, or changed files do not show."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=b@c"]
    (tmp_path / "x").write_text("1")
    for command in (["init", "-q"], ["add", "x"], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    commit = environment.commit()
    assert len(commit) == 40
    (tmp_path / "x").write_text("2")
    assert environment.commit() == f"{commit}+"
    (tmp_path / "inside").mkdir()
    monkeypatch.setattr(environment, "ROOT", tmp_path / "inside")
    assert environment.commit() == ""
