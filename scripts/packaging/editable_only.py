"""Build backend of the root pyproject.toml: setuptools for `pip install -e .`, and nothing else.

Any other installation would copy top-level packages with common names into site-packages, where
`datasets` overwrites the files of Hugging Face's package of that name. rpe_ops and irpe_core have
build files of their own and are installed by `pip install ./rpe_ops ./irpe_core`.
"""

from typing import NoReturn

from setuptools.build_meta import (
    build_editable,
    get_requires_for_build_editable,
    prepare_metadata_for_build_editable,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
]


def get_requires_for_build_wheel(config_settings: dict | None = None) -> NoReturn:
    """Refuse a build before its dependencies are downloaded."""
    raise SystemExit(
        "error: this repository can only be installed with `pip install -e .` (the two libraries "
        "also with `pip install ./rpe_ops ./irpe_core`)"
    )


def build_wheel(*arguments: object, **options: object) -> NoReturn:
    """Refuse a build that did not ask for its requirements first."""
    get_requires_for_build_wheel()


def build_sdist(*arguments: object, **options: object) -> NoReturn:
    """Refuse a source distribution, which could not be installed."""
    get_requires_for_build_wheel()
