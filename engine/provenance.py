"""Where a result comes from: revision and versions, saved with every run."""

import platform
import subprocess
from pathlib import Path

import torch


def provenance() -> dict[str, str | None]:
    """The git revision (`-dirty` with uncommitted changes) and the versions that computed.

    Names neither host nor user. `git` is None outside a repository or without git.
    """
    return {
        "git": _git_revision(Path(__file__).parent),
        "python": platform.python_version(),
        # A plain string: torch has a class of its own, which no safe loader reads.
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
    }


def _git_revision(folder: Path) -> str | None:
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"]
    command += ["--exclude=*"]  # the revision itself, not its distance from a tag
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
