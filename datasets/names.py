"""The names of options for classification data, without the imports of the data sets."""

from typing import Literal

__all__ = ["DataSetName", "InatCategory"]

DataSetName = Literal["IMNET", "CIFAR", "INAT", "INAT19", "DIGITS", "DIRECTIONS"]

InatCategory = Literal[
    "kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name"
]
