"""A check of a data set before training: `python -m datasets.check --help`.

It opens the data with the readers of the trainers, but collects all problems instead of stopping at
the first one. With `--images` it also decodes every image.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets.check.coco import check_coco
    from datasets.check.findings import Finding, Report
    from datasets.check.folders import check_folders
    from datasets.check.page import format_page
    from datasets.check.text import format_text

_MODULES = {
    "Finding": "findings",
    "Report": "findings",
    "check_coco": "coco",
    "check_folders": "folders",
    "format_page": "page",
    "format_text": "text",
}

__all__ = [*_MODULES]


def __getattr__(name: str) -> Any:
    """Import a public name at its first use, so that `--help` does not wait for torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    """Return all names, also those that are not imported yet."""
    return sorted({*globals(), *_MODULES})
