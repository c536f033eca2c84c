"""A split into training and validation images, drawn once by a seed and saved with the data.

Each run with the same fraction and seed reads the saved file, so the split remains the same when
images are added later: these belong to the training split. The file is JSON with the names of the
validation images, and can be edited.
"""

import json
import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datasets.errors import DataError
from datasets.stored_files import storage_paths, write_atomically

__all__ = ["SplitOptions", "split_images"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SplitOptions:
    """The options of a split.

    Attributes:
        fraction: Fraction of the images for validation, between 0 and 1.
        seed: Seed of the random choice.

    Raises:
        ValueError: The fraction is out of range.
    """

    fraction: float
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise ValueError(f"fraction must be between 0 and 1, got {self.fraction}")


def split_images(
    source: Path,
    folder: Path,
    names: Sequence[str],
    options: SplitOptions,
    groups: Sequence[str] | None = None,
) -> frozenset[str]:
    """Return the names of the validation images, read from the saved split or drawn and saved.

    The file is `folder/train_val_split_<source>_<fraction>_seed<seed>.json`, or in the user's cache
    if the folder cannot be written. Several processes may call this at the same time: all draw the
    same split, and each stores it atomically.

    Args:
        source: Folder, archive or annotation file that is split.
        folder: Folder of the saved split.
        names: Names of all N images.
        options: Fraction and seed.
        groups: Class of each image. Each class is split by itself, and has at least one image in
            each split if it has two. By default there is one group.

    Raises:
        DataError: The saved split is damaged or belongs to other images, or there are too few
            images.
    """
    name = f"train_val_split_{source.name}_{options.fraction:g}_seed{options.seed}.json"
    paths = storage_paths(source, folder, name)
    for path in paths:
        if path.is_file():
            chosen = _read(path, names)
            logger.info("%s: read from %s", _words(chosen, names, source), path)
            return chosen
    chosen = _draw(names, options, groups)
    if not chosen:
        raise DataError(f"{source} cannot be split: no class has two images")
    words = _words(chosen, names, source)
    content = {"train_val_split": options.fraction, "seed": options.seed, "val": sorted(chosen)}
    for path in paths:
        try:
            with write_atomically(path) as file:
                file.write(json.dumps(content, indent=1).encode())
        except OSError as error:
            logger.debug("cannot save the split at %s: %s", path, error)
        else:
            logger.info("%s: saved in %s", words, path)
            return chosen
    logger.warning("%s: the split could not be saved and is drawn again at every start", words)
    return chosen


def _words(chosen: frozenset[str], names: Sequence[str], source: Path) -> str:
    """Describe a split for the log."""
    return f"{len(chosen)} of the {len(names)} images of {source} are val"


def _draw(
    names: Sequence[str], options: SplitOptions, groups: Sequence[str] | None
) -> frozenset[str]:
    """Draw the validation images of each group."""
    members: dict[str, list[str]] = defaultdict(list)
    for name, group in zip(names, groups or [""] * len(names), strict=True):
        members[group].append(name)
    generator = np.random.default_rng(options.seed)
    chosen: set[str] = set()
    for group in sorted(members):
        ordered = sorted(members[group])
        count = min(max(round(options.fraction * len(ordered)), 1), len(ordered) - 1)
        chosen |= {ordered[i] for i in generator.permutation(len(ordered))[:count].tolist()}
    return frozenset(chosen)


def _read(path: Path, names: Sequence[str]) -> frozenset[str]:
    """Read the names of the validation images that still exist."""
    try:
        saved = frozenset(json.loads(path.read_bytes())["val"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is not a saved split: delete it to draw the split again"
        ) from error
    present = saved & frozenset(names)
    if not present or len(present) == len(names):
        raise DataError(
            f"{path} does not fit the images, {len(present)} of {len(names)} of them would be val: "
            "delete it to draw the split again"
        )
    if len(present) < len(saved):
        lost = len(saved) - len(present)
        logger.warning("%d val images of %s are no longer in the data", lost, path)
    return present
