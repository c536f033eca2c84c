"""Errors that the user can fix: one sentence and an exit code instead of a traceback.

All other errors keep their traceback (see `engine.cli`).
"""

__all__ = ["UsageError", "UserError"]


class UserError(Exception):
    """An error that one sentence explains, such as an output folder that cannot be written.

    Attributes:
        exit_code: Exit code of the process.
    """

    exit_code = 1


class UsageError(UserError):
    """A mistake in a flag, in a configuration file or in how the processes were started."""

    exit_code = 2
