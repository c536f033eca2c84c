"""Fixture of a run in two processes, which several tests share."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.engine.launch import start_pair


class PairRun(NamedTuple):
    """Results, output and exit codes of two processes, by rank, and their output folder."""

    results: list[dict[str, Any]]
    stdout: list[str]
    stderr: list[str]
    codes: list[int]
    folder: Path


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> PairRun:
    """Run `tests.engine.pair` in two processes."""
    folder = tmp_path_factory.mktemp("pair")
    processes = start_pair("tests.engine.pair", str(folder))
    outputs = [process.communicate(timeout=120) for process in processes]
    for rank in range(2):
        assert (folder / f"rank{rank}.json").exists(), outputs[rank][1]
    results = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]
    stdout, stderr = zip(*outputs, strict=True)
    return PairRun(results, stdout, stderr, [process.returncode for process in processes], folder)
