"""Install rpe_ops, with its compiled operators where they can be built.

    cd rpe_ops && python setup.py install        (with --user outside a virtual environment)
    pip install ./rpe_ops                        (--no-build-isolation for other build settings)

The library `rpe_ops/_C*.so` is built against the torch of this environment. It always has the CPU
part. It has the CUDA part if torch has CUDA, nvcc is found (CUDA_HOME) and a GPU is visible.
FORCE_CUDA=1 builds the CUDA part without a GPU, for the architectures in TORCH_CUDA_ARCH_LIST;
FORCE_CUDA=0 leaves it out. Without torch or a C++ compiler the package is pure Python.
`python -m rpe_ops` prints what an installation can run.

The metadata is in this file because old versions of setuptools ignore it in pyproject.toml.
"""

import json
import os
import runpy
import shutil
import site
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
os.chdir(HERE)
# `cd rpe_ops && python setup.py` puts this folder first on the path. A module of this package could
# then shadow a module of the same name elsewhere.
sys.path = [entry for entry in sys.path if Path(entry).resolve() != HERE]
# pip builds in an isolated environment, but the library must fit the torch that is installed.
outside = site.getsitepackages()
if sys.prefix == sys.base_prefix:
    outside.append(site.getusersitepackages())
for entry in outside:
    site.addsitedir(entry)

from setuptools import setup  # noqa: E402
from setuptools.command.build_py import build_py  # noqa: E402
from setuptools.errors import CompileError, LinkError  # noqa: E402


def say(message: str) -> None:
    """Print a message of this build."""
    print(f"rpe_ops: {message}", flush=True)


def reason_without_library() -> str:
    """Return why nothing can be compiled here; empty if it can."""
    try:
        from torch.utils import cpp_extension
    except ImportError as error:
        return f"torch cannot be imported ({error})"
    if os.name != "nt" and not shutil.which(cpp_extension.get_cxx_compiler()):
        return f"there is no C++ compiler ({cpp_extension.get_cxx_compiler()})"
    return ""


def reason_without_cuda() -> str:
    """Return why the CUDA kernels are not compiled; empty if they are."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    wanted = os.environ.get("FORCE_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"rpe_ops: FORCE_CUDA must be 0 or 1, got {wanted!r}")
    if wanted == "0":
        return "FORCE_CUDA=0"
    reason = ""
    if torch.version.cuda is None:
        reason = f"torch {torch.__version__} is built without CUDA"
    elif CUDA_HOME is None or not shutil.which("nvcc", path=str(Path(CUDA_HOME, "bin"))):
        reason = f"nvcc is not found (CUDA_HOME is {CUDA_HOME})"
    elif not wanted and not torch.cuda.is_available():
        reason = "no GPU is visible and FORCE_CUDA=1 is not set"
    if reason and wanted:
        raise SystemExit(f"rpe_ops: FORCE_CUDA=1, but {reason}")
    return reason


def compiled_library() -> dict:
    """Return the arguments of `setup` that build `rpe_ops._C`, a shared library of operators."""
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    without_cuda = reason_without_cuda()
    library = runpy.run_path(str(HERE / "library.py"))
    record = {
        "torch": torch.__version__,
        "cuda": "" if without_cuda else torch.version.cuda,
        "without_cuda": without_cuda,
        "sources": library["source_fingerprint"](HERE),
    }

    class BuildLibrary(BuildExtension):
        """Build of a library that contains a build record and exports no Python module."""

        def build_extensions(self) -> None:
            """Write the header with the build record, then compile."""
            header = Path(self.build_temp).resolve() / "rpe_ops_build.h"
            header.parent.mkdir(parents=True, exist_ok=True)
            text = f"#define RPE_OPS_BUILD_RECORD {json.dumps(json.dumps(record))}\n"
            # An unchanged header is not written, so that the objects are not compiled again.
            if not header.exists() or header.read_text() != text:
                header.write_text(text)
            self.extensions[0].include_dirs.append(str(header.parent))
            try:
                super().build_extensions()
            except (RuntimeError, CompileError, LinkError):
                if not without_cuda:
                    say(
                        f"CUDA_HOME must be a toolkit of CUDA {torch.version.cuda}, as for torch; "
                        "FORCE_CUDA=0 leaves the CUDA kernels out"
                    )
                raise

        def get_export_symbols(self, ext) -> list[str]:
            """Return no symbols; the default is the init function of a Python module."""
            return []

    suffixes = (".cpp",) if without_cuda else (".cpp", ".cu")
    sources = [f"csrc/{path.name}" for path in sorted(Path("csrc").iterdir())]
    unix = os.name != "nt"
    extension = (CppExtension if without_cuda else CUDAExtension)(
        "rpe_ops._C",
        [source for source in sources if source.endswith(suffixes)],
        depends=sources,
        py_limited_api=True,
        extra_compile_args={
            "cxx": ["-O3", "-g0", "-fopenmp"] if unix else ["/O2", "/openmp"],
            "nvcc": ["-O3"],
        },
        extra_link_args=["-fopenmp"] if unix else [],
    )
    say("compiling for CPU" + (f", not for CUDA: {without_cuda}" if without_cuda else " and CUDA"))
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildLibrary}}


class BuildModules(build_py):
    """Build of the Python modules, without this file."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        """Return the modules of a package without `setup.py`."""
        found = super().find_package_modules(package, package_dir)
        return [module for module in found if Path(module[2]).resolve() != HERE / "setup.py"]


def main() -> None:
    """Install the package."""
    reason = reason_without_library()
    if reason:
        say(f"installing pure Python, without the compiled operators: {reason}")
    library = {} if reason else compiled_library()
    subpackages = sorted(path.parent.name for path in HERE.glob("*/__init__.py"))
    setup(
        name="rpe-ops",
        version="0.1.0",
        description="Operators of image relative position encoding for vision transformers",
        license="Apache-2.0",
        python_requires=">=3.10",
        install_requires=["torch>=2.6"],
        packages=["rpe_ops", *(f"rpe_ops.{name}" for name in subpackages)],
        package_dir={"rpe_ops": "."},
        zip_safe=False,
        ext_modules=library.get("ext_modules", []),
        cmdclass={"build_py": BuildModules, **library.get("cmdclass", {})},
    )


main()
