"""A local cache of the Hugging Face Hub, as huggingface_hub writes it: repositories for tests without network."""

import contextlib
import hashlib
import http.server
import json
import os
import re
import threading
import urllib.parse

COMMITS = tuple(letter * 40 for letter in "abc")


def add(cache, kind, repo, folder, *, commit=COMMITS[0], branch="main"):
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

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    forget()


def forget():
    """Let this process ask the Hub again."""
    from warp_jax.files import hub

    hub._commit_now.cache_clear()
    hub._download.cache_clear()


class _Handler(http.server.BaseHTTPRequestHandler):
    """The requests of `snapshot_download`, answered from a cache folder; repositories of org `gated` are refused."""

    def do_GET(self):
        path = urllib.parse.unquote(self.path.partition("?")[0]).strip("/")
        self.server.requested.append(path)
        match = re.fullmatch(
            r"(?:api/)?(?:(model|dataset)s/)?([^/]+/[^/]+)/(revision|tree|resolve)/([^/]+)(?:/(.+))?", path
        )
        if match is None:
            return self._answer(404, b"", {})
        kind, repo, what, revision, name = match.groups()
        root = self.server.cache / f"{kind or 'model'}s--{repo.replace('/', '--')}"
        if repo.startswith("gated/"):
            return self._answer(403, b"", {"X-Error-Code": "GatedRepo"})
        if not root.is_dir():
            return self._answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        ref = root / "refs" / revision
        commit = ref.read_text() if ref.is_file() else revision
        if not (snapshot := root / "snapshots" / commit).is_dir():
            return self._answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if what == "resolve":
            return self._answer(
                200, content := (snapshot / name).read_bytes(), {"X-Repo-Commit": commit, "ETag": _oid(content)}
            )
        files = {str(path.relative_to(snapshot)): path.read_bytes() for path in snapshot.rglob("*") if path.is_file()}
        tree = [{"type": "file", "path": name, "size": len(x), "oid": _oid(x)} for name, x in files.items()]
        content = tree if what == "tree" else {"id": repo, "sha": commit}
        return self._answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    do_HEAD = do_GET

    def _answer(self, code, content, headers):
        self.send_response(self.server.failure or code)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *args):
        pass


def _oid(content):
    return hashlib.sha1(content).hexdigest()


@contextlib.contextmanager
def served(cache, monkeypatch, failure=0):
    """Serve a cache as the Hub to this process; the value is the list of requested paths.

    failure: the status of all answers, such as 503.
    """
    from huggingface_hub import constants

    with http.server.ThreadingHTTPServer(("localhost", 0), _Handler) as server:
        server.cache, server.requested, server.failure = cache, [], failure
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", endpoint := f"http://localhost:{server.server_port}")
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield server.requested
        server.shutdown()
