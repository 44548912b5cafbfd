"""The files of the report, from points made by hand."""

import csv
import re

import pytest
from PIL import Image
from tensorboardX import record_writer
from tensorboardX.proto.event_pb2 import Event

from tests.report import hand_made
from warp_jax.report import page, writer


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The workdir of a finished report, and its points."""
    workdir, points = hand_made.write(tmp_path_factory.mktemp("report")), hand_made.points()
    line = writer.write_report(hand_made.SETTINGS, hand_made.held_out(), points, workdir, hand_made.PROGRESS)
    assert line.endswith(f"report: {workdir / 'report.html'}")
    return workdir, points


def test_the_front_has_a_row_for_each_point(written):
    """Fails when a column has the values of another, or a row those of another point."""
    with (written[0] / "front.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = "reward", "gold_reward", "sft_kl", "length"
    for row, point in zip(rows, written[1], strict=True):
        assert (row["stage"], int(row["iteration"]), int(row["run"]), int(row["step"])) == (*point[:3], point.step)
        found = [float(row[name]) for name in names]
        assert found == pytest.approx([getattr(point.evaluation, name).mean() for name in names])
        assert float(row["eta"]) == pytest.approx(point.eta, nan_ok=True)


def test_the_page_is_one_file_that_loads_nothing(written):
    """Fails when a text of the model comes into the page as HTML, an address is in it, or it grows above 6 MB."""
    text = (written[0] / "report.html").read_text()
    assert len(text) < 6e6
    assert "://" not in text
    assert set(re.findall(r"(?:src|href)=\"?(\w+:)", text)) == set()
    assert "<script>window.hacked" not in text
    assert "\\u003cscript\\u003ewindow.hacked" in text
    assert "default-src 'none'; script-src 'sha256-" in text
    assert "unsafe-eval" not in text


def test_a_dollar_in_a_text_is_a_dollar():
    """Fails when a completion is taken for a place of the template."""
    assert page.render([{"name": "$style $$ {{data}}"}]).count("$style $$ {{data}}") == 1


def test_tensorboard_has_the_picture(written):
    """Fails when the picture is not that of front.png, or each start leaves one more file."""
    writer.write_report(hand_made.SETTINGS, hand_made.held_out(), written[1], written[0], hand_made.PROGRESS)
    (path,) = written[0].glob("events.out.tfevents*")
    events = list(map(Event.FromString, _records(path)))
    (value,) = [value for event in events for value in event.summary.value]
    assert value.tag == "front"
    with Image.open(written[0] / "front.png") as image:
        assert (value.image.width, value.image.height) == image.size


def _records(path):
    """The records of a TFRecord file."""
    content = path.read_bytes()
    while content:
        length = int.from_bytes(content[:8], "little")
        assert record_writer.masked_crc32c(content[:8]) == int.from_bytes(content[8:12], "little")
        yield content[12 : 12 + length]
        content = content[12 + length + 4 :]


def test_the_summary_is_the_last_file(tmp_path, monkeypatch):
    """Fails when a job that is killed while it writes its report looks finished, and its page stays unfinished."""
    names = []
    for kind in ("text", "json", "bytes"):
        monkeypatch.setattr(writer.files, f"write_{kind}", lambda path, content: names.append(path.name))
    writer.write_report(hand_made.SETTINGS, hand_made.held_out(), hand_made.points(), tmp_path, hand_made.PROGRESS)
    assert names == ["front.csv", "front.png", "events.out.tfevents.0.front", "report.html", "summary.json"]


def test_the_page_of_an_unfinished_job(tmp_path):
    """Fails when a page is written only at the end, or an unfinished job gets the files of a finished one."""
    writer.write_page(hand_made.SETTINGS, hand_made.held_out(), hand_made.points()[:2], tmp_path, hand_made.PROGRESS)
    assert {path.name for path in tmp_path.iterdir()} == {"report.html"}
