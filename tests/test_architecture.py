"""Each package imports only those below it, and no files import each other in a circle."""

import ast
import importlib
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
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
OURS = {*ARROWS, "scripts", "examples", "tests", "configs"}
PACKAGES = [name for name in ARROWS if (ROOT / name).is_dir()]
MODULES = [
    path.relative_to(ROOT).as_posix()
    for name in PACKAGES
    for path in (ROOT / name).rglob("*.py")
    # An installation of rpe_ops leaves copies in rpe_ops/build.
    if "build" not in path.relative_to(ROOT).parts[:-1]
]


def _inside_functions(tree: ast.AST) -> set[int]:
    return {
        id(inner)
        for outer in ast.walk(tree)
        if isinstance(outer, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for inner in ast.walk(outer)
    }


def imported(path: Path) -> Iterator[tuple[str, bool]]:
    """Top-level names that a file imports anywhere in it, and whether as the file is imported."""
    tree = ast.parse(path.read_text(), str(path))
    lazy = _inside_functions(tree)
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


def imported_modules(path: Path) -> set[str]:
    """Our modules that a file imports when it is imported itself, by dotted name."""
    tree = ast.parse(path.read_text(), str(path))
    lazy = _inside_functions(tree)
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in lazy:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = path.relative_to(ROOT).parts[: -node.level] if node.level else ()
            base = ".".join([*parents, *([node.module] if node.module else [])])
            # A name is a module of the package, or something that the package defines.
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return {name for name in found if _file_of(name)}


def _file_of(name: str) -> Path | None:
    path = ROOT.joinpath(*name.split("."))
    files = (path.with_suffix(".py"), path / "__init__.py")
    return next((file for file in files if file.is_file()), None)


def circles(modules: Iterable[str]) -> list[list[str]]:
    """Return the circles among files: lists of dotted names in which each imports the next."""
    graph = {name: imported_modules(_file_of(name)) for name in modules}
    # A package may be entered through any of its files, so its own __init__ is not an arrow.
    graph = {
        name: {
            other for other in others if other in graph and not f"{name}.".startswith(f"{other}.")
        }
        for name, others in graph.items()
    }
    found: list[list[str]] = []
    finished: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        if name in path:
            found.append([*path[path.index(name) :], name])
        elif name not in finished:
            for other in sorted(graph[name]):
                visit(other, [*path, name])
            finished.add(name)

    for name in sorted(graph):
        visit(name, [])
    return found


def test_no_files_import_each_other_in_a_circle():
    names = [
        module.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for module in MODULES
    ]
    names = [name for name in names if name != "rpe_ops.setup"]
    assert len(names) > 80
    assert circles(names) == []


def test_a_circle_of_files_is_found(tmp_path, monkeypatch):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "__init__.py").write_text("from own.a import x\n")
    (tmp_path / "own" / "a.py").write_text("from own import b\n")
    (tmp_path / "own" / "b.py").write_text("import own.c\n")
    (tmp_path / "own" / "c.py").write_text("from .a import x\n")
    (tmp_path / "own" / "d.py").write_text("def f():\n    from own import a, d\n")
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    names = ["own", "own.a", "own.b", "own.c", "own.d"]
    assert circles(names) == [["own.a", "own.b", "own.c", "own.a"]]


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
def test_rpe_ops_and_irpe_core_need_only_torch(module):
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


def test_requirements_list_what_the_packages_import():
    text = (ROOT / "requirements.txt").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    listed = {line.partition(">=")[0] for line in lines}
    optional = {"sklearn", "wandb", "mlflow", "hotcoco", "simplejpeg"}
    optional |= {"onnx", "onnxruntime", "triton", "transformers"}
    foreign = {name for module in MODULES for name, _ in imported(ROOT / module)}
    foreign -= {*sys.stdlib_module_names, *OURS, *optional, "setuptools"}
    names = {"PIL": "pillow", "yaml": "pyyaml", "pydantic_core": "pydantic"}
    assert {names.get(name, name) for name in foreign} <= listed


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


LAZY = ["engine", "datasets", "datasets.check", "classification", "detection"]


@pytest.mark.parametrize("package", LAZY)
def test_names_that_are_imported_at_first_use_are_also_imported_for_type_checkers(package):
    module = importlib.import_module(package)
    tree = ast.parse(Path(module.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    listed = {
        alias.name: node.module.removeprefix(f"{package}.")
        for node in block.body
        for alias in node.names
    }
    assert listed == module._MODULES
    assert set(module.__all__) <= set(dir(module))
    # The import of a submodule would replace a function of its name.
    folder = Path(module.__file__).parent
    assert not {path.stem for path in folder.iterdir()} & set(listed)
    with pytest.raises(AttributeError, match="has no attribute 'missing'"):
        module.__getattr__("missing")


def test_every_module_lists_its_public_names():
    modules = [ROOT / module for module in MODULES]
    modules += [*(ROOT / "scripts").rglob("*.py"), *(ROOT / "examples").rglob("*.py")]
    exempt = {"__main__.py", "setup.py"}
    without = [
        path.relative_to(ROOT).as_posix()
        for path in modules
        if path.name not in exempt
        and path.parent.name != "former"
        and _has_public_names(tree := ast.parse(path.read_text()))
        and not any(_assigns_all(node) for node in tree.body)
    ]
    assert without == []


def _has_public_names(tree: ast.Module) -> bool:
    kinds = (ast.FunctionDef, ast.ClassDef)
    return any(isinstance(node, kinds) and not node.name.startswith("_") for node in tree.body)


def _assigns_all(node: ast.stmt) -> bool:
    targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
    return any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets)
