"""The errors of irpe_core. Each message is one sentence that a user understands."""

__all__ = ["CheckpointError"]


class CheckpointError(ValueError):
    """A checkpoint that cannot be downloaded or read, or that does not fit the model.

    Attributes:
        exit_code: Exit code of a command that ends with this error, without a traceback.
    """

    exit_code = 1
