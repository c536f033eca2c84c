"""Report of an evaluation of the zoo: tolerances, and records kept between evaluations."""

import csv
import json
from dataclasses import replace

import pytest

from scripts.zoo.__main__ import main
from scripts.zoo.report import Record, Report, compare, verdict
from scripts.zoo.rows import load_zoo
from tests.commands import failure_of
from tests.scripts.small_zoo import make_zoo


@pytest.mark.parametrize(
    ("top1", "expected"),
    [(82.4, "within"), (82.401, "outside"), (82.2, "within"), (82.199, "outside")],
)
def test_the_tolerance_is_a_tenth_of_a_point_inclusive(top1, expected, tmp_path):
    facts = {"checkpoint": "http://x/a.pth", "published": {"top1": 82.3, "top5": 95.9}}
    row = make_zoo(tmp_path, "http://nowhere", digits=facts).rows[0]
    record = Record(measured={"top1": top1, "top5": 95.9})
    assert verdict(row, record) == expected
    assert compare(row, record)["top1"].difference == pytest.approx(top1 - 82.3)


def test_metrics_are_kept_with_the_reason_of_a_later_failure(tmp_path):
    zoo = make_zoo(tmp_path, "http://nowhere")
    row, url = zoo.rows[0], "http://nowhere/digits.pth"
    record = Record(measured={"top1": 1.0, "top5": 2.0}, images=1, images_per_s=1.0, checkpoint=url)
    Report(tmp_path, zoo).put(row, record)
    assert "## Not run" not in (tmp_path / "zoo.md").read_text()
    Report(tmp_path, zoo).put(row, Record(reason="no network", checkpoint=url))
    assert Report(tmp_path, zoo).records == {"digits": replace(record, failed_later="no network")}
    text = (tmp_path / "zoo.md").read_text()
    assert "| 1.00 " in text
    assert "- digits: no network; the metrics above are from an earlier evaluation\n" in text
    with (tmp_path / "zoo.csv").open() as file:
        assert {line["reason"] for line in csv.DictReader(file)} == {"no network"}
    Report(tmp_path, zoo).put(row, record)
    assert "no network" not in (tmp_path / "zoo.md").read_text()


def test_a_failure_replaces_the_metrics_of_another_checkpoint(tmp_path):
    zoo = make_zoo(tmp_path, "http://nowhere")
    record = Record(
        measured={"top1": 1.0, "top5": 2.0}, images=1, images_per_s=1.0, checkpoint="http://old/a"
    )
    Report(tmp_path, zoo).put(zoo.rows[0], record)
    failure = Record(reason="no network", checkpoint="http://nowhere/digits.pth")
    Report(tmp_path, zoo).put(zoo.rows[0], failure)
    assert Report(tmp_path, zoo).records == {"digits": failure}
    assert "| 1.00 " not in (tmp_path / "zoo.md").read_text()
    assert "- digits: no network\n" in (tmp_path / "zoo.md").read_text()


def test_an_evaluation_of_another_zoo_keeps_the_records(tmp_path):
    zoo = make_zoo(tmp_path, "http://nowhere")
    record = Record(measured={"top1": 1.0, "top5": 2.0}, images=1, images_per_s=1.0)
    Report(tmp_path, zoo).put(zoo.rows[0], record)
    other = load_zoo()
    Report(tmp_path, other).put(other.rows[0], record)
    assert Report(tmp_path, zoo).records == {"digits": record, other.rows[0].name: record}


def test_a_report_of_an_earlier_version_is_read_and_gets_the_key_metrics(tmp_path):
    zoo = make_zoo(tmp_path, "http://nowhere")
    record = Record(measured={"top1": 1.0, "top5": 2.0}, images=1, images_per_s=1.0)
    Report(tmp_path, zoo).put(zoo.rows[0], record)
    content = json.loads((tmp_path / "zoo.json").read_text())
    row = content["rows"]["digits"]
    row["figures"] = row.pop("metrics")
    (tmp_path / "zoo.json").write_text(json.dumps(content))
    report = Report(tmp_path, zoo)
    assert report.records == {"digits": record}
    report.put(zoo.rows[0], record)
    row = json.loads((tmp_path / "zoo.json").read_text())["rows"]["digits"]
    assert row["metrics"]["top1"]["measured"] == 1.0
    assert "figures" not in row


@pytest.mark.parametrize("content", ["", "[]", '{"rows": {"a": 1}}', '{"rows": 1}'])
def test_a_file_of_another_program_is_not_overwritten(content, data, tmp_path, capsys):
    zoo = make_zoo(tmp_path, "http://nowhere")
    (tmp_path / "zoo.json").write_text(content)
    run = ["evaluate", "--zoo", str(zoo.file), "--output", str(tmp_path), *data]
    code, line = failure_of(main, run, capsys)
    assert code == 1
    assert f"cannot read {tmp_path / 'zoo.json'} as the report of an evaluation" in line
    assert (tmp_path / "zoo.json").read_text() == content
