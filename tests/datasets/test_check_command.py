"""The command `python -m datasets.check`: flags, text, HTML and exit codes."""

import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from datasets.check import Report, format_page
from datasets.check.command import main
from datasets.check.findings import Summary
from tests.datasets.check_data import Coco, Folders

ROOT = Path(__file__).parents[2]


@pytest.fixture
def coco(tmp_path: Path) -> Coco:
    """A clean data set."""
    return Coco(tmp_path / "data")


def test_the_command_prints_the_report_and_writes_it_as_html(coco: Coco, tmp_path: Path) -> None:
    coco.files["train"]["0.png"] = b"text"
    coco.train["categories"][0]["name"] = "<b>Käfer</b>"
    root = coco.write()
    page = tmp_path / "out" / "report.html"
    run = subprocess.run(
        [sys.executable, "-m", "datasets.check", "--coco_path", root, "--images", "--html", page],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1, run.stderr
    assert "train: 12 images, 24 objects, 2 classes" in run.stdout
    assert "train: corrupt images (1). Training replaces" in run.stdout
    assert "0.png: unknown image format" in run.stdout
    assert "Result: 0 errors, 2 warnings, 0 notes" in run.stdout
    assert run.stderr == ""

    text = page.read_text(encoding="utf-8")
    assert "corrupt images (1)" in text
    assert "&lt;b&gt;Käfer&lt;/b&gt;" in text
    # Self-contained: no other file is loaded.
    assert not any(word in text for word in ("src=", "href=", "url(", "@import"))
    plots = [text[i : text.index("</svg>", i) + 6] for i in _places(text, "<svg")]
    assert len(plots) == 2
    bars = [rect for plot in plots for rect in ElementTree.fromstring(plot).iter("rect")]
    assert all(0 <= float(bar.get("width")) <= 420 for bar in bars)
    assert _tags_are_closed(text)


def _places(text: str, word: str) -> list[int]:
    return [i for i in range(len(text)) if text.startswith(word, i)]


def _tags_are_closed(text: str) -> bool:
    open_tags: list[str] = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag not in ("meta", "br", "rect"):
                open_tags.append(tag)

        def handle_endtag(self, tag: str) -> None:
            if tag != "rect":
                assert open_tags.pop() == tag

    Parser().feed(text)
    return not open_tags


@pytest.mark.parametrize(
    "flags",
    [
        [
            "--train-images",
            "train2017",
            "--train_annotations",
            "annotations/instances_train2017.json",
        ],
        ["--coco-path=."],
        ["--coco_path", ".", "--masks", "--images", "--num_workers", "0"],
    ],
    ids=["own_files", "coco_path", "images"],
)
def test_flags_are_those_of_the_trainers(
    flags: list[str],
    coco: Coco,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(coco.write())
    assert main(flags) == 0
    output = capsys.readouterr().out
    assert ("add --images" in output) == ("--images" not in flags)
    assert "Result: 0 errors, 0 warnings, 0 notes" in output


def test_one_split_can_be_checked(coco: Coco, capsys: pytest.CaptureFixture[str]) -> None:
    root = coco.write()
    annotations = root / "annotations" / "instances_val2017.json"
    flags = ["--val_images", str(root / "val2017"), "--val_annotations", str(annotations)]
    assert main(flags) == 0
    assert "val: 4 images, 8 objects, 2 classes" in capsys.readouterr().out


def test_a_split_by_seed_is_checked(coco: Coco, capsys: pytest.CaptureFixture[str]) -> None:
    root = coco.write()
    annotations = root / "annotations" / "instances_train2017.json"
    flags = ["--train_images", str(root / "train2017"), "--train_annotations", str(annotations)]
    assert main([*flags, "--train_val_split", "0.25", "--split_seed", "2"]) == 0
    output = capsys.readouterr().out
    assert "train: 9 images, 18 objects" in output
    assert "val: 3 images, 6 objects" in output


def test_class_folders_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data-path", str(Folders(tmp_path).write())]) == 0
    assert "train: 12 images, 3 classes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "exactly one data set must be given"),
        (["--coco_path", "a", "--data-path", "b"], "exactly one data set must be given"),
        (["--val_images", "a"], "--val_images and --val_annotations must be given together"),
        (["--coco_path", "a", "--num_workers", "-1"], "--num_workers must be at least 0, got -1"),
        (["--data-path", "a", "--data-set", "CIFAR"], "invalid choice: 'CIFAR'"),
        (["--coco_path", "a", "--none"], "unrecognized arguments: --none"),
        (
            ["--coco_path", "a", "--train_val_split", "1"],
            "--train_val_split must be between 0 and 1, got 1.0",
        ),
    ],
)
def test_a_mistake_in_a_flag_is_one_line(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(flags)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_a_report_is_only_overwritten_with_force(
    coco: Coco, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, page = coco.write(), tmp_path / "report.html"
    page.write_text("mine")
    flags = ["--coco_path", str(root), "--html", str(page)]
    with pytest.raises(SystemExit) as stopped:
        main(flags)
    assert stopped.value.code == 2
    assert "exists: --force overwrites it" in capsys.readouterr().err
    assert page.read_text() == "mine"
    assert main([*flags, "--force"]) == 0
    assert page.read_text().startswith("<!doctype html>")


def test_a_data_set_that_is_missing_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--coco_path", "/nowhere"]) == 1
    assert "there is no folder /nowhere" in capsys.readouterr().out


def test_names_of_files_and_classes_may_be_anything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = Folders(tmp_path / "data")
    folders.files |= {"train/Größe <b>/bild 1.png": b"text", "val/Größe <b>/é.png": b""}
    root = folders.write()
    undecodable = os.fsencode(root / "train" / "cat") + b"/\xff\xfe.png"
    Path(os.fsdecode(undecodable)).write_bytes(b"text")
    page = tmp_path / "bericht ä.html"
    assert main(["--data-path", str(root), "--images", "--html", str(page)]) == 1
    text = capsys.readouterr().out
    assert "bild 1.png" in text
    assert "Größe <b>" in text
    html = page.read_text(encoding="utf-8")
    assert "Größe &lt;b&gt;" in html
    assert "\\udcff" in html


def test_a_page_of_a_thousand_classes_shows_the_extremes() -> None:
    counts = {f"class{i}": 2000 - i for i in range(1000)}
    report = Report("many", [Summary("train", "train", sum(counts.values()), counts)])
    page = format_page(report)
    assert "The 100 most common and the 100 rarest of 1,000 classes" in page
    assert page.count("<rect") == 200
    assert all(f">class{i}<" in page for i in (0, 99, 900, 999))
    assert ">class500<" not in page
