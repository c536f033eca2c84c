"""Search for the compiled library, and every reason why one is not used."""

import ctypes
import json
import os
import shutil
import site
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from rpe_ops import library
from tests.rpe_ops.extension import PACKAGE, forget_library, provide_library

RECORD = {"torch": torch.__version__, "cuda": "", "without_cuda": "no GPU", "sources": ""}


@pytest.fixture
def installed(tmp_path, monkeypatch) -> Iterator[Callable[..., Path]]:
    """Return a function that writes a fake library into the n-th of two folders on the path."""
    folders = [tmp_path / "first", tmp_path / "second"]
    package = tmp_path / "checkout" / "rpe_ops"
    (package / "csrc").mkdir(parents=True)
    (package / "csrc" / "one.cpp").write_text("int one;\n")
    monkeypatch.setattr(library, "PACKAGE", package)
    monkeypatch.setattr(sys, "path", [str(folder) for folder in folders])
    monkeypatch.setattr(site, "getsitepackages", lambda: [])
    monkeypatch.setattr(site, "getusersitepackages", lambda: str(tmp_path / "user"))
    record = {**RECORD, "sources": library.source_fingerprint(package)}

    def install(place: int = 0, **changes: str) -> Path:
        path = folders[place] / "rpe_ops" / "_C.abi3.so"
        path.parent.mkdir(parents=True)
        text = json.dumps({**record, **changes})
        path.write_bytes(b"\0no library" + f"rpe_ops build record: {text}\0".encode() + b"\0")
        return path

    forget_library()
    yield install
    forget_library()


def test_without_a_library_the_reason_is_the_command_that_builds_it(installed):
    assert library.load_library() == "it is not built: run `pip install ./rpe_ops`"
    assert library.library_path() is None
    assert not library.has_cuda_kernels()
    assert library.reason_without_cuda() == library.load_library()


def test_a_library_of_another_torch_is_refused_with_both_versions(installed):
    path = installed(torch="2.5.1+cu124")
    here = torch.__version__.split("+")[0]
    expected = f"{path} was built for torch 2.5.1, this is torch {here}: rebuild it with"
    assert library.load_library().startswith(expected)


def test_a_library_of_other_sources_is_refused(installed):
    path = installed()
    (library.PACKAGE / "csrc" / "one.cpp").write_text("int two;\n")
    assert library.load_library().startswith(f"{path} was built from other sources than ")


def test_a_package_without_sources_uses_the_library_it_was_installed_with(installed):
    path = installed(sources="other")
    shutil.rmtree(library.PACKAGE / "csrc")
    # The fake library is accepted, but cannot be loaded.
    assert library.load_library().startswith(f"{path} cannot be loaded: ")


def test_the_error_of_the_loader_is_the_reason(installed):
    path = installed()
    with pytest.raises(OSError, match=r"\S") as raised:
        ctypes.CDLL(str(path))
    assert library.load_library() == f"{path} cannot be loaded: {raised.value}"


def test_a_file_without_a_build_record_is_refused(installed):
    path = installed()
    path.write_bytes(b"\x7fELF")
    assert library.load_library().startswith(f"{path} was not built by rpe_ops/setup.py: ")


def test_every_library_that_does_not_fit_has_its_reason(installed):
    first, second = installed(0, torch="2.5.1"), installed(1, torch="2.4.0")
    reasons = library.load_library().split("; ")
    assert [reason.split(" ")[0] for reason in reasons] == [str(first), str(second)]


def test_the_folder_of_the_package_comes_before_the_path_and_the_user_site_last(installed):
    on_path = installed()
    own = library.PACKAGE / "_C.abi3.so"
    user = Path(site.getusersitepackages(), "rpe_ops", "_C.abi3.so")
    user.parent.mkdir(parents=True)
    for path in (own, user):
        shutil.copy(on_path, path)
    assert library.find_libraries() == [own, on_path, user]


def test_the_fingerprint_follows_names_and_contents_but_not_line_ends(tmp_path):
    assert library.source_fingerprint(tmp_path) == ""
    source = tmp_path / "csrc" / "a.cpp"
    source.parent.mkdir()
    source.write_bytes(b"int a;\nint b;\n")
    first = library.source_fingerprint(tmp_path)
    source.write_bytes(b"int a;\r\nint b;\r\n")
    assert library.source_fingerprint(tmp_path) == first
    source.write_bytes(b"int a;\nint c;\n")
    assert library.source_fingerprint(tmp_path) != first
    source.write_bytes(b"int a;\nint b;\n")
    source.rename(source.with_suffix(".cu"))
    assert library.source_fingerprint(tmp_path) != first


def test_a_library_that_fits_is_used_after_one_that_does_not(tmp_path, monkeypatch):
    provide_library()
    good = library.library_path()
    stale = tmp_path / "rpe_ops" / "_C.abi3.so"
    stale.parent.mkdir()
    record = {**RECORD, "torch": "2.5.1"}
    stale.write_bytes(f"rpe_ops build record: {json.dumps(record)}\0".encode())
    monkeypatch.syspath_prepend(str(tmp_path))
    assert library.find_libraries()[0] == stale
    forget_library()
    assert library.load_library() == ""
    assert library.library_path() == good


def test_a_library_without_cuda_kernels_says_why():
    provide_library()
    if library.has_cuda_kernels():
        pytest.skip("this library has CUDA kernels")
    registered = torch._C._dispatch_has_kernel_for_dispatch_key
    assert registered("rpe_ops_cpp::gather", "CPU")
    assert not registered("rpe_ops_cpp::gather", "CUDA")
    assert f"{library.library_path()} was built without CUDA: " in library.reason_without_cuda()


def test_a_checkout_that_shadows_the_installed_package_finds_its_library(tmp_path):
    provide_library()
    checkout, installed = tmp_path / "checkout", tmp_path / "site"
    shutil.copytree(PACKAGE, checkout / "rpe_ops", ignore=shutil.ignore_patterns("build", "*.so"))
    (installed / "rpe_ops").mkdir(parents=True)
    shutil.copy(library.library_path(), installed / "rpe_ops")
    (installed / "rpe_ops" / "__init__.py").write_text("raise AssertionError('not shadowed')\n")
    code = (
        "import torch, rpe_ops; from rpe_ops import library\n"
        "assert library.load_library() == '', library.load_library()\n"
        "index = torch.tensor([[2, 0]])\n"
        "out = rpe_ops.gather(torch.tensor([[1., 2., 3.]]), index, implementation='cpp')\n"
        "print(rpe_ops.__file__, library.library_path(), out.tolist())"
    )
    output = subprocess.check_output(
        [sys.executable, "-c", code],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(installed)},
        text=True,
    )
    name = library.library_path().name
    assert output.split(" ", 2) == [
        str(checkout / "rpe_ops" / "__init__.py"),
        str(installed / "rpe_ops" / name),
        "[[3.0, 1.0]]\n",
    ]
