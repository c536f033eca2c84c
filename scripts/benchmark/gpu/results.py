"""The JSON file of results, written atomically after every check."""

import contextlib
import json
import os
import threading
import time
from pathlib import Path

__all__ = ["OtherResultsError", "Results"]

# Between two writes, in seconds; the file has up to 2,000 checks.
_INTERVAL = 0.5
# Facts of the machine that must be the same to continue. The number of threads may differ.
_SAME = ("device", "torch", "triton", "sources", "dry_run")


class OtherResultsError(Exception):
    """Error for a file with results of other sources or of another machine."""


class Results:
    """Results of all sections, by section and check.

    Args:
        path: The JSON file. An existing file is continued.

    Raises:
        OtherResultsError: The file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.machine: dict = {}
        self.sections: dict[str, dict] = {}
        self._lock = threading.Lock()
        self._written = 0.0
        if path.exists():
            try:
                content = json.loads(path.read_text())
                self.machine, self.sections = content["machine"], content["sections"]
            except (ValueError, KeyError, TypeError) as error:
                raise OtherResultsError(
                    f"{path} must be a file of this command, got {error!r}: "
                    "name another file or delete it"
                ) from error

    def begin(self, machine: dict) -> None:
        """Set the machine and the sources; they must be those of the results in the file.

        Raises:
            OtherResultsError: They are others.
        """
        other = [
            name for name in _SAME if self.sections and self.machine.get(name) != machine[name]
        ]
        if other:
            name = other[0]
            raise OtherResultsError(
                f"{self.path} has results with {name} {self.machine.get(name)!r}, now it is "
                f"{machine[name]!r}: use --restart or another file"
            )
        self.machine = machine

    def forget(self, sections: list[str]) -> None:
        """Remove the results of some sections."""
        for name in sections:
            self.sections.pop(name, None)

    def plan(self, section: str, checks: list[str]) -> list[str]:
        """Record the checks of a section, and return those without a result, in their order."""
        with self._lock:
            kept = self.sections.setdefault(section, {"results": {}})
            kept["checks"] = checks
            kept["results"] = {n: r for n, r in kept["results"].items() if n in set(checks)}
            kept.pop("note", None)
            return [name for name in checks if name not in kept["results"]]

    def record(self, section: str, check: str, entry: dict) -> None:
        """Record the result of a check and write the file."""
        with self._lock:
            self.sections[section]["results"][check] = entry
            if time.monotonic() - self._written > _INTERVAL:
                self._write()

    def note(self, section: str, note: str) -> None:
        """Record why checks of a section have no result."""
        with self._lock:
            self.sections.setdefault(section, {"results": {}, "checks": []})["note"] = note

    def write(self) -> None:
        """Write the file."""
        with self._lock:
            self._write()

    def _write(self) -> None:
        """Replace the file, so that it is complete at every moment."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        content = {"machine": self.machine, "sections": self.sections}
        try:
            partial.write_text(json.dumps(content, indent=1) + "\n")
            partial.replace(self.path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                partial.unlink()
        self._written = time.monotonic()

    def failures(self) -> list[tuple[str, str, str]]:
        """Return section, check and message of every check that failed."""
        return [
            (section, check, entry.get("message", ""))
            for section, kept in self.sections.items()
            for check, entry in kept["results"].items()
            if entry["status"] == "failed"
        ]
