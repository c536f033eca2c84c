"""Errors that are the user's to mend: one sentence and an exit code instead of a traceback.

Anything else that goes wrong is ours to mend and keeps its traceback (see `engine.cli`).
"""


class UserError(Exception):
    """A failure that one sentence explains, such as an output directory that cannot be written.

    Attributes:
        exit_code: the code with which the process leaves.
    """

    exit_code = 1


class UsageError(UserError):
    """A flag, a configuration file or a launch that cannot be meant."""

    exit_code = 2
