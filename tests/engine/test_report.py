"""Files of a report: JSON each time, the picture when its cost is small, pictures as files."""

import json
import time

import numpy as np
import pytest
from PIL import Image

from engine.report import Report, ReportWriter, write_pictures


@pytest.fixture
def now(monkeypatch):
    """Return the time in a list, which the test sets."""
    clock = [1000.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    return clock


def test_the_picture_is_drawn_if_it_costs_little_and_at_the_end(tmp_path, now):
    drawn = []

    def draw(path):
        now[0] += 1.0  # Drawing takes a second.
        drawn.append(now[0])
        path.write_bytes(b"")

    writer = ReportWriter(tmp_path)
    for epoch in range(5):
        writer.write(Report({"model": ["猫"]}, draw), is_last=False, epoch=epoch)
        now[0] += 7.0
        found = json.loads((tmp_path / "metrics_per_class.json").read_text(encoding="utf-8"))
        assert found == {"epoch": epoch, "model": ["猫"]}
    assert drawn == [1001.0, 1023.0]  # The first and the next one after 20 seconds.
    writer.write(Report({}, draw), epoch=5)
    assert len(drawn) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "metrics_per_class.json",
        "metrics_per_class.png",
    ]


def test_pictures_are_files_by_name_and_number(tmp_path):
    array = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    write_pictures(Report({}, lambda path: None, {"mistakes": [array, array]}), tmp_path)
    assert len(list((tmp_path / "images").iterdir())) == 2
    with Image.open(tmp_path / "images" / "mistakes_1.png") as image:
        assert (np.asarray(image) == array).all()
