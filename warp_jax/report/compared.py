"""Tables of the page about several workdirs: their comparison, and the settings that differ."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from warp_jax.evaluation import comparison
from warp_jax.settings import Settings


def tables(finished: Sequence[Path], settings: Mapping[str, Settings], kl: float | None = None) -> list[dict[str, Any]]:
    """The tables of `comparison.tables` and the differing settings, as {"title", "note", "rows"}.

    Args:
        finished: the workdirs that are finished.
        settings: those of all workdirs, by name.
        kl: where methods are compared, nats (see `comparison.tables`).
    """
    titles = ("Results of each workdir", ""), ("Methods at equal KL", _METHODS)
    found = [{"title": "Settings that differ", "note": "", "rows": differences(settings)}]
    for (title, note), table in zip(titles, comparison.tables(finished, kl=kl) if finished else (), strict=False):
        rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
        found.append({"title": title, "note": note, "rows": rows})
    return found


def differences(settings: Mapping[str, Settings]) -> list[dict[str, str]]:
    """A row for each setting that is not the same in all configs: its path, and its value in each."""
    flat = {name: dict(_leaves(of_one.as_json())) for name, of_one in settings.items()}
    paths = sorted({path for leaves in flat.values() for path in leaves})
    rows = [{"setting": path} | {name: repr(leaves.get(path)) for name, leaves in flat.items()} for path in paths]
    return [row for row in rows if len(set(list(row.values())[1:])) > 1]


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


_METHODS = """The same numbers as warp-jax compare, with 95 % bootstrap intervals over prompts. Differences are
paired; "-": not reached, or the workdirs have other SFT policies, rewards or prompts."""
