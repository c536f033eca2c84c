"""A million strings in two numpy arrays.

A list of a million `str` costs about 80 bytes more per name, is copied page by page into every
forked worker (each look changes a reference count) and is pickled string by string into spawned
ones. One blob of NUL-terminated UTF-8 with the position of each NUL has none of these costs.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np


class PackedNames(Sequence[str]):
    """An immutable sequence of strings that hold no NUL, such as file names.

    Args:
        blob: (bytes,) uint8, every name in UTF-8 (undecodable bytes of file names kept as
            surrogate escapes) followed by one NUL.
    """

    def __init__(self, blob: np.ndarray) -> None:
        self.blob = blob
        self._ends = np.flatnonzero(blob == 0)

    @classmethod
    def pack(cls, names: Iterable[str]) -> "PackedNames":
        """Packs names in the order given."""
        joined = "".join(f"{name}\0" for name in names)
        return cls(np.frombuffer(joined.encode("utf-8", "surrogateescape"), dtype=np.uint8))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, position: int) -> str:
        if not -len(self) <= position < len(self):
            raise IndexError(f"position {position} of {len(self)} names")
        position %= len(self)
        start = self._ends[position - 1] + 1 if position else 0
        return self.blob[start : self._ends[position]].tobytes().decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        names = self.blob.tobytes().decode("utf-8", "surrogateescape").split("\0")
        return iter(names[:-1])
