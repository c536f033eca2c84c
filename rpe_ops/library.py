"""The compiled operators `rpe_ops_cpp::*`: find and load them, or report why they cannot be used.

An installation puts the library into the folder of this file. A checkout that is imported instead
of the installed package has no library, so every `rpe_ops` folder on the path is searched too. A
library contains a record of the torch version and the sources that it was built with. If they
differ from those in use, the library is not loaded, because it could crash. The operators at the
end of this file have the signatures of `rpe_ops.reference`. Notation: rpe_ops/README.md.
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
    "source_fingerprint",
    "find_libraries",
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
    """The loaded library with its build record, or the reason why there is none."""

    path: Path | None
    record: dict[str, str]
    reason: str


def source_fingerprint(package: Path) -> str:
    """Return a hash of the C++ and CUDA sources in a package folder; empty without sources."""
    digest = hashlib.sha256()
    sources = sorted((package / "csrc").glob("*.*"))
    for source in sources:
        # Text mode gives the same line ends for checkouts on Windows.
        digest.update(f"{source.name}\n{source.read_text(encoding='utf-8')}".encode())
    return digest.hexdigest() if sources else ""


def find_libraries() -> list[Path]:
    """Return every compiled library of this package: its own folder first, then the path."""
    folders = [PACKAGE]
    for entry in [*sys.path, *site.getsitepackages(), site.getusersitepackages()]:
        folders.append(Path(entry).resolve() / "rpe_ops")
    found = [path for folder in folders for pattern in _PATTERNS for path in folder.glob(pattern)]
    return list(dict.fromkeys(found))


def _read_record(path: Path) -> dict[str, str]:
    """Read the record that `setup.py` wrote into the library; empty if it has none."""
    match = _RECORD.search(path.read_bytes())
    return json.loads(match[1]) if match else {}


def _refusal(path: Path, record: dict[str, str]) -> str:
    """Return why a library must not be loaded; empty if it fits."""
    rebuild = f"rebuild it with `{BUILD_COMMAND}`"
    if not record:
        return f"{path} was not built by rpe_ops/setup.py: {rebuild}"
    # The part after the plus, such as cu126, is ignored: it does not change the CPU's interface.
    built, here = (version.split("+")[0] for version in (record["torch"], torch.__version__))
    if built != here:
        return f"{path} was built for torch {built}, this is torch {here}: {rebuild}"
    # An installed package has no sources; its library was built together with it.
    if source_fingerprint(PACKAGE) not in ("", record["sources"]):
        return f"{path} was built from other sources than {PACKAGE / 'csrc'}: {rebuild}"
    return ""


def _load(path: Path) -> str:
    """Load a library and return why that failed; empty if it succeeded."""
    try:
        torch.ops.load_library(path)
    except OSError as error:
        # The cause is the message of the system's loader, such as a missing symbol.
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
    """Load the compiled operators into `torch.ops.rpe_ops_cpp`, once per process.

    Returns:
        An empty string if they are loaded, else the reason why they cannot be.
    """
    return _loaded().reason


def library_path() -> Path | None:
    """Return the path of the loaded library, None without one."""
    return _loaded().path


def has_cuda_kernels() -> bool:
    """Return whether the loaded library contains CUDA kernels, with or without a GPU."""
    return not reason_without_cuda()


def reason_without_cuda() -> str:
    """Return why there are no CUDA kernels; empty if there are."""
    loaded = _loaded()
    if loaded.reason or not loaded.record["without_cuda"]:
        return loaded.reason
    return f"{loaded.path} was built without CUDA: {loaded.record['without_cuda']}"


def gather(lookup: Tensor, bucket_ids: Tensor) -> Tensor:
    """Read the value of every pair's bucket; see `rpe_ops.gather`."""
    return torch.ops.rpe_ops_cpp.gather(lookup, bucket_ids)


def bucket_sum(pairs: Tensor, bucket_ids: Tensor, num_buckets: int) -> Tensor:
    """Sum the pairs of every bucket; see `rpe_ops.bucket_sum`."""
    return torch.ops.rpe_ops_cpp.bucket_sum(pairs, bucket_ids, num_buckets)


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
    # The last field, run_width, is used by the Triton kernels only.
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
    """Compute the gradients of attention; see `rpe_ops.tables.attention_backward`."""
    tables, grid = (table_k, table_q, table_v), buckets[:6]
    return torch.ops.rpe_ops_cpp.attention_backward(grad_out, q, k, v, *tables, *grid, *rest)
