"""The choices of the Triton kernels, found by name, so that a check can replace them.

A function `choose_…tiles` returns a named tuple of sizes. `choose_family` of
`rpe_ops.triton_kernels.attention` returns the name of the attention kernels.
"""

import importlib
import pkgutil
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from unittest import mock

import rpe_ops
from scripts.benchmark.gpu.setup import SkipError, require

__all__ = ["FACTORS", "changed_tiles", "families", "family", "tile_fields"]

FACTORS = (2.0, 0.5)
_CHOICE = re.compile(r"choose_(\w+_)?tiles")


def _modules() -> list[ModuleType]:
    """Return the modules of the Triton kernels.

    Raises:
        SkipError: Triton cannot be imported.
    """
    (package,) = require("rpe_ops.triton_kernels")
    names = [info.name for info in pkgutil.iter_modules(package.__path__)]
    return [importlib.import_module(f"{package.__name__}.{name}") for name in names]


def _choices() -> list[tuple[ModuleType, str, Callable]]:
    """Return the functions that choose tiles, with every module that refers to them."""
    return [
        (module, name, value)
        for module in _modules()
        for name, value in vars(module).items()
        if _CHOICE.fullmatch(name)
    ]


def tile_fields() -> list[str]:
    """Return the names of the sizes of all tiles; empty if there are none or no Triton."""
    try:
        modules = _modules()
    except SkipError:
        return []
    found: dict[str, None] = {}
    for module in modules:
        for name, value in vars(module).items():
            if name.endswith("Tiles") and hasattr(value, "_fields"):
                found |= dict.fromkeys(value._fields)
    return list(found)


@contextmanager
def changed_tiles(field: str, factor: float) -> Iterator[dict[str, None]]:
    """Multiply a size of all tiles that are chosen; yields their descriptions as keys.

    Raises:
        SkipError: No function chooses tiles.
    """
    chosen: dict[str, None] = {}

    def changing(choose: Callable) -> Callable:
        def changed(*args, **kwargs):
            tiles = choose(*args, **kwargs)
            if hasattr(tiles, field):
                value = max(1, int(getattr(tiles, field) * factor))
                tiles = tiles._replace(**{field: value})
                chosen[str(tiles)] = None
            return tiles

        return changed

    choices = _choices()
    if not choices:
        raise SkipError("no function of the Triton kernels chooses tiles")
    with ExitStack() as stack:
        for module, name, choose in choices:
            stack.enter_context(mock.patch.object(module, name, changing(choose)))
        yield chosen


def families() -> tuple[str, ...]:
    """Return the names of all attention kernels; empty without Triton."""
    try:
        require("rpe_ops.triton_kernels.attention")
    except SkipError:
        return ()
    return rpe_ops.VARIANTS["triton"]


@contextmanager
def family(name: str) -> Iterator[None]:
    """Use the kernels of one family for every shape."""
    (module,) = require("rpe_ops.triton_kernels.attention")
    with mock.patch.object(module, "choose_family", return_value=name):
        yield
