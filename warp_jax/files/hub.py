"""Repositories of the Hugging Face Hub: hf://ORG/NAME[@REVISION][/PATH], downloaded once into the cache of the Hub."""

import contextlib
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from warp_jax.exit_codes import TRY_AGAIN

PREFIX = "hf://"
WANT = f"{PREFIX}ORG/NAME, {PREFIX}ORG/NAME@REVISION, and for data also /PATH behind them"
Kind = Literal["model", "dataset"]
# files of a model that this package reads; weights in pickles are never downloaded
MODEL = (
    *("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template*", "*.safetensors", "*.safetensors.index.json"),
)
_OTHER_WEIGHTS = ("consolidated*", "original/*")  # of Mistral's and Meta's own libraries
_SMALL = ("README.md", ".gitattributes")  # downloaded to find the commit of a revision
_SOURCE = re.compile(
    r"hf://(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>refs/(?:pr|convert)/[^/@]+|[^/@]+))?(/(?P<path>[^/].*))?"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_LIKE_A_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")


class HubError(OSError):
    """The Hub cannot be reached, or fails."""

    exit_code = TRY_AGAIN


class Source(NamedTuple):
    """The parts of hf://REPO@REVISION/PATH. revision: a branch, a tag or a commit; path: "" = the whole repository."""

    repo: str
    revision: str
    path: str


def parse(source: str) -> Source:
    """The parts of a source. Raises ValueError if it has another form."""
    match = _SOURCE.fullmatch(source)
    if match is None or ".." in source.split("/"):
        raise ValueError(f"got {source!r}, want {WANT}")
    kind, _, rest = source.removeprefix(PREFIX).partition("/")
    if kind in ("models", "datasets", "spaces"):  # as in the addresses of other libraries
        raise ValueError(f"got {source!r}, want {PREFIX}{rest}: without {kind}/")
    return Source(match["repo"], match["revision"] or "main", (match["path"] or "").rstrip("/"))


def without_revisions(text: str) -> str:
    """A text, such as a config as JSON, in which no source has a revision."""
    return re.sub(r"(hf://[\w.-]+/[\w.-]+)@(?:refs/(?:pr|convert)/)?[^/@\"']+", r"\1", text)


def did_you_mean(source: str) -> str:
    """The end of an error about a missing source: a hint, if it looks like the name of a repository; or else ""."""
    return f"; did you mean {PREFIX}{source}?" if _LIKE_A_REPOSITORY.fullmatch(source) else ""


def pin(source: str, kind: Kind) -> str:
    """The same source with the commit that its revision is now. Without network, the one in the cache.

    Raises ValueError if there is no such repository or revision, or it may not be read; HubError if the Hub fails.
    """
    repo, revision, path = parse(source)
    if not _COMMIT.fullmatch(revision):
        now, name = _commit_now(repo, revision, kind), revision
        revision = _download(repo, name, kind, _SMALL).name  # the one in the cache, if the Hub fails meanwhile
        if now not in ("", revision):
            raise HubError(f"{repo}: revision {name!r} is {now}, but the Hub gave {revision}; try again")
    return f"{PREFIX}{repo}@{revision}" + f"/{path}" * bool(path)


def find_model(source: str) -> Path:
    """The local folder of a model, whose files are downloaded if they are missing. Raises as `pin` does."""
    repo, revision, path = parse(source)
    if path:
        raise ValueError(f"{source!r}: a model is a whole repository, want {PREFIX}{repo} without /{path}")
    return _download(repo, revision, "model", MODEL)


def find_data(source: str, patterns: tuple[str, ...]) -> Path:
    """The local folder of a dataset's repository; the files that match glob patterns are downloaded if missing."""
    repo, revision, _ = parse(source)
    return _download(repo, revision, "dataset", patterns)


def check_login(repo: str) -> None:
    """Raise ValueError unless a repository of this name can be pushed to: a valid name, and a login."""
    if not _LIKE_A_REPOSITORY.fullmatch(repo):
        raise ValueError(f"push: got {repo!r}, want ORG/NAME")
    huggingface_hub = _package(repo)
    with explained(repo):
        huggingface_hub.HfApi().whoami()


def push(folder: Path, repo: str, message: str) -> str:
    """Upload a folder as a commit of a model's repository, made private if it is new; return the address of the commit.

    Raises as `pin` does.
    """
    api = _package(repo).HfApi()
    with explained(repo):
        api.create_repo(repo, private=True, exist_ok=True)
        return str(api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message))


def _package(repo: str) -> Any:
    try:
        import huggingface_hub  # noqa: PLC0415  an extra
    except ImportError as error:
        raise ValueError(f"{repo}: needs the package huggingface_hub; run: pip install 'warp_jax[hub]'") from error
    return huggingface_hub


@functools.cache
def _commit_now(repo: str, revision: str, kind: Kind) -> str:
    """The commit that the Hub has for a revision; "" without network."""
    huggingface_hub = _package(repo)
    with explained(repo, revision):
        try:
            return str(huggingface_hub.HfApi().repo_info(repo, repo_type=kind, revision=revision).sha)
        except huggingface_hub.errors.HfHubHTTPError:  # an answer of the Hub
            raise
        except (huggingface_hub.errors.HTTPError, huggingface_hub.errors.OfflineModeIsEnabled):
            return ""


@functools.cache  # one commit of a branch, as long as the process lives
def _download(repo: str, revision: str, kind: Kind, patterns: tuple[str, ...]) -> Path:
    huggingface_hub = _package(repo)
    with explained(repo, revision):
        folder = huggingface_hub.snapshot_download(
            repo, repo_type=kind, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(_OTHER_WEIGHTS)
        )
    return Path(folder)


@contextlib.contextmanager
def explained(repo: str, revision: str = "main") -> Iterator[None]:
    """Turn errors of huggingface_hub into one line, a ValueError or a HubError, that says what to do."""
    from huggingface_hub import errors  # noqa: PLC0415

    log_in = "log in: hf auth login, or set HF_TOKEN"
    try:
        yield
    except errors.LocalTokenNotFoundError as error:
        raise ValueError(f"{repo}: not logged in; {log_in}") from error
    except errors.GatedRepoError as error:
        raise ValueError(
            f"{repo}: is gated; accept its terms on its page on the Hugging Face Hub, then {log_in}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        reason = "the Hub has no such repository, or it is private; correct the name, or"
        raise ValueError(f"{repo}: {reason} {log_in}") from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(f"{repo}: has no revision {revision!r}, want a branch, a tag or a commit") from error
    except errors.LocalEntryNotFoundError as error:
        if isinstance(error.__cause__, errors.OfflineModeIsEnabled):
            raise ValueError(
                f"{repo}: revision {revision!r} is not wholly in the cache of the Hub, and HF_HUB_OFFLINE is set; "
                "unset it, or run once with network"
            ) from error
        raise HubError(f"{repo}: {_first_line(error)}; check the network, then try again") from error
    except errors.HFValidationError as error:
        raise ValueError(f"{repo}: {_first_line(error)}") from error
    except errors.HTTPError as error:  # of the library for HTTP
        if getattr(getattr(error, "response", None), "status_code", 0) in (401, 403):
            raise ValueError(f"{repo}: access denied; {log_in}") from error
        raise HubError(f"{repo}: {_first_line(error)}; check the network, then try again") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]
