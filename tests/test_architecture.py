"""The arrows between packages (each may import only those below it) and what the bottom needs."""

import ast
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ARROWS = {
    "rpe_ops": set(),
    "irpe_core": {"rpe_ops"},
    "engine": set(),
    "datasets": set(),
    "classification": {"irpe_core", "engine", "datasets"},
    "detection": {"irpe_core", "engine", "datasets"},
}
OURS = {*ARROWS, "scripts", "tests", "configs"}
PACKAGES = [name for name in ARROWS if (ROOT / name).is_dir()]
MODULES = [
    path.relative_to(ROOT).as_posix()
    for name in PACKAGES
    for path in (ROOT / name).rglob("*.py")
    # What an installation of rpe_ops leaves behind.
    if "build" not in path.relative_to(ROOT).parts[:-1]
]


def imported(path: Path) -> Iterator[tuple[str, bool]]:
    """Top-level names that a file imports anywhere in it, and whether as the file is imported."""
    tree = ast.parse(path.read_text(), str(path))
    lazy = {
        id(inner)
        for outer in ast.walk(tree)
        if isinstance(outer, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for inner in ast.walk(outer)
    }
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [path.relative_to(ROOT).parts[0] if node.level else node.module]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names = [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)]
        for name in names:
            yield name.split(".")[0], id(node) not in lazy


def test_the_walk_sees_every_kind_of_import(tmp_path, monkeypatch):
    source = (
        "import a.b, c\nfrom d.e import f\nfrom . import g\n"
        "def h():\n    import i\n    importlib.import_module('j.k')\n"
    )
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "m.py").write_text(source)
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    found = set(imported(tmp_path / "own" / "m.py"))
    eager = {("a", True), ("c", True), ("d", True), ("own", True)}
    assert found == eager | {("i", False), ("j", False)}


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_only(module):
    package = module.split("/")[0]
    above = {name for name, _ in imported(ROOT / module)} & OURS - ARROWS[package] - {package}
    assert not above, f"{module} imports {', '.join(sorted(above))}"


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith(("rpe_ops/", "irpe_core/"))])
def test_the_bottom_needs_nothing_but_torch(module):
    if module == "rpe_ops/setup.py":
        pytest.skip("an installation script")
    allowed = {*sys.stdlib_module_names, "torch", "rpe_ops", "irpe_core"}
    if module.startswith("rpe_ops/triton_kernels/"):
        allowed.add("triton")
    foreign = {name for name, eager in imported(ROOT / module) if eager} - allowed
    assert not foreign
    # Triton is found when it is needed, and safetensors to read a file of that kind.
    found_late = {"triton", "safetensors"}
    assert {name for name, _ in imported(ROOT / module)} <= allowed | found_late


def test_the_bottom_works_where_only_torch_is_installed():
    program = """
import sys, importlib.abc

BLOCKED = {"timm", "torchvision", "pydantic", "yaml", "scipy", "sklearn", "PIL", "tqdm",
           "safetensors", "pycocotools", "tensorboard", "numpy", "triton",
           "engine", "datasets", "classification", "detection", "scripts"}

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Block())
import torch
from irpe_core import RPEAttention, bucket_ids, parse_rpe_spec
from rpe_ops.rpe_index import RPEIndexFunction

attention = RPEAttention(12, 2, parse_rpe_spec("rpe-1.9-cross-ctx-1-qkv", skip=1), (2, 3))
attention(torch.randn(2, 7, 12)).sum().backward()
index = bucket_ids("product", 2, 3, 1.9).int()
RPEIndexFunction.apply(torch.randn(1, 1, 6, 49), index)
assert not BLOCKED & set(sys.modules)
"""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_lists_its_public_names(package):
    module = importlib.import_module(package)
    assert module.__doc__
    assert len(set(module.__all__)) == len(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)
