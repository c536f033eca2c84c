"""Helper for tests of failing commands."""

from collections.abc import Callable, Sequence

import pytest

from engine import run

__all__ = ["failure_of"]


def failure_of(
    main: Callable[[list[str]], None], argv: Sequence[str], capsys: pytest.CaptureFixture
) -> tuple[int, str]:
    """Run `main` as its command does and check that it fails with one line on stderr.

    Returns:
        The exit code and the line.
    """
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        run(lambda: main(list(argv)))
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return exit_info.value.code, lines[0]
