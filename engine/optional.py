"""Optional packages: an error that says what to install where one is missing."""

import importlib.util
import sys

from engine.errors import UserError

__all__ = ["is_installed", "require"]


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
