"""rpe_ops and irpe_core install with pip and need only torch."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOT_TO_COPY = shutil.ignore_patterns("build", "*.egg-info", "*.so", "__pycache__")
# This program runs outside the checkout. It can import only the standard library, the two packages,
# and torch with the packages that torch requires, which do not include numpy.
PROGRAM = """
import importlib.abc, importlib.metadata, re, sys

def normal(name):
    return re.sub("[-_.]+", "-", name).lower()

def require(name, found):
    # Add a distribution and all that it requires, without extras.
    if normal(name) not in found:
        found.add(normal(name))
        try:
            lines = importlib.metadata.requires(name) or ()
        except importlib.metadata.PackageNotFoundError:
            return
        for line in lines:
            if "extra ==" not in line:
                require(re.match("[A-Za-z0-9_.-]+", line)[0], found)

required = set()
require("torch", required)
allowed = {*sys.stdlib_module_names, "rpe_ops", "irpe_core"}
for module, distributions in importlib.metadata.packages_distributions().items():
    if required & set(map(normal, distributions)):
        allowed.add(module)

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        if top not in allowed and not top.startswith("_"):
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

assert "numpy" not in allowed and "timm" not in allowed
sys.meta_path.insert(0, Block())
import torch
from torch import nn
import irpe_core, rpe_ops

layer = nn.TransformerEncoderLayer(12, 2, 24, dropout=0.0, batch_first=True).eval()
x = torch.randn(2, 7, 12)
before = layer(x)
irpe_core.add_irpe(layer, irpe_core.RPEConfig(skip=1, rpe_on="qkv"), grid=(2, 3))
torch.testing.assert_close(layer(x), before)
layer(x).square().sum().backward()
assert all(p.grad is not None for p in layer.parameters())
print(irpe_core.__file__)
print(rpe_ops.__file__)
print(importlib.metadata.requires("irpe-core"), importlib.metadata.version("rpe-ops"))
print(rpe_ops.library.library_path())
"""


def pip_install(target: Path, sources: Path, **environment: str) -> None:
    """Install both packages from a copy of their folders, so that the checkout stays clean."""
    for name in ("rpe_ops", "irpe_core"):
        shutil.copytree(ROOT / name, sources / name, ignore=NOT_TO_COPY)
    command = "-m pip install --quiet --no-deps --no-build-isolation --no-index --target"
    done = subprocess.run(
        [sys.executable, *command.split(), str(target), "./rpe_ops", "./irpe_core"],
        cwd=sources,
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize(
    "compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["python", "compiled"]
)
def test_both_packages_install_and_need_only_torch(tmp_path, compiled):
    if compiled and not shutil.which(os.environ.get("CXX", "c++")):
        pytest.skip("there is no C++ compiler")
    target, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    # Without a compiler the operators are plain Python, and the test takes only seconds.
    environment = {"FORCE_CUDA": "0"} if compiled else {"CXX": "no-such-compiler"}
    pip_install(target, tmp_path / "sources", **environment)
    assert {path.name for path in target.glob("*") if path.suffix != ".dist-info"} == {
        "rpe_ops",
        "irpe_core",
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    core, ops, requirements, library = done.stdout.splitlines()
    assert core == str(target / "irpe_core" / "__init__.py")
    assert ops == str(target / "rpe_ops" / "__init__.py")
    # The two packages are released together: irpe_core requires the same version of rpe_ops.
    assert requirements == "['torch>=2.6', 'rpe-ops==0.1.0'] 0.1.0"
    assert not compiled or Path(library).parent == target / "rpe_ops"
