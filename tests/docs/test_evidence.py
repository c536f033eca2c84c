"""The numbers of docs/evidence.md are those of the reports in benchmarks/ablations/."""

import json
import re
from pathlib import Path

import pytest

from scripts.ablate.file import read_file
from scripts.ablate.statistics import difference, summary
from scripts.ablate.trainers import lower_is_better

ROOT = Path(__file__).parents[2]
REPORTS = sorted((ROOT / "benchmarks" / "ablations").glob("*.json"))
each_report = pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.stem)

# Pairs that the text compares: report, variant, reference, and points with the differences.
QUOTED = [
    ("direction", "product contextual", "quant contextual", [""]),
    ("direction", "product contextual", "product bias", [""]),
    ("direction", "cross contextual", "cross bias", [""]),
    ("direction", "absolute and product", "product contextual", [""]),
    ("digits_methods", "product contextual", "quant contextual", [""]),
    ("digits_methods", "cross contextual", "quant contextual", [""]),
    ("digits_methods", "cross bias", "quant bias", [""]),
    ("digits_methods", "product contextual", "product bias", [""]),
    ("digits_methods", "cross contextual", "cross bias", [""]),
    ("digits_methods", "euc contextual", "euc bias", [""]),
    ("digits_methods", "quant contextual", "quant bias", [""]),
    ("digits_methods", "cross contextual", "product contextual", [""]),
    ("digits_table4", "qkv", "none", [""]),
    ("digits_table4", "qkv", "absolute", [""]),
    ("digits_table4", "k", "absolute", [""]),
    ("digits_table4", "absolute and qkv", "qkv", [""]),
    ("digits_table4", "absolute and k", "k", [""]),
    ("digits_table4", "absolute and qkv", "absolute and k", [""]),
    ("digits_table4", "absolute and qkv", "absolute and qk", [""]),
    ("digits_table4", "qkv", "k", [""]),
    ("digits_shared", "contextual unshared", "bias unshared", [""]),
    ("digits_shared", "contextual shared", "bias shared", [""]),
    ("digits_shared", "contextual shared", "contextual unshared", [""]),
    ("digits_shared", "bias shared", "bias unshared", [""]),
    ("extrapolation", "RoPE", "iRPE qkv", ["24"]),
    ("extrapolation", "sine", "iRPE qkv", ["24"]),
    ("extrapolation", "iRPE qkv", "RoPE", ["16", "32", "48"]),
    ("extrapolation", "absolute", "iRPE qkv", ["16", "32", "48"]),
    ("data", "RoPE", "iRPE k", ["100", "800"]),
    ("data", "absolute", "iRPE k", ["100", "200"]),
]


def page() -> str:
    return (ROOT / "docs" / "evidence.md").read_text()


def rows(text: str) -> set[str]:
    """Return the rows of Markdown tables, without the padding of their entries."""
    return {
        re.sub(r" *\| *", "|", line).strip() for line in text.splitlines() if line.startswith("|")
    }


def seeds_of(report: dict, variant: str, point: str) -> dict[int, float]:
    """Return the metric of a variant at a point by seed."""
    found = report["variants"][variant]["points"][point]["seeds"]
    return {int(seed): value for seed, value in found.items()}


def difference_of(found: dict) -> list[str]:
    """Return difference, interval and verdict."""
    interval = "—"
    if found["interval"]:
        interval = "[{:+.2f}, {:+.2f}]".format(*found["interval"])
    return [f"{found['mean']:+.2f}", interval, found["verdict"]]


def expected_rows(report: dict) -> list[str]:
    """Return the rows of the means and differences; one row has both if there are no points."""
    lines = []
    for variant, content in report["variants"].items():
        points = content["points"].values()
        means = [f"{p['summary']['mean']:.2f} ± {p['summary']['std']:.2f}" for p in points]
        lines.append([variant, *means])
        gains = [difference_of(p["difference"]) for p in points if p["difference"]]
        if gains and report["axis"]:
            lines.append([variant, *(" ".join(gain) for gain in gains)])
        elif gains:
            lines[-1] += gains[0]
    return ["|" + "|".join(entries) + "|" for entries in lines]


def test_there_are_reports():
    assert REPORTS


@each_report
def test_the_page_has_the_table_of_a_report(path):
    report = json.loads(path.read_text())
    found = rows(page())
    missing = [row for row in expected_rows(report) if not any(f.startswith(row) for f in found)]
    assert missing == []
    assert report["command"] in page()


@pytest.mark.parametrize("quoted", QUOTED, ids=lambda quoted: "-".join(map(str, quoted)))
def test_a_difference_in_the_text_follows_from_a_report(quoted):
    name, variant, reference, points = quoted
    report = json.loads((ROOT / "benchmarks" / "ablations" / f"{name}.json").read_text())
    for point in points:
        values, others = (seeds_of(report, label, point) for label in (variant, reference))
        found = difference(values, others, lower_is_better=lower_is_better(report["metric"]))
        low, high = found.interval
        assert f"{found.mean:+.2f} [{low:+.2f}, {high:+.2f}]" in " ".join(page().split())


@each_report
def test_a_report_is_complete_and_follows_from_its_cells(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    report = json.loads(path.read_text())
    file = read_file(f"configs/ablations/{path.stem}.yaml")
    assert report["missing"] == []
    assert report["file"] == file.model_dump(mode="json")
    assert len(file.seeds) >= 5
    metric = report["metric"]
    cells = {cell["cell"]: cell for cell in report["cells"]}
    for variant, content in report["variants"].items():
        for label, point in content["points"].items():
            values = seeds_of(report, variant, label)
            assert list(values) == list(file.seeds)
            trained_at = "" if file.evaluate_at else label
            for seed, value in values.items():
                cell = cells[", ".join(filter(None, (variant, trained_at, f"seed {seed}")))]
                assert value == cell["evaluations"].get(label, cell)["metrics"][metric]
            mean = summary(values)
            assert [mean.mean, mean.std] == pytest.approx(
                [point["summary"]["mean"], point["summary"]["std"]]
            )
            if variant == report["reference"]:
                continue
            others = seeds_of(report, report["reference"], label)
            gain = difference(values, others, lower_is_better=lower_is_better(metric))
            recorded = point["difference"]
            assert (gain.verdict, gain.mean) == (
                recorded["verdict"],
                pytest.approx(recorded["mean"]),
            )
            assert (gain.interval is None) == (recorded["interval"] is None)
            if gain.interval:
                assert list(gain.interval) == pytest.approx(recorded["interval"])
