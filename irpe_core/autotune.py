"""Choice of the fastest attention on a GPU, by measurement (`irpe_core.candidates`).

Each kind of attention is measured at its first call. The choice is kept

- in the process,
- in a JSON file in the user's cache, for this GPU and these versions; it is safe to delete,
- in checkpoints (`Autotuner.state_dict`), so that a resumed training repeats the same numbers.

The processes of a distributed training agree: the first one that has a choice publishes it in the
store of the process group, and the others use it. They need not call attention together.

With the environment variable `IRPE_AUTOTUNE=0` nothing is measured, and the kernels are chosen by
shape.
"""

import functools
import hashlib
import json
import logging
import math
import os
import reprlib
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import rpe_ops
from irpe_core.candidates import CANDIDATES, Kind, Size, measure
from irpe_core.config import RPEConfig
from irpe_core.encoding import resolve_grid
from irpe_core.errors import CheckpointError
from irpe_core.fused import first_encoding, input_dtype

__all__ = ["AUTOTUNER", "Autotuner", "is_enabled"]

logger = logging.getLogger(__name__)

# Implementation of attention that is not measured.
_BY_SHAPE = "triton"
_MAX_CALLS = 4096


class Autotuner:
    """The choices of a process: one candidate for each kind of attention.

    Several threads may use it.

    Args:
        measure: Function like `irpe_core.candidates.measure`.
        path: JSON file with the choices of earlier processes; None for `irpe/autotune.json` in
            `$XDG_CACHE_HOME` or `~/.cache`.
    """

    def __init__(
        self,
        measure: Callable[[Kind, Size, torch.device], Mapping[str, float]] = measure,
        path: Path | None = None,
    ) -> None:
        self._measure = measure
        self._path = path
        # By environment (GPU and versions) and kind.
        self._choices: dict[str, dict[str, str]] = {}
        # By the exact shapes of a call, which are compared faster than kinds.
        self._by_call: dict[tuple, str] = {}
        self._lock = threading.Lock()

    def choose(
        self,
        q: Tensor,
        encodings: tuple[nn.Module | None, ...],
        grid: tuple[int | None, int | None],
        masked: bool,
        dropout_p: float,
    ) -> str:
        """Return the candidate for a call of attention, or the implementation without measurements.

        Args:
            q: Queries `(B, H, L, d)`.
            encodings: `rpe_q`, `rpe_k` and `rpe_v`, or None.
            grid: Height and width in tokens, or None for a square.
            masked: Whether keys are masked.
            dropout_p: Probability of dropping an attention weight.

        Raises:
            ValueError: The tokens do not form the grid, or `IRPE_AUTOTUNE` is neither 0 nor 1.
            RuntimeError: No candidate computes the right numbers.
        """
        config = first_encoding(encodings).config
        letters = "".join(c for c, e in zip("qkv", encodings, strict=True) if e is not None)
        # torch.compile uses no comparison of an attribute as a constant until a branch needs it.
        dropout = True if dropout_p > 0 else False  # noqa: SIM210
        # With activation checkpointing, the first of two equal passes may be without gradients.
        # Both must draw the same random numbers.
        flags = (input_dtype(q), masked, dropout, torch.is_grad_enabled() or dropout)
        if torch.compiler.is_compiling():
            batch, heads, tokens, head_dim = q.shape
            sizes = (heads, head_dim, _round_up(batch), _round_up(tokens))
            return _choose_while_tracing(config, letters, q.device, *sizes, *flags)
        call = (config, letters, q.shape, grid, flags, q.device)
        if call not in self._by_call:
            batch, heads, tokens, head_dim = q.shape
            sizes = (heads, head_dim, _round_up(batch), _round_up(tokens))
            kind = Kind(replace(config, rpe_on=letters), *sizes, *flags)
            size = Size(batch, *resolve_grid(tokens, config.skip, *grid))
            choice = self.choose_kind(kind, size, q.device)
            # Nothing can be measured while a CUDA graph is captured; a later call does it.
            if _is_capturing(q.device):
                return choice
            if len(self._by_call) >= _MAX_CALLS:
                self._by_call.clear()
            self._by_call[call] = choice
        return self._by_call[call]

    def choose_kind(self, kind: Kind, size: Size, device: torch.device) -> str:
        """Return the candidate for a kind of attention; without a choice, measure these sizes.

        Raises:
            ValueError: `IRPE_AUTOTUNE` is neither 0 nor 1.
            RuntimeError: No candidate computes the right numbers.
        """
        if not is_enabled() or _is_capturing(device):
            return _BY_SHAPE
        environment, name = _environment(device), str(kind)
        with self._lock:
            choice = self._choices.get(environment, {}).get(name)
            if choice not in CANDIDATES:
                choice = self._find(environment, name) or self._measure_and_write(
                    environment, kind, size, device
                )
                choice = _publish(f"{environment}/{name}", choice)
                self._choices.setdefault(environment, {})[name] = choice
        return choice

    def state_dict(self) -> dict[str, dict[str, str]]:
        """Return the choices of this process, by environment and kind, for a checkpoint."""
        with self._lock:
            return {environment: dict(found) for environment, found in self._choices.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, str]]) -> None:
        """Use choices from a checkpoint; those for another GPU or other versions have no effect.

        Raises:
            CheckpointError: `state` is not what `state_dict` returns.
        """
        tables = state.values() if isinstance(state, Mapping) else [None]
        if not all(isinstance(table, Mapping) for table in tables):
            raise CheckpointError(
                f"the choices of attention must be a dict of dicts, got {reprlib.repr(state)}"
            )
        with self._lock:
            for environment, found in state.items():
                known = {name: one for name, one in found.items() if isinstance(one, str)}
                self._choices.setdefault(environment, {}).update(known)
            self._by_call.clear()

    def _find(self, environment: str, name: str) -> str | None:
        """Return the choice of another process of this training, or of an earlier one."""
        choice = _published(f"{environment}/{name}")
        if choice is None:
            entry = _read(self._file()).get(environment, {}).get(name, {})
            choice = entry.get("choice") if isinstance(entry, dict) else None
        return choice if choice in CANDIDATES else None

    def _measure_and_write(
        self, environment: str, kind: Kind, size: Size, device: torch.device
    ) -> str:
        """Measure the candidates, log their times and write the fastest one to the file."""
        logger.info("measuring attention for %s", kind)
        times = self._measure(kind, size, device)
        choice = next(iter(times))
        microseconds = {name: round(1e6 * seconds, 1) for name, seconds in times.items()}
        listed = ", ".join(f"{name} {us:g} µs" for name, us in microseconds.items())
        logger.info("attention for %s: %s", kind, listed)
        _write(
            self._file(),
            environment,
            {str(kind): {"choice": choice, "size": list(size), "microseconds": microseconds}},
        )
        return choice

    def _file(self) -> Path:
        """Return the path of the file with the choices of earlier processes."""
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return self._path or Path(cache) / "irpe" / "autotune.json"


AUTOTUNER = Autotuner()


def _choose_while_tracing(
    config: RPEConfig, letters: str, device: torch.device, *properties: Any
) -> str:
    """Return the candidate for a traced call, whose exact sizes may be unknown.

    `properties` are those of a `Kind` after the first one.
    """
    kind = Kind(replace(config, rpe_on=letters), *properties)
    # The number of tokens is between half of the bound and the bound.
    side = max(1, math.isqrt(kind.tokens * 3 // 4))
    return AUTOTUNER.choose_kind(kind, Size(kind.batch, side, side), device)


# torch.compile then runs the function while it traces, and uses the result as a constant.
_choose_while_tracing._dynamo_marked_constant = True


def _round_up(number: int) -> int:
    """Return the smallest power of two that is not less than `number`, which may be symbolic."""
    power = 1
    while power < number:
        power *= 2
    return power


def is_enabled() -> bool:
    """Return whether the fastest attention is measured.

    Raises:
        ValueError: `IRPE_AUTOTUNE` is neither 0 nor 1.
    """
    value = os.environ.get("IRPE_AUTOTUNE", "1")
    if value not in ("0", "1"):
        raise ValueError(f"IRPE_AUTOTUNE must be 0 or 1, got {value!r}")
    return value == "1"


def _is_capturing(device: torch.device) -> bool:
    """Return whether a CUDA graph is being captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@functools.cache
def _environment(device: torch.device) -> str:
    """Return what times and results depend on: the GPU, the versions and our sources."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    return f"{name}, torch {torch.__version__}, triton {triton}, irpe {_fingerprint()}"


def _fingerprint() -> str:
    """Return a short hash of the sources of rpe_ops and irpe_core."""
    digest = hashlib.sha256()
    for package in (Path(rpe_ops.__file__).parent, Path(__file__).parent):
        for source in sorted([*package.glob("*.py"), *package.glob("triton_kernels/*.py")]):
            digest.update(source.read_bytes())
    return digest.hexdigest()[:12]


def _published(key: str) -> str | None:
    """Return the choice that a process of this training has published; None without one."""
    store = _store()
    key = f"irpe_core.autotune/{key}"
    return store.get(key).decode() if store is not None and store.check([key]) else None


def _publish(key: str, choice: str) -> str:
    """Publish a choice for all processes, and return the one that was published first."""
    store = _store()
    if store is None:
        return choice
    return store.compare_set(f"irpe_core.autotune/{key}", "", choice).decode()


def _store() -> dist.Store | None:
    """Return the store of the process group; None without one.

    A collective operation would need all processes at the same time, but their images may have
    different sizes.
    """
    if not dist.is_available() or not dist.is_initialized():
        return None
    return dist.distributed_c10d._get_default_store()


def _read(path: Path) -> dict[str, Any]:
    """Return the content of the file; empty if it is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and all(isinstance(x, dict) for x in content.values()):
            return content
        problem = "it is not a table of choices"
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        problem = str(error)
    logger.warning("ignoring %s: %s", path, problem)
    return {}


def _write(path: Path, environment: str, entries: Mapping[str, Any]) -> None:
    """Add entries to the file, atomically."""
    content = _read(path)
    content.setdefault(environment, {}).update(entries)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=path.name, delete=False, encoding="utf-8"
        ) as file:
            json.dump(content, file, indent=1)
        Path(file.name).replace(path)
    except OSError as error:
        logger.warning("cannot write %s: %s", path, error)
