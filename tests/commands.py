"""How a command fails: its exit code and its one line on stderr."""

from collections.abc import Callable, Sequence

import pytest

from datasets import DataError
from engine import run
from irpe_core import CheckpointError

__all__ = ["failure_of"]


def failure_of(
    main: Callable[[list[str]], None], argv: Sequence[str], capsys: pytest.CaptureFixture
) -> tuple[int, str]:
    """Runs `main` as its command does; it has to fail with exactly one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as leaving:
        run(lambda: main(list(argv)), DataError, CheckpointError)
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return leaving.value.code, lines[0]
