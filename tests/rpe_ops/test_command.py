"""Output of `python -m rpe_ops` and of `setup.py`."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

import rpe_ops
from rpe_ops import __main__ as command
from rpe_ops import library
from tests.rpe_ops.extension import PACKAGE, provide_library, run_setup, start_setup

NO_COMPILER = {"CXX": "/nowhere/c++"}


def test_the_report_names_versions_and_every_implementation_with_its_reason():
    lines = command.report().splitlines()
    assert f"torch    {torch.__version__}" in lines
    for device in ("cpu", "cuda"):
        missing = device == "cuda" and not torch.cuda.is_available()
        for operator, title in (("gather", "gather and bucket sum"), ("attention", "attention")):
            chosen = rpe_ops.resolve("auto", torch.device(device), operator)
            chosen = "none" if missing else chosen
            start = lines.index(f"{title} on {device}, auto is {chosen}:") + 1
            reasons = rpe_ops.available_implementations(device, operator)
            shown = dict(line.split(maxsplit=1) for line in lines[start : start + len(reasons)])
            runs = "no GPU is visible to torch" if missing else "can run"
            assert shown == {name: reason or runs for name, reason in reasons.items()}


def test_the_report_names_the_library_and_what_it_holds():
    provide_library()
    kernels = "CPU and CUDA" if library.has_cuda_kernels() else "CPU"
    assert f"library  {library.library_path()} ({kernels})" in command.report().splitlines()


def test_the_report_is_the_module_run_as_a_command():
    arguments = [sys.executable, "-m", "rpe_ops"]
    output = subprocess.check_output(arguments, cwd=PACKAGE.parent, text=True)
    assert output.splitlines()[1] == f"torch    {torch.__version__}"
    assert "gather and bucket sum on cpu, auto is " in output


def test_without_a_compiler_the_installation_is_pure_python_and_says_so(tmp_path):
    package = tmp_path / "source" / "rpe_ops"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    user = {"PYTHONUSERBASE": str(tmp_path / "user")}
    output = run_setup("install", "--user", package=package, **NO_COMPILER, **user)
    assert "pure Python, without the compiled operators: there is no C++ compiler" in output
    (init,) = (tmp_path / "user").rglob("rpe_ops/__init__.py")
    installed = {path.relative_to(init.parent).as_posix() for path in init.parent.rglob("*.py")}
    expected = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")}
    assert installed == {name for name in expected if name != "setup.py" and "build/" not in name}
    code = "import rpe_ops; from rpe_ops import library; print(library.PACKAGE)"
    output = subprocess.check_output(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(init.parents[1])},
        text=True,
    )
    assert output.strip() == str(init.parent)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"FORCE_CUDA": "yes"}, "FORCE_CUDA must be 0 or 1, got 'yes'"),
        ({"FORCE_CUDA": "1", "CUDA_HOME": "/nowhere"}, "rpe_ops: FORCE_CUDA=1, but "),
    ],
    ids=["unknown", "no-nvcc"],
)
def test_force_cuda_that_cannot_be_satisfied_stops_the_build(environment, message):
    if not shutil.which("c++"):
        pytest.skip("there is no C++ compiler")
    done = start_setup("--version", **environment)
    assert done.returncode != 0
    assert message in done.stdout
