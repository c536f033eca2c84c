"""Options that a checkpoint records in its `args`, used where the user gives no others."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from engine.config import AnyConfig
from engine.errors import UsageError, UserError
from engine.flags import flag_of

__all__ = ["with_saved_options"]

logger = logging.getLogger(__name__)


def with_saved_options(
    config: AnyConfig,
    checkpoint: Mapping[str, Any],
    names: Iterable[str],
    *,
    source: str,
    needed: str | None = None,
) -> AnyConfig:
    """Complete a configuration with the `args` of a checkpoint.

    Flags and the values of a `--config` file override the checkpoint, which overrides the defaults.

    Args:
        config: The configuration.
        checkpoint: A checkpoint with or without `args`.
        names: Options to take, which describe the model and its images.
        source: Path or URL of the checkpoint, for error messages.
        needed: Option that the user or the checkpoint must give.

    Returns:
        A new configuration.

    Raises:
        UsageError: `needed` is not given, or the options contradict each other.
        UserError: A value in `args` is not allowed.
    """
    args = checkpoint.get("args") or {}
    given = {name: getattr(config, name) for name in config.model_fields_set}
    # In the order of the fields, so that the log is the same in every process.
    wanted = [name for name in type(config).model_fields if name in set(names)]
    saved = {name: args[name] for name in wanted if name in args and name not in given}
    if needed and needed not in saved | given:
        raise UsageError(f"{source} does not name its {needed}: give {flag_of(needed)}")
    try:
        completed = type(config).model_validate(given | saved)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"]))
        reason = problem["msg"].removeprefix("Value error, ")
        if place:
            raise UserError(f"args of {source}: {place}: {reason}") from error
        raise UsageError(f"{reason} (with the options in {source})") from error
    changed = [name for name in saved if getattr(completed, name) != getattr(config, name)]
    if changed:
        shown = ", ".join(f"{name} {getattr(completed, name)}" for name in changed)
        logger.info("options of %s: %s", source, shown)
    return completed
