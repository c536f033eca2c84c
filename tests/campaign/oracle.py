"""Run a command in a forked process, and judge how it ended.

A child is forked from this process, which has imported torch and the trainers already. So a case
costs the time of its work, and not the seconds of the imports.
"""

import contextlib
import faulthandler
import hashlib
import json
import logging
import os
import re
import resource
import select
import signal
import stat
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from engine import run

__all__ = ["VERDICTS", "End", "Verdict", "judge", "not_finite", "run_forked", "snapshot", "trial"]

TIMEOUT = 60.0  # seconds
MEMORY = 2 << 30  # bytes
# A case that is wrong must not take the memory of the machine.
_ADDRESS_SPACE = 16 << 30

GOOD = ("clean error", "correct run")
BAD = ("traceback", "hang", "crash", "memory", "code run", "lost file", "wrong")
VERDICTS = (*GOOD, *BAD)
_TRACEBACK = "Traceback (most recent call last)"
_ERROR = re.compile(r"^error(?: \[rank \d+\])?: (.*)$", re.MULTILINE)
_OWN_FRAME = re.compile(
    r'File ".*?((?:engine|datasets|classification|detection|irpe_core|rpe_ops)/\S+)", line (\d+)'
)
# A line of faulthandler, which prints the innermost frame first.
_PLACE = re.compile(r'^  File "(.*?", line \d+ in \S+)$', re.MULTILINE)
# Files that a command may write again next to the data.
_CACHES = re.compile(r"\.npz$")


@dataclass(frozen=True)
class End:
    """The end of a process.

    Attributes:
        code: Exit code; the negative signal if one ended the process.
        timed_out: Whether the process had to be killed.
        peak: Largest resident memory in bytes.
        output: What it wrote to stderr.
    """

    code: int
    timed_out: bool
    peak: int
    output: str


@dataclass(frozen=True)
class Verdict:
    """The verdict on a case.

    Attributes:
        kind: One of `VERDICTS`.
        note: What was seen.
    """

    kind: str
    note: str = ""


def trial(
    folder: Path,
    command: Callable[[list[str]], Any],
    argv: Sequence[str] = (),
    *,
    culprits: Sequence[str],
    kept: Iterable[Path] = (),
    expected: tuple[type[Exception], ...] = (),
    timeout: float = TIMEOUT,
) -> Verdict:
    """Run a command in a forked process and judge it.

    Args:
        folder: Folder of the case. A payload that runs writes the file `ran` there.
        command: Function of a command that gets the flags.
        argv: Flags.
        culprits: Words of which an error must have at least one.
        kept: Files and folders that the command must not change.
        expected: Exceptions that are an answer of the command, in addition to those of
            `engine.run`.
        timeout: Seconds after which the process is killed.
    """
    before = snapshot(kept)
    end = run_forked(command, argv, folder, expected=expected, timeout=timeout)
    return judge(end, folder, before, culprits)


def run_forked(
    command: Callable[[list[str]], Any],
    argv: Sequence[str],
    folder: Path,
    *,
    expected: tuple[type[Exception], ...] = (),
    timeout: float = TIMEOUT,
    kill_after: float | None = None,
) -> End:
    """Run a command in a forked process, in a folder, to its end.

    Args:
        command: Function of the flags.
        argv: Flags.
        folder: Working directory; stdout and stderr are written to it.
        expected: As in `trial`.
        timeout: Seconds after which the process is killed.
        kill_after: Seconds after which SIGKILL ends the process as a part of the case.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process == 0:
        _child(command, list(argv), folder, expected, timeout)
    descriptor = os.pidfd_open(process)
    limit = timeout if kill_after is None else kill_after
    ended = bool(select.select([descriptor], [], [], limit)[0])
    os.close(descriptor)
    if not ended:
        os.kill(process, signal.SIGKILL)
    _, status, usage = os.wait4(process, 0)
    with contextlib.suppress(ProcessLookupError):  # Workers that are left.
        os.killpg(process, signal.SIGKILL)
    output = (folder / "stderr").read_text(errors="replace")
    return End(
        code=os.waitstatus_to_exitcode(status),
        timed_out=not ended and kill_after is None,
        peak=usage.ru_maxrss * 1024,
        output=output,
    )


def judge(end: End, folder: Path, before: dict[Path, str], culprits: Sequence[str] = ()) -> Verdict:
    """Judge the end of a process; the worst finding counts.

    Args:
        end: The end.
        folder: Folder of the case.
        before: Snapshot of the files that must not change.
        culprits: Words of which an error must have at least one.
    """
    lines = end.output.strip().splitlines()
    last = lines[-1][:300] if lines else ""
    lost = [path for path, digest in before.items() if snapshot([path]).get(path) != digest]
    sentences = _ERROR.findall(end.output)
    if (folder / "ran").exists():
        return Verdict("code run", "a payload created a file")
    if end.timed_out:
        places = _PLACE.findall(end.output)
        return Verdict("hang", f"{last} at {places[0]}" if places else last)
    if end.code < 0:
        return Verdict("crash", f"{signal.Signals(-end.code).name}: {last}")
    if lost:
        return Verdict("lost file", f"{lost[0]}: {last}")
    if end.peak > MEMORY:
        return Verdict("memory", f"{end.peak / 2**30:.1f} GB: {last}")
    if _TRACEBACK in end.output:
        places = _OWN_FRAME.findall(end.output)
        return Verdict("traceback", f"{last} at {':'.join(places[-1])}" if places else last)
    if end.code == 0:
        wrong = not_finite(folder)
        return Verdict("wrong", wrong) if wrong else Verdict("correct run")
    if end.code not in (1, 2):
        return Verdict("wrong", f"exit code {end.code}: {last}")
    if len(sentences) != 1:
        return Verdict("wrong", f"{len(sentences)} error lines: {last}")
    if not any(word.lower() in sentences[0].lower() for word in culprits):
        return Verdict("wrong", f"names no culprit: {sentences[0][:300]}")
    return Verdict("clean error", sentences[0][:300])


def snapshot(paths: Iterable[Path]) -> dict[Path, str]:
    """Return a digest of each regular file at or below some paths."""
    files = [
        file
        for path in paths
        for file in (sorted(path.rglob("*")) if path.is_dir() else [path])
        if not _CACHES.search(file.name)
    ]
    return {
        file: hashlib.sha1(file.read_bytes()).hexdigest()
        for file in files
        if file.exists() and stat.S_ISREG(file.lstat().st_mode)
    }


def not_finite(folder: Path) -> str:
    """Describe a number in the JSON files of a run that is not finite; empty if there is none."""
    found: list[str] = []
    for path in (*folder.rglob("eval.json"), *folder.rglob("log.txt")):
        text = path.read_text()
        for document in text.splitlines() if path.name == "log.txt" else [text]:
            json.loads(document, parse_constant=found.append)
        if found:
            return f"{path.name} has the number {found[0]}"
    return ""


def _child(
    command: Callable[[list[str]], Any],
    argv: list[str],
    folder: Path,
    expected: tuple[type[Exception], ...],
    timeout: float,
) -> NoReturn:
    """Run the command in the forked process, and exit as its own process would."""
    code: object = 1
    try:
        faulthandler.disable()  # pytest's would write to its own stderr.
        os.setsid()
        os.chdir(folder)
        for number, name in enumerate(("/dev/null", "stdout", "stderr")):
            flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            os.dup2(os.open(name, flags, 0o644), number)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        # The place of a hang: the innermost frame is in the last lines of stderr.
        faulthandler.dump_traceback_later(0.9 * timeout, file=sys.stderr)
        os.environ |= {
            "HOME": str(folder),
            "XDG_CACHE_HOME": "",
            "TORCH_HOME": str(folder / "torch"),
        }
        resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        run(lambda: _with_exit_code(command, argv), *expected)
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc(file=sys.stderr)
    finally:
        if isinstance(code, str):
            print(code, file=sys.stderr)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        logging.shutdown()
        os._exit(code if isinstance(code, int) else 1 if code else 0)


def _with_exit_code(command: Callable[[list[str]], Any], argv: list[str]) -> None:
    """Call a command that may return its exit code instead of raising SystemExit."""
    code = command(argv)
    if isinstance(code, int) and code:
        sys.exit(code)
