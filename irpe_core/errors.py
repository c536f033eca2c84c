"""Errors that one sentence explains."""

__all__ = ["CheckpointError"]


class CheckpointError(ValueError):
    """A checkpoint cannot be fetched or read, or does not fit the model; the message says why."""
