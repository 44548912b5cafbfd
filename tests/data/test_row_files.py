"""Files of rows: every format gives the same rows, and a malformed file gives one line that names file and row."""

import csv
import gzip
import io
import json
import re

import pyarrow
import pytest
from pyarrow import parquet

from tests.settings_of import settings_of
from warp_jax.data import corpus, row_files
from warp_jax.experiment import preparation

TEXTS = ['plain, with "quotes"', "two\nlines", "\u2028 is no line", "né", "a\ttab", "  spaces  "]
ROWS = [{"text": text, "label": str(i % 2)} for i, text in enumerate(TEXTS)]
GOOD = [{"text": f"film number {i}", "label": i % 2} for i in range(300)]
CHANGES = {"data.reward_fraction": 0.3, "data.gold_fraction": 0.3, "data.prompts_fraction": 0.2}


def _jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _csv(rows, header=("text", "label")):
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerows([header, *(row.values() for row in rows)])
    return file.getvalue().encode()


def _parquet(rows):
    table = rows if isinstance(rows, pyarrow.Table) else pyarrow.Table.from_pylist(rows)
    file = io.BytesIO()
    parquet.write_table(table, file)
    return file.getvalue()


BOM = b"\xef\xbb\xbf"
WRITERS = {
    "rows.jsonl": _jsonl,
    "bom.jsonl": lambda rows: BOM + _jsonl(rows),
    "rows.json": lambda rows: json.dumps(rows, indent=1).encode(),
    "bom.json": lambda rows: BOM + json.dumps(rows, ensure_ascii=False).encode(),
    "rows.csv": _csv,
    "bom.csv": lambda rows: BOM + _csv(rows).replace(b"\r\n", b"\n"),
    "rows.CSV": lambda rows: _csv(rows) + b"\r\n",
    "rows.parquet": _parquet,
}
FILES = WRITERS | {
    f"{name}.gz": lambda rows, write=write: gzip.compress(write(rows)) for name, write in WRITERS.items()
}


@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_the_same_rows(tmp_path, name):
    """Fails when a format loses a quote or a line break, reads the mark before a text as text, or is not decompressed;
    or when the check before the job refuses it.
    """
    path = tmp_path / name
    path.write_bytes(FILES[name](ROWS))
    corpus.check_source(str(path))
    places, rows = zip(*corpus.load_rows(str(path), "train"), strict=True)
    assert list(rows) == ROWS
    assert len(set(places)) == len(ROWS)
    assert all(place.startswith(f"{path} ") for place in places)


def test_places_are_lines_from_1_and_rows_from_0(tmp_path):
    """Fails when the line of a CSV record is where it ends, or blank lines are not counted."""
    (tmp_path / "a.csv").write_text('text,n\n"1\n2",a\n\n3,b\n')
    assert [place.rpartition("/")[2] for place, _ in row_files.read(tmp_path / "a.csv")] == [
        "a.csv line 2",
        "a.csv line 5",
    ]
    (tmp_path / "a.json").write_text('[{"a": 1}, {"a": 2}]')
    assert [place.rpartition("/")[2] for place, _ in row_files.read(tmp_path / "a.json")] == [
        "a.json row 0",
        "a.json row 1",
    ]


def test_conversations_come_from_parquet_as_from_json(tmp_path):
    """Fails when a nested column is refused or becomes text."""
    rows = [{"messages": [{"role": "user", "content": "hi"}], "day": None}]
    (tmp_path / "a.parquet").write_bytes(_parquet(rows))
    assert [row for _, row in row_files.read(tmp_path / "a.parquet")] == rows


def _with(change, number=57):
    """GOOD, with other fields in one row."""
    return [{**row, **change} if i == number else row for i, row in enumerate(GOOD)]


def _table(**columns):
    return pyarrow.table({**{name: [row[name] for row in GOOD] for name in ("text", "label")}, **columns})


def _broken_line(line):
    lines = _jsonl(GOOD).splitlines(keepends=True)
    return b"".join([*lines[:57], line.encode(errors="surrogatepass") + b"\n", *lines[58:]])


def _csv_line(line):
    lines = _csv(GOOD).splitlines(keepends=True)
    return b"".join([*lines[:58], line.encode() + b"\r\n", *lines[59:]])


JSON = json.dumps(GOOD).encode()
LINE = "{path} line 58: "
CSV_LINE = "{path} line 59: "
ROW = "{path} row 57: "
MALFORMED = {  # name: file name, content, beginning of the message
    "nothing": ("a.jsonl", b"", "{path}: has no rows"),
    "blank lines": ("a.jsonl", b"\n \n\n", "{path}: has no rows"),
    "utf-16": ("a.jsonl", _jsonl(GOOD).decode().encode("utf-16"), "{path}: not UTF-8 text"),
    "utf-16 without mark": ("a.jsonl", _jsonl(GOOD).decode().encode("utf-16-le"), "{path}: not UTF-8 text"),
    "latin-1": ("a.jsonl", _broken_line("\udce9"), "{path}: not UTF-8 text .*line 58"),
    "zero byte": ("a.jsonl", _broken_line('{"text": "\0", "label": 1}'), "{path}: not UTF-8 text .*line 58"),
    "picture": ("a.jsonl", b"\x89PNG\r\n\x1a\n" + bytes(90), "{path}: not UTF-8 text"),
    "cut line": ("a.jsonl", _broken_line('{"text": "a'), f"{LINE}broken JSON"),
    "key twice": ("a.jsonl", _broken_line('{"text": "a", "text": "b"}'), f"{LINE}broken JSON: 'text' is given twice"),
    "key twice in an array": ("a.json", b'[{"text": "a", "text": "b"}]', "{path}: broken JSON: 'text' is given twice"),
    "single quotes": ("a.jsonl", _broken_line("{'text': 'a'}"), f"{LINE}broken JSON"),
    "no object": ("a.jsonl", _broken_line('["a", 1]'), f"{LINE}got list"),
    "null line": ("a.jsonl", _broken_line("null"), f"{LINE}got NoneType"),
    "two objects": ("a.jsonl", _broken_line('{"text": "a"} {"text": "b"}'), f"{LINE}broken JSON: Extra data"),
    "half a pair": ("a.jsonl", _broken_line('{"text": "\\ud800", "label": 1}'), LINE + r"holds '\\ud800', half"),
    "deep": ("a.jsonl", _broken_line("[" * 99_999), f"{LINE}broken JSON: it is nested too deeply"),
    "long number": ("a.jsonl", _broken_line('{"text": ' + "7" * 5000 + "}"), f"{LINE}broken JSON: Exceeds"),
    "cut gzip": ("a.jsonl.gz", gzip.compress(_jsonl(GOOD))[:-20], "{path}: broken gzip"),
    "no gzip": ("a.jsonl.gz", _jsonl(GOOD), "{path}: broken gzip"),
    "gzip of nothing": ("a.csv.gz", b"", "{path}: has no rows"),
    "damaged gzip": ("a.csv.gz", gzip.compress(_csv(GOOD))[:-8] + bytes(8), "{path}: broken gzip"),
    "gzip without .gz": ("a.jsonl", gzip.compress(_jsonl(GOOD)), "{path}: not UTF-8 text"),
    "one object": ("a.json", b'{"rows": []}', "{path}: holds one dict, want an array"),
    "lines as array": ("a.json", _jsonl(GOOD), "{path} line 2: broken JSON: Extra data; want an array .* .jsonl"),
    "number in array": ("a.json", JSON.replace(b"}]", b"}, 7]"), "{path} row 300: got int"),
    "cut array": ("a.json", JSON[:-5], "{path} line 1: broken JSON"),
    "half a pair in array": ("a.json", json.dumps(_with({"text": "\udfff"})).encode(), ROW + r"holds '\\udfff', half"),
    "empty array": ("a.json", b"[ ]", "{path}: has no rows"),
    "no array": ("a.json", b" ", "{path}: has no rows"),
    "two equal headers": ("a.csv", _csv(GOOD, ("text", "text")), "{path} line 1: has two columns 'text'"),
    "field missing": ("a.csv", _csv_line("film"), f"{CSV_LINE}has 1 fields, want 2"),
    "comma too many": ("a.csv", _csv_line("film, bad,1"), f"{CSV_LINE}has 3 fields, want 2"),
    "open quote": ("a.csv", _csv_line('"film,1'), f"{CSV_LINE}broken CSV"),
    "text after quote": ("a.csv", _csv_line('"film" x,1'), f"{CSV_LINE}broken CSV"),
    "only a header": ("a.csv", b"text,label\n", "{path}: has no rows"),
    "latin-1 csv": ("a.csv", "text,label\né,1\n".encode("latin-1"), "{path}: not UTF-8 text .*line 2"),
    "semicolons": ("a.csv", b"text;label\na;1\n", "{path} line 2: has no field 'text', but text;label"),
    "text as parquet": ("a.parquet", _jsonl(GOOD), "{path}: cannot be read as Parquet"),
    "empty parquet": ("a.parquet", b"", "{path}: cannot be read as Parquet"),
    "cut parquet": ("a.parquet", _parquet(GOOD)[:-300], "{path}: cannot be read as Parquet"),
    "damaged parquet": ("a.parquet", bytes(900) + _parquet(GOOD)[900:], "{path}: cannot be read as Parquet"),
    "cut parquet.gz": ("a.parquet.gz", gzip.compress(_parquet(GOOD))[:-300], "{path}: broken gzip"),
    "parquet without rows": ("a.parquet", _parquet(_table()[:0]), "{path}: has no rows"),
    "two equal columns": ("a.parquet", _parquet(_table().rename_columns(["x", "x"])), "{path}: has two columns 'x'"),
    "struct": ("a.parquet", _parquet(_with({"text": {"a": 1}})[57:58]), "{path} row 0: field 'text' holds {{'a': 1}}"),
    "list of texts": ("a.parquet", _parquet(_table(text=[["a"]] * 300)), "{path} row 0: field 'text' holds a list"),
    "bytes": ("a.parquet", _parquet(_table(text=[b"a"] * 300)), "{path} row 0: field 'text' holds b'a'"),
    "map": ("a.parquet", _parquet(_table(text=pyarrow.array([[("a", 1)]] * 300, pyarrow.map_(pyarrow.string(), "i4")))),
            "{path} row 0: field 'text' holds a list"),
    "null in parquet": ("a.parquet", _parquet(_with({"text": None})), f"{ROW}field 'text' holds None, want a text"),
    "null": ("a.jsonl", _jsonl(_with({"text": None})), f"{LINE}field 'text' holds None, want a text"),
    "number": ("a.json", json.dumps(_with({"text": 3})).encode(), f"{ROW}field 'text' holds 3, want a text"),
    "false": ("a.jsonl", _jsonl(_with({"text": False})), f"{LINE}field 'text' holds False, want a text"),
    "dict": ("a.jsonl", _jsonl(_with({"text": {"en": "a"}})), f"{LINE}field 'text' holds {{{{'en': 'a'}}}}, want"),
    "messages": (
        "a.jsonl",
        _jsonl(_with({"text": [{"role": "user", "content": "hi"}]})),
        f"{LINE}field 'text' holds a list, want a text; conversations need data.chat = True",
    ),
    "blank text": ("a.jsonl", _jsonl(_with({"text": " \n"})), f"{LINE}field 'text' is empty"),
    "empty text": ("a.csv", _csv(_with({"text": ""})), f"{CSV_LINE}field 'text' is empty"),
    "no text": ("a.jsonl", _broken_line('{"txt": "a", "label": 0}'), f"{LINE}has no field 'text', but label, txt"),
    "no label": ("a.jsonl", _broken_line('{"text": "a"}'), f"{LINE}has no field 'label', but text"),
    "label 2": ("a.csv", _csv(_with({"label": 2})), f"{CSV_LINE}field 'label' holds '2', want 0 or 1"),
    "other folder": ("a.jsonl/", None, "config.data.source: '{path}' is a folder"),
    "folder": ("rows/", None, "config.data.source: '{path}' is a folder"),
    "missing": ("", None, "config.data.source: no such file '{path}'"),
    "spreadsheet": ("a.xlsx", b"PK", "config.data.source: cannot read '{path}', want movie_reviews"),
    "tabs": ("a.tsv", b"text\tlabel\n", "config.data.source: cannot read '{path}', want movie_reviews"),
    "lines of text": ("rows", b"a\nb\n", "config.data.source: cannot read '{path}', want movie_reviews"),
    "archive": ("a.jsonl.zip", b"PK", "config.data.source: cannot read '{path}', want movie_reviews"),
}  # fmt: skip


def _load(settings):
    corpus.check_source(settings.data.source)
    return preparation.load_corpora(settings)


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_file_is_one_line_that_names_its_row(tmp_path, case):
    """Fails when the check of this kind is taken out, raises another error, or loses the file or the row."""
    name, content, message = MALFORMED[case]
    path = tmp_path / (name or "none.jsonl")
    if name.endswith("/"):
        path.mkdir()
    elif name:
        path.write_bytes(content)
    settings = settings_of({**CHANGES, "data.source": str(path)})
    with pytest.raises(ValueError, match="^" + message.format(path=re.escape(str(path)))) as error:
        _load(settings)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 450


def test_the_same_file_without_the_damage_is_accepted(tmp_path):
    """Fails when every file is refused."""
    assert len(MALFORMED) > 60
    for name in ("a.jsonl", "a.json", "a.csv", "a.parquet"):
        path = tmp_path / name
        path.write_bytes(FILES[name.replace("a.", "rows.")](GOOD))
        splits = _load(settings_of({**CHANGES, "data.source": str(path)}))
        assert sum(len(split.rows) for split in splits.values()) == len(GOOD)
