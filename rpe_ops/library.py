"""The compiled operators `rpe_ops_cpp::*`: find and load them, or say why they cannot be used.

The library lies beside this file after an installation. A checkout that is imported instead of the
installed package has none, so every `rpe_ops` folder on the path is searched too. A library carries
a record of the torch and the sources it was built from; another torch or other sources are refused
before they can crash. The operators at the end have the signatures of `rpe_ops.reference`.
"""

import functools
import hashlib
import json
import re
import site
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "load_library",
    "library_path",
    "has_cuda_kernels",
    "reason_without_cuda",
    "gather",
    "bucket_sum",
    "attention_forward",
    "attention_backward",
]

PACKAGE = Path(__file__).resolve().parent
BUILD_COMMAND = "pip install ./rpe_ops"
_PATTERNS = ("_C*.so", "_C*.pyd")
_RECORD = re.compile(rb"rpe_ops build record: (\{[^\0]*\})\0")


class _Loaded(NamedTuple):
    path: Path | None
    record: dict[str, str]
    reason: str


def source_fingerprint(package: Path) -> str:
    """Hash of the C++ and CUDA sources under a package folder; empty where they are not kept."""
    digest = hashlib.sha256()
    sources = sorted((package / "csrc").glob("*.*"))
    for source in sources:
        # Checkouts on Windows have other line ends.
        digest.update(f"{source.name}\n{source.read_text(encoding='utf-8')}".encode())
    return digest.hexdigest() if sources else ""


def find_libraries() -> list[Path]:
    """Every compiled library of this package: its own folder first, then along the path."""
    folders = [PACKAGE]
    for entry in [*sys.path, *site.getsitepackages(), site.getusersitepackages()]:
        folders.append(Path(entry).resolve() / "rpe_ops")
    found = [path for folder in folders for pattern in _PATTERNS for path in folder.glob(pattern)]
    return list(dict.fromkeys(found))


def _read_record(path: Path) -> dict[str, str]:
    """What `setup.py` wrote into the library; empty when it holds no record."""
    match = _RECORD.search(path.read_bytes())
    return json.loads(match[1]) if match else {}


def _refusal(path: Path, record: dict[str, str]) -> str:
    """Why a library must not be loaded; empty when it fits."""
    rebuild = f"rebuild it with `{BUILD_COMMAND}`"
    if not record:
        return f"{path} was not built by rpe_ops/setup.py: {rebuild}"
    # Builds of one version for the CPU and for CUDA share the interface of the CPU part.
    built, here = (version.split("+")[0] for version in (record["torch"], torch.__version__))
    if built != here:
        return f"{path} was built for torch {built}, this is torch {here}: {rebuild}"
    # An installed package keeps no sources, and its library was built with it.
    if source_fingerprint(PACKAGE) not in ("", record["sources"]):
        return f"{path} was built from other sources than {PACKAGE / 'csrc'}: {rebuild}"
    return ""


def _load(path: Path) -> str:
    try:
        torch.ops.load_library(path)
    except OSError as error:
        # What the loader of the system says, such as a symbol that is missing.
        return f"{path} cannot be loaded: {error.__cause__ or error}"
    return ""


@functools.cache
def _loaded() -> _Loaded:
    """Load the first library that fits, once per process."""
    reasons = []
    for path in find_libraries():
        record = _read_record(path)
        reason = _refusal(path, record) or _load(path)
        if not reason:
            return _Loaded(path, record, "")
        reasons.append(reason)
    return _Loaded(None, {}, "; ".join(reasons) or f"it is not built: run `{BUILD_COMMAND}`")


def load_library() -> str:
    """Load the compiled operators into `torch.ops.rpe_ops_cpp`, the first time it is called.

    Returns:
        Empty when they are loaded, else the reason why they cannot be.
    """
    return _loaded().reason


def library_path() -> Path | None:
    """The library that is loaded, None without one."""
    return _loaded().path


def has_cuda_kernels() -> bool:
    """Whether the loaded library holds CUDA kernels; says nothing of a GPU."""
    return not reason_without_cuda()


def reason_without_cuda() -> str:
    """Why there are no CUDA kernels; empty when there are."""
    loaded = _loaded()
    if loaded.reason or not loaded.record["without_cuda"]:
        return loaded.reason
    return f"{loaded.path} was built without CUDA: {loaded.record['without_cuda']}"


def gather(lookup: Tensor, index: Tensor) -> Tensor:
    """Spread per-bucket values over the pairs; see `rpe_ops.gather`."""
    return torch.ops.rpe_ops_cpp.gather(lookup, index)


def bucket_sum(pairs: Tensor, index: Tensor, num_buckets: int) -> Tensor:
    """Sum the pairs of every bucket; see `rpe_ops.bucket_sum`."""
    return torch.ops.rpe_ops_cpp.bucket_sum(pairs, index, num_buckets)


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table_k: Tensor | None,
    table_q: Tensor | None,
    table_v: Tensor | None,
    buckets: tuple,
    *rest,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend; see `rpe_ops.tables.attention_forward`."""
    # The width of a run is for kernels that keep part of a table at hand.
    grid = buckets[:6]
    return torch.ops.rpe_ops_cpp.attention_forward(q, k, v, table_k, table_q, table_v, *grid, *rest)


def attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table_k: Tensor | None,
    table_q: Tensor | None,
    table_v: Tensor | None,
    buckets: tuple,
    *rest,
) -> tuple[Tensor | None, ...]:
    """Gradients of attention; see `rpe_ops.tables.attention_backward`."""
    tables, grid = (table_k, table_q, table_v), buckets[:6]
    return torch.ops.rpe_ops_cpp.attention_backward(grad_out, q, k, v, *tables, *grid, *rest)
