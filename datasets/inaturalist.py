"""The train and validation splits of the iNaturalist 2018 and 2019 competitions.

torchvision reads the images and categories. It expects all images, without splits, as
`root/<year>/<super category>/<number>/<hash>.jpg`. This module adds the splits, from the official
annotation files `root/train<year>.json` and `root/val<year>.json`
(https://github.com/visipedia/inat_comp).
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from torchvision.datasets import INaturalist

from datasets.errors import DataError
from datasets.images import LabeledImages, read_bytes
from datasets.names import InatCategory
from datasets.packed_strings import PackedStrings

__all__ = ["INaturalistImages"]


class INaturalistImages(LabeledImages):
    """One split of an iNaturalist competition.

    Classes are numbered over the whole competition, so both splits have the same numbers.

    Args:
        root: Folder with `<year>/`, `train<year>.json` and `val<year>.json`.
        year: `2018` or `2019`.
        split: `train` or `val`.
        category: Taxonomic rank that images are classified by. `name` (species) and
            `supercategory` are read from the folder names, the other ranks from
            `root/categories.json`.
        transform: Function applied to the RGB image.
        download: Let torchvision download the images (more than 70 GB) if they are missing.

    Raises:
        DataError: Images, annotation files or `categories.json` are missing or damaged.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        year: Literal["2018", "2019"],
        split: Literal["train", "val"],
        *,
        category: InatCategory = "name",
        transform: Callable[[Image.Image], Any] | None = None,
        download: bool = False,
    ) -> None:
        root = Path(root)
        tree = _open_tree(root, year, download)
        numbers, classes = _number_species(tree, category, root)
        species = {f"{tree.all_categories[number]}/{file}": number for number, file in tree.index}
        names = _names_of_split(root / f"{split}{year}.json")
        missing = [name for name in names if name not in species]
        if missing:
            raise DataError(
                f"{root / year} lacks {len(missing)} of the {len(names)} images of {split}, "
                f"the first is {missing[0]}"
            )
        targets = np.array([numbers[species[name]] for name in names], dtype=np.int64)
        super().__init__(root / year, PackedStrings.pack(names), targets, classes, transform)

    def read(self, index: int) -> bytes:
        """Read the file of image `index`."""
        return read_bytes(self.source / self.names[index])


def _open_tree(root: Path, year: str, download: bool) -> INaturalist:
    """Open the images of one year with torchvision."""
    # torchvision would create a missing folder and then report it as corrupted.
    if not download and not (root / year).is_dir():
        raise DataError(f"there is no folder {root / year}: expected the images in it")
    try:
        return INaturalist(str(root), version=year, download=download)
    except (RuntimeError, OSError) as error:
        raise DataError(f"iNaturalist {year} in {root} cannot be opened: {error}") from error


def _names_of_split(path: Path) -> list[str]:
    """Read the image names of a split, `<super category>/<number>/<hash>.jpg`, sorted."""
    try:
        images = _load_json(path)["images"]
        names = sorted("/".join(image["file_name"].split("/")[-3:]) for image in images)
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} is not an iNaturalist annotation file: {error!r}") from error
    if not names:
        raise DataError(f"{path} lists no images")
    return names


def _number_species(tree: INaturalist, category: str, root: Path) -> tuple[list[int], list[str]]:
    """Return the class number of every species, and the class names."""
    count = len(tree.all_categories)
    if category == "name":
        return list(range(count)), list(tree.all_categories)
    if category == "supercategory":
        names = [Path(folder).parent.as_posix() for folder in tree.all_categories]
    else:
        path = root / "categories.json"
        try:
            by_species = {row["id"]: row[category] for row in _load_json(path)}
            names = [by_species[species] for species in range(count)]
        except (KeyError, TypeError) as error:
            raise DataError(f"{path} does not give the {category} of every species") from error
    classes = sorted(set(names))
    number = {name: i for i, name in enumerate(classes)}
    return [number[name] for name in names], classes


def _load_json(path: Path) -> Any:
    """Read a JSON file."""
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}") from error
