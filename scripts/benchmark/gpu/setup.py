"""What every check gets: the device, the sizes of a dry run, and the errors that skip a check."""

import fcntl
import hashlib
import importlib
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

import rpe_ops
from scripts.benchmark.gpu.client import ROOT

__all__ = [
    "Check",
    "Setup",
    "SkipError",
    "import_tests",
    "machine",
    "poisoned_memory",
    "require",
    "require_implementation",
    "require_packages",
]

Check = Callable[[], dict]


# Seconds that a check waits for memory which other processes hold.
_MEMORY_SECONDS = 40


class SkipError(Exception):
    """Error for a check that cannot run here; the message is the reason."""


@dataclass(frozen=True)
class Setup:
    """The device of the checks.

    Attributes:
        device: `cuda`, or `cpu` in a dry run.
        dry_run: Whether sizes are tiny.
        build: Folder of the compiled extension.
    """

    device: torch.device
    dry_run: bool
    build: Path

    @classmethod
    def of_environment(cls) -> "Setup":
        """Return the setup that the parent process asked for."""
        dry_run = os.environ.get("IRPE_BENCHMARK_DRY_RUN") == "1"
        build = Path(os.environ["IRPE_BENCHMARK_BUILD"])
        return cls(torch.device("cpu" if dry_run else "cuda"), dry_run, build)

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    def require_gpu(self, what: str) -> None:
        """Skip the check unless it runs on a GPU.

        Raises:
            SkipError: It runs on a CPU.
        """
        if not self.on_gpu:
            raise SkipError(f"{what} needs CUDA, this is a dry run on the CPU")

    def alone(self, gigabytes: float, check: Callable[..., dict], *arguments) -> dict:
        """Run a check that needs much GPU memory, one such check at a time.

        Raises:
            SkipError: Less memory is free, also after a while.
        """
        if not self.on_gpu:
            return check(*arguments)
        self.build.mkdir(parents=True, exist_ok=True)
        with (self.build / "large.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._wait_for_memory(gigabytes)
            try:
                return check(*arguments)
            finally:
                torch.cuda.empty_cache()

    def _wait_for_memory(self, gigabytes: float) -> None:
        """Wait until other processes leave so much GPU memory free."""
        for _ in range(_MEMORY_SECONDS):
            free, _ = torch.cuda.mem_get_info()
            if free > 1e9 * gigabytes:
                return
            time.sleep(1)
        raise SkipError(f"needs {gigabytes:.0f} GB of GPU memory, {free / 1e9:.0f} GB are free")


def require(*modules: str) -> list[ModuleType]:
    """Import modules.

    Raises:
        SkipError: One cannot be imported.
    """
    try:
        return [importlib.import_module(name) for name in modules]
    except ImportError as error:
        raise SkipError(f"needs {modules[0]}: {error}") from error


def require_implementation(implementation: str, setup: Setup, operator: str) -> None:
    """Skip the check if an implementation cannot run.

    Raises:
        SkipError: It cannot run.
    """
    reason = rpe_ops.available_implementations(setup.device, operator)[implementation]
    if reason:
        raise SkipError(f"{implementation} cannot run: {reason}")


def require_packages(*names: str) -> None:
    """Skip the check unless packages are installed.

    Raises:
        SkipError: Some are missing; the message lists all of them.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise SkipError(f"needs {', '.join(missing)}")


def import_tests(module: str) -> ModuleType:
    """Import a module of this repository's `tests`, also if another package has this name."""
    if "tests" not in sys.modules:
        package = ModuleType("tests")
        package.__path__ = [str(ROOT / "tests")]
        sys.modules["tests"] = package
    return importlib.import_module(f"tests.{module}")


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill new memory with NaN (integers: their maximum) to detect outputs that are not written."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def machine(setup: Setup) -> dict:
    """Return the machine, versions and sources; `error` if there is no GPU."""
    if setup.on_gpu and not torch.cuda.is_available():
        return {"error": "no GPU is visible to torch (--dry_run runs on the CPU)"}
    provenance = _provenance()
    try:
        triton = importlib.import_module("triton").__version__
    except ImportError as error:
        triton = f"cannot be imported: {error}"
    found = {
        **provenance.provenance(),
        **provenance.machine(setup.device),
        "triton": triton,
        "cores": os.cpu_count(),
        "sources": _sources(),
        "dry_run": setup.dry_run,
    }
    if setup.on_gpu:
        properties = torch.cuda.get_device_properties(setup.device)
        found["compute_capability"] = f"{properties.major}.{properties.minor}"
        found["gpu_memory_gb"] = round(properties.total_memory / 1e9, 1)
        found["gpus"] = torch.cuda.device_count()
    return found


def _provenance() -> ModuleType:
    """Import `engine.provenance`, also without pydantic, which the package `engine` needs."""
    try:
        return importlib.import_module("engine.provenance")
    except ImportError:
        path = ROOT / "engine" / "provenance.py"
        spec = importlib.util.spec_from_file_location("provenance_of_engine", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module


def _sources() -> str:
    """Return a hash of the sources of the operators and of the encodings."""
    digest = hashlib.sha256()
    for package in ("rpe_ops", "irpe_core"):
        for path in sorted((ROOT / package).rglob("*")):
            # Builds in the package folder are no sources.
            if path.suffix in (".py", ".cpp", ".cu", ".cuh", ".h") and "build" not in path.parts:
                digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]
