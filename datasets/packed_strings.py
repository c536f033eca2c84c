"""Compact storage of a million strings in two numpy arrays.

A list of a million `str` needs about 80 extra bytes per string. Forked workers copy it page by
page, because every access changes a reference count. Spawned workers unpickle it string by string.
One array of NUL-terminated UTF-8 bytes and one array with the position of each NUL avoid all three
costs.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

__all__ = ["PackedStrings"]


class PackedStrings(Sequence[str]):
    """An immutable sequence of strings without NUL characters, such as file names.

    Args:
        blob: Array (bytes,) uint8 of all strings in UTF-8, each followed by one NUL. Undecodable
            bytes of file names are kept as surrogate escapes.
        ends: Positions of the NULs, (strings,) int64; found in the blob by default.

    Attributes:
        blob: As given.
        ends: Positions of the NULs.
    """

    def __init__(self, blob: np.ndarray, ends: np.ndarray | None = None) -> None:
        self.blob = blob
        self.ends = np.flatnonzero(blob == 0) if ends is None else ends

    @classmethod
    def pack(cls, strings: Iterable[str]) -> "PackedStrings":
        """Pack strings and keep their order.

        Raises:
            ValueError: A string has a NUL character or cannot be encoded.
        """
        strings = list(strings)
        joined = "".join(f"{string}\0" for string in strings)
        packed = cls(np.frombuffer(joined.encode("utf-8", "surrogateescape"), dtype=np.uint8))
        if len(packed) != len(strings):
            raise ValueError("names must not have NUL characters")
        return packed

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, position: int) -> str:
        if not -len(self) <= position < len(self):
            raise IndexError(f"position must be in [{-len(self)}, {len(self)}), got {position}")
        position %= len(self)
        start = self.ends[position - 1] + 1 if position else 0
        return self.blob[start : self.ends[position]].tobytes().decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        strings = self.blob.tobytes().decode("utf-8", "surrogateescape").split("\0")
        return iter(strings[:-1])
