"""The attention kernels compile for the GPUs of the recipes, without spilling registers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


def compile_all(*arguments: str) -> list[str]:
    """Return the rows of the output; fail if a kernel does not compile or spills."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.rpe_ops.aot", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return [line for line in run.stdout.splitlines() if "sm_" in line]


def test_the_largest_kernels_compile_without_spills():
    # Flat tiles: forward and its sums; keys, queries and the sums for two tables. Tiles of rows:
    # forward, sums and both sides of the backward. All for two architectures.
    assert len(compile_all("--quick")) == 2 * (6 + 4)


@pytest.mark.slow
def test_every_recipe_compiles_without_spills():
    rows = compile_all()
    for name in ("DeiT-S/B k", "DeiT-S/B qkv", "50x84 qkv float16", "float32", "head dim 128"):
        assert any(name in row for row in rows)
