"""A local cache of the Hugging Face Hub, as huggingface_hub writes it: repositories for tests without network."""

import hashlib
import os

COMMITS = tuple(letter * 40 for letter in "abc")


def add(cache, kind, repo, folder, commit=COMMITS[0], branch="main"):
    """Store the files of a folder as a commit of a repository, and let a branch point to it."""
    root = cache / f"{kind}s--{repo.replace('/', '--')}"
    for path in (path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        blob = root / "blobs" / hashlib.sha256(content).hexdigest()
        link = root / "snapshots" / commit / path.relative_to(folder)
        for parent in (blob.parent, link.parent):
            parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link.symlink_to(os.path.relpath(blob, link.parent))
    point(cache, kind, repo, commit, branch)


def point(cache, kind, repo, commit, branch="main"):
    """Let a branch of a repository point to a commit."""
    ref = cache / f"{kind}s--{repo.replace('/', '--')}" / "refs" / branch
    ref.parent.mkdir(parents=True, exist_ok=True)
    ref.write_text(commit)


def environment(cache):
    """Variables that let a process use this cache only."""
    return {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}


def use(cache, monkeypatch):
    """Let this process use this cache only."""
    from huggingface_hub import constants

    from warp_jax.files import hub

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub._download.cache_clear()
