"""The tables of docs/evidence.md are those of the reports in benchmarks/ablations/."""

import json
import re
from pathlib import Path

import pytest

from scripts.ablate.file import read_file
from scripts.ablate.statistics import difference, summary

ROOT = Path(__file__).parents[2]
REPORTS = sorted((ROOT / "benchmarks" / "ablations").glob("*.json"))


def rows(text: str) -> set[str]:
    """Return the rows of Markdown tables, without the padding of their cells."""
    return {
        re.sub(r" *\| *", "|", line).strip() for line in text.splitlines() if line.startswith("|")
    }


def mean_of(found: dict, decimals: int) -> str:
    return f"{found['mean']:.{decimals}f} ± {found['std']:.{decimals}f}"


def difference_of(found: dict, decimals: int) -> list[str]:
    """Return difference, interval and verdict."""
    interval = "—"
    if found["interval"]:
        low, high = found["interval"]
        interval = f"[{low:+.{decimals}f}, {high:+.{decimals}f}]"
    return [f"{found['mean']:+.{decimals}f}", interval, found["verdict"]]


def expected_rows(report: dict) -> list[str]:
    """Return the rows of the means and differences; one row has both if there are no points."""
    decimals = 4 if report["metric"] == "test_AP" else 2
    lines = []
    for variant, content in report["variants"].items():
        points = content["points"].values()
        lines.append([variant, *(mean_of(point["summary"], decimals) for point in points)])
        gains = [difference_of(p["difference"], decimals) for p in points if p["difference"]]
        if gains and report["axis"]:
            lines.append([variant, *(" ".join(gain) for gain in gains)])
        elif gains:
            lines[-1] += gains[0]
    return ["|" + "|".join(cells) + "|" for cells in lines]


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.stem)
def test_the_page_has_the_table_of_a_report(path):
    report = json.loads(path.read_text())
    page = (ROOT / "docs" / "evidence.md").read_text()
    found = rows(page)
    missing = [row for row in expected_rows(report) if not any(f.startswith(row) for f in found)]
    assert missing == []
    assert report["command"] in page


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.stem)
def test_a_report_is_complete_and_follows_from_its_cells(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    report = json.loads(path.read_text())
    file = read_file(f"configs/ablations/{path.stem}.yaml")
    assert report["missing"] == []
    assert report["file"] == file.model_dump(mode="json")
    assert len(file.seeds) >= 5
    metric, reference = report["metric"], report["reference"]
    trained = {cell["cell"]: cell["metrics"][metric] for cell in report["cells"]}
    for variant, content in report["variants"].items():
        for label, point in content["points"].items():
            values = {int(seed): value for seed, value in point["seeds"].items()}
            assert list(values) == list(file.seeds)
            if not file.evaluate_at:
                names = [", ".join(filter(None, (variant, label, f"seed {s}"))) for s in values]
                assert list(values.values()) == [trained[name] for name in names]
            mean = summary(values)
            assert (mean.mean, mean.std) == pytest.approx(
                (point["summary"]["mean"], point["summary"]["std"])
            )
            if variant != reference:
                others = report["variants"][reference]["points"][label]["seeds"]
                gain = difference(
                    values, {int(s): v for s, v in others.items()}, lower_is_better=False
                )
                assert gain.verdict == point["difference"]["verdict"]
                assert gain.mean == pytest.approx(point["difference"]["mean"])
