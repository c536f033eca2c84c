"""The two errors of this package: one sentence each, ready to be shown to the user."""


class DataError(Exception):
    """Something is wrong with the user's data: a missing folder, a truncated archive, and so on.

    `str(error)` is the sentence alone even when a `DataLoader` worker raised it: torch hands such
    an error over with the worker's whole traceback as its message (kept in `args`).
    """

    def __str__(self) -> str:
        lines = super().__str__().strip().splitlines()
        if not lines:
            return ""
        return lines[-1].removeprefix(f"{type(self).__module__}.{type(self).__qualname__}: ")


class CorruptImageError(DataError):
    """One image cannot be read or decoded; `ResilientDataset` replaces it and goes on."""
