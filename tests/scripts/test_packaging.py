"""The repository is only installed editable, with the requirements of requirements.txt."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("rpe_ops", "irpe_core", "engine", "datasets", "classification", "detection")
BUILD = """
import sys
sys.path.insert(0, "scripts/packaging")
import editable_only
print(editable_only.build_editable("wheels"))
"""
IMPORT = """
import importlib.metadata, importlib.util, json, site, sys
site.addsitedir(sys.argv[1])
places = {name: importlib.util.find_spec(name).origin for name in sys.argv[2:]}
print(json.dumps(importlib.metadata.requires("irpe-framework")))
print(json.dumps(places))
"""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the repository's build files with empty packages, where builds leave no files."""
    root = tmp_path / "copy"
    (root / "wheels").mkdir(parents=True)
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root)
    for name in (*PACKAGES, "rpe_ops/triton_kernels", "tests", "scripts"):
        (root / name).mkdir()
        (root / name / "__init__.py").touch()
    shutil.copytree(ROOT / "scripts/packaging", root / "scripts/packaging")
    return root


def run(command: list[str], cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def test_editable_installation_finds_the_packages_and_names_the_requirements(copy, tmp_path):
    built = run([sys.executable, "-c", BUILD], copy)
    assert built.returncode == 0, built.stderr
    installed, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with zipfile.ZipFile(copy / "wheels" / built.stdout.splitlines()[-1]) as wheel:
        wheel.extractall(installed)
        listed = wheel.namelist()
    assert not [name for name in listed if "tests" in name or "scripts" in name]
    names = ["irpe_core", "engine", "classification", "detection"]
    done = run([sys.executable, "-I", "-c", IMPORT, str(installed), *names], elsewhere)
    assert done.returncode == 0, done.stderr
    requirements, places = done.stdout.splitlines()
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    needed = [line for line in json.loads(requirements) if "extra ==" not in line]
    assert needed == [line for line in lines if not line.startswith("#")]
    assert json.loads(places) == {name: str(copy / name / "__init__.py") for name in names}


def test_other_installations_are_refused_with_the_editable_one(copy):
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-index"]
    done = run([*command, "--no-build-isolation", "--wheel-dir", "wheels", "."], copy)
    assert done.returncode != 0
    assert "pip install -e ." in done.stdout + done.stderr
    assert not list((copy / "wheels").iterdir())
