"""Start modules in processes of their own, as a launcher does."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def start(module: str, *flags: str, **env: str) -> subprocess.Popen:
    """Start `python -m module` in a new process group, as torchrun does."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *flags],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def start_pair(module: str, *flags: str) -> list[subprocess.Popen]:
    """Start two processes of one distributed run, with the environment of torchrun."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [start(module, *flags, RANK=str(r), LOCAL_RANK=str(r), **env) for r in range(2)]
