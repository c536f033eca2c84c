"""The quickstart deletes nothing but its own folders, and its report checks the results."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from scripts.quickstart.classification import RUNS, main

ROOT = Path(__file__).parents[2]
MARKER = ".irpe-quickstart"
NEXT_STEP_FAILED = 7


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A folder with the quickstart, whose first step after the installation fails."""
    scripts = tmp_path / "repository" / "scripts"
    scripts.mkdir(parents=True)
    shutil.copy(ROOT / "scripts/quickstart.sh", scripts)
    (scripts / "install.sh").write_text(
        f"echo installing\npython() {{ return {NEXT_STEP_FAILED}; }}\n"
    )
    return scripts.parent


def quickstart(repository: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(repository / "scripts/quickstart.sh"), *arguments],
        cwd=repository.parent,
        capture_output=True,
        text=True,
    )


def contents(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


@pytest.mark.parametrize("name", ["a", "deep/er", "with space", ".", ""])
def test_missing_and_empty_folders_are_marked(name, repository, tmp_path):
    output = tmp_path / "new" / name
    if name == ".":
        output.mkdir(parents=True)
    done = quickstart(repository, str(output))
    assert done.returncode == NEXT_STEP_FAILED
    assert done.stdout.startswith("installing\n")
    assert contents(output) == {MARKER}


def test_default_folder_is_in_the_repository(repository):
    quickstart(repository)
    assert contents(repository / "outputs") == {"quickstart", f"quickstart/{MARKER}"}


def test_marked_folder_is_emptied(repository, tmp_path):
    output = tmp_path / "new"
    quickstart(repository, str(output))
    (output / "run").mkdir()
    for name in ("run/checkpoint.pth", f"run/{MARKER}", ".hidden"):
        (output / name).write_text("old")
    done = quickstart(repository, str(output))
    assert done.returncode == NEXT_STEP_FAILED
    assert contents(output) == {MARKER}


def test_target_of_a_link_in_a_marked_folder_is_kept(repository, tmp_path):
    output, precious = tmp_path / "new", tmp_path / "precious"
    quickstart(repository, str(output))
    precious.mkdir()
    (precious / "thesis").write_text("mine")
    (output / "link").symlink_to(precious)
    quickstart(repository, str(output))
    assert contents(output) == {MARKER}
    assert contents(precious) == {"thesis"}


@pytest.mark.parametrize("name", ["thesis", ".hidden"])
def test_another_folder_is_refused_before_the_installation(name, repository, tmp_path):
    output = tmp_path / "mine"
    output.mkdir()
    (output / name).write_text("mine")
    done = quickstart(repository, str(output))
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: OUTPUT_DIR must be missing, empty or made by this script")
    assert line.endswith(f"got '{output}': remove it yourself or name another folder")
    assert contents(output) == {name}


def test_a_file_is_refused(repository, tmp_path):
    output = tmp_path / "mine"
    output.write_text("mine")
    done = quickstart(repository, str(output))
    assert (done.returncode, done.stdout) == (2, "")
    assert output.read_text() == "mine"


def test_an_option_prints_the_usage(repository):
    done = quickstart(repository, "--help")
    assert done.returncode == 2
    assert "bash scripts/quickstart.sh [OUTPUT_DIR]" in done.stdout
    assert contents(repository) == {"scripts", "scripts/quickstart.sh", "scripts/install.sh"}


ACCURACIES = {"absolute_irpe": 96.0, "irpe": 92.0, "absolute": 95.0, "neither": 80.0}


def report(folder: Path, accuracies: dict[str, float], evaluated: float) -> int:
    """Report runs of the given accuracies."""

    def metrics(acc1: float) -> dict[str, float]:
        return {"test_acc1": acc1, "test_acc5": 99.0, "test_loss": 0.5, "n_parameters": 1234}

    for name in RUNS:
        (folder / name).mkdir()
        lines = [json.dumps(metrics(acc1)) for acc1 in (10.0, accuracies[name])]
        (folder / name / "log.txt").write_text("\n".join(lines) + "\n")
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "eval.json").write_text(json.dumps(metrics(evaluated)))
    return main(folder)


def test_good_runs_are_reported(tmp_path, capsys):
    assert report(tmp_path, ACCURACIES, 96.0) == 0
    out, err = capsys.readouterr()
    assert "iRPE alone             92.0       1,234" in out
    assert not err


@pytest.mark.parametrize(
    ("changed", "evaluated", "words"),
    [
        ({"absolute_irpe": 93.9}, 93.9, "at least 94.0 %, got 93.9 %"),
        ({"irpe": 89.0}, 96.0, "at least 10.0 points over no encoding, got 9.0"),
        ({}, 95.9, "test_acc1 of --eval must be 96.0 as in training, got 95.9"),
    ],
    ids=["accuracy", "gain", "evaluation"],
)
def test_a_failed_check_is_named(changed, evaluated, words, tmp_path, capsys):
    assert report(tmp_path, ACCURACIES | changed, evaluated) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("FAILED: ")
    assert words in line
