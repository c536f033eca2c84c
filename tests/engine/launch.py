"""Starts modules of the tests in processes of their own, as a launcher would."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def start(module: str, *flags: str, **env: str) -> subprocess.Popen:
    """Starts `python -m module`, in a process group of its own as torchrun does."""
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
    """Starts two processes of one group, with torchrun's environment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [start(module, *flags, RANK=str(r), LOCAL_RANK=str(r), **env) for r in range(2)]
