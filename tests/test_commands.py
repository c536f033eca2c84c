"""Commands as a user starts them: a quick --help, closed pipes, another package `datasets`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMANDS = (
    *("classification.main", "detection.main", "classification.predict", "detection.predict"),
    *("scripts.plot", "scripts.inspect", "scripts.ablate", "datasets.check"),
)
# Start a module as `python -m` does, and print the imported packages that are slow.
SLOW_IMPORTS = """
import runpy, sys
try:
    runpy.run_module(sys.argv[1], run_name="__main__", alter_sys=True)
finally:
    print({"torch", "timm", "torchvision", "scipy"} & set(sys.modules), file=sys.stderr)
"""


def python(*words: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *words]
    env = {**os.environ, **env}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("module", COMMANDS)
def test_help_imports_neither_torch_nor_timm(module):
    done = python("-c", SLOW_IMPORTS, module, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: ")
    assert done.stderr == "set()\n"


def test_a_mistake_in_a_flag_is_found_without_torch():
    done = python("-c", SLOW_IMPORTS, "classification.main", "--batch-sise", "3")
    assert done.returncode == 2
    assert done.stderr == ("error: unknown flag --batch-sise: did you mean --batch-size?\nset()\n")


@pytest.mark.parametrize(
    "words",
    [("classification.main", "--help"), ("scripts.zoo", "list"), ("datasets.check", "--help")],
    ids=" ".join,
)
def test_a_command_whose_reader_stops_ends_silently(words):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", *words]
    done = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.stderr == ""
    # argparse ignores the error if it writes a long help text at once.
    assert done.returncode in ((0, 141) if "--help" in words else (141,))


@pytest.mark.parametrize("module", ["classification.main", "detection.predict", "scripts.inspect"])
def test_another_package_called_datasets_is_named_in_one_line(module, tmp_path):
    other = tmp_path / "site" / "datasets" / "__init__.py"
    other.parent.mkdir(parents=True)
    other.write_text("def load_dataset(path): ...\n")
    search = os.pathsep.join([str(tmp_path / "site"), str(ROOT)])
    done = python("-m", module, "--help", cwd=tmp_path, PYTHONPATH=search)
    assert done.returncode == 1
    assert done.stderr.count("\n") <= 1
    assert f"the package datasets must be {ROOT / 'datasets'}, got {other}" in done.stderr
    done = python("-c", f"import {module}", cwd=tmp_path, PYTHONPATH=search)
    assert "ForeignPackageError: the package datasets must be" in done.stderr


def test_our_datasets_are_found_from_another_folder(tmp_path):
    (tmp_path / "datasets").mkdir()  # A folder of data is no package.
    done = python("-m", "detection.main", "--help", cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
