"""iNaturalist 2018 and 2019, whose images and categories torchvision finds.

The competition keeps all images in one tree, which torchvision reads as
`root/<year>/<super category>/<number>/<hash>.jpg`; which of them are for training is written in
the official `root/train<year>.json` and `root/val<year>.json`
(https://github.com/visipedia/inat_comp). torchvision knows no splits; they are added here.
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
from datasets.names import PackedNames

InatCategory = Literal[
    "name", "supercategory", "kingdom", "phylum", "class", "order", "family", "genus"
]


class INaturalistImages(LabeledImages):
    """One split of an iNaturalist competition.

    Both splits number the classes of the whole competition, so they agree.

    Args:
        root: Folder with `<year>/`, `train<year>.json` and `val<year>.json`.
        year: `2018` or `2019`.
        split: `train` or `val`.
        category: What the classes are: `name` (species) and `supercategory` follow from the
            folders; the ranks between them are looked up in `root/categories.json`.
        transform: Applied to the RGB image.
        download: Let torchvision download the images (more than 70 GB) where they are missing.

    Raises:
        DataError: Images, annotations or the category are missing or damaged.
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
                f"the first {missing[0]}"
            )
        targets = np.array([numbers[species[name]] for name in names], dtype=np.int64)
        super().__init__(root / year, PackedNames.pack(names), targets, classes, transform)

    def _read(self, index: int) -> bytes:
        return read_bytes(self.source / self.names[index])


def _open_tree(root: Path, year: str, download: bool) -> INaturalist:
    # torchvision would create a missing folder, and speak of an empty one as corrupted.
    if not download and not (root / year).is_dir():
        raise DataError(f"there is no folder {root / year}: expected the images in it")
    try:
        return INaturalist(str(root), version=year, download=download)
    except (RuntimeError, OSError) as error:
        raise DataError(f"iNaturalist {year} in {root} cannot be opened: {error}") from error


def _names_of_split(path: Path) -> list[str]:
    """Sorted `<super category>/<number>/<hash>.jpg` of a split's official annotation."""
    try:
        images = _load_json(path)["images"]
        names = sorted("/".join(image["file_name"].split("/")[-3:]) for image in images)
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} is no iNaturalist annotation: {error!r} is missing") from error
    if not names:
        raise DataError(f"{path} lists no images")
    return names


def _number_species(tree: INaturalist, category: str, root: Path) -> tuple[list[int], list[str]]:
    """Returns the class number of every species, and the class names."""
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
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path} is no valid JSON: {error}") from error
