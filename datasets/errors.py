"""Exceptions of this package. Each message is one sentence that can be shown to the user."""

__all__ = ["CHECK_COMMAND", "DataError", "CorruptImageError"]

# The end of errors about the content of a data set, which usually has more than one problem.
CHECK_COMMAND = "`python -m datasets.check` lists every problem of a data set"


class DataError(Exception):
    """An error in the user's data, such as a missing folder or a truncated archive.

    `str(error)` is one sentence, also when a `DataLoader` worker raised the error. In that case
    torch uses the traceback of the worker as the message; the traceback stays in `args`.

    Attributes:
        exit_code: Exit code of a command that ends with this error, without a traceback.
    """

    exit_code = 1

    def __str__(self) -> str:
        lines = super().__str__().strip().splitlines()
        if not lines:
            return ""
        return lines[-1].removeprefix(f"{type(self).__module__}.{type(self).__qualname__}: ")


class CorruptImageError(DataError):
    """An error in one image that cannot be read or decoded; `ResilientDataset` replaces it."""
