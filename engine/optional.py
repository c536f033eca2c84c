"""Packages that may be missing, or another one of the same name: errors that say what to do."""

import importlib.util
import sys
from pathlib import Path

from engine.errors import UserError

__all__ = ["ForeignPackageError", "is_installed", "require", "require_own"]

_ROOT = Path(__file__).resolve().parents[1]


class ForeignPackageError(ImportError):
    """An import of another package with the name of one of ours.

    Attributes:
        exit_code: Exit code of a command that ends with this error, without a traceback.
    """

    exit_code = 1


def is_installed(package: str) -> bool:
    """Return whether a package can be imported, without importing it."""
    return sys.modules.get(package) is not None or importlib.util.find_spec(package) is not None


def require(package: str, purpose: str) -> None:
    """Check that an optional package is installed.

    Args:
        package: Name of the package, both to import and to install.
        purpose: What needs it, such as `--logger wandb`.

    Raises:
        UserError: It is not installed.
    """
    if not is_installed(package):
        raise UserError(f"{purpose} needs the package {package}: pip install {package}")


def require_own(package: str, importer: str) -> None:
    """Check that a package is found in the folder of this project.

    Args:
        package: Name of the package, such as `datasets`, which Hugging Face has, too.
        importer: Name of the package that imports it. `python -m` prints the error in one line if
            it is about the package of the command.

    Raises:
        ForeignPackageError: Another package comes first in the search path, or none is found.
    """
    spec = importlib.util.find_spec(package)
    found = spec.origin if spec else None
    if found is None or Path(found).resolve().parents[1] != _ROOT:
        raise ForeignPackageError(
            f"the package {package} must be {_ROOT / package}, got {found}: run in {_ROOT}, or "
            f"put it first in PYTHONPATH",
            name=importer,
        )
