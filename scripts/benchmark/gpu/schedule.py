"""The order of all checks: stages, processes, time limits, and one line per result."""

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO

from scripts.benchmark.gpu.client import Client, NoReplyError
from scripts.benchmark.gpu.results import Results
from scripts.benchmark.gpu.sections import SECTIONS, Section

__all__ = ["Run"]

# A process that cannot even start ends at every check. Its section is stopped after so many.
_MAX_DEATHS = 4
# Checks of a long section are reported once in so many seconds, failures always.
_QUIET_SECONDS = 5.0


@dataclass
class Run:
    """One run of the command.

    Attributes:
        results: The results to add to.
        worker: Command of a process that runs checks.
        environment: Variables of these processes.
        log: File for everything that they print.
        seconds: Seconds that the run may take.
        only: Text in the names of the checks to run; empty for all.
        lanes: Largest number of processes at a time.
        on_gpu: Whether stages run their sections at the same time, in new processes.
    """

    results: Results
    worker: Sequence[str]
    environment: dict[str, str]
    log: IO[bytes]
    seconds: float
    only: str
    lanes: int
    on_gpu: bool = True
    started: float = field(default_factory=time.monotonic)
    _open: set[Client] = field(default_factory=set)
    _spare: list[Client] = field(default_factory=list)
    _stopped: bool = False

    @property
    def end(self) -> float:
        """Time at which the run must be over."""
        return self.started + self.seconds

    def say(self, message: str) -> None:
        """Print a message after the elapsed time."""
        print(f"[{time.monotonic() - self.started:6.1f} s] {message}", flush=True)

    def close(self) -> None:
        """End all processes; running checks get no result."""
        self._stopped = True
        for client in list(self._open):
            client.close()

    def client(self) -> Client:
        """Return a process that is free, or a new one."""
        if self._spare:
            return self._spare.pop()
        client = Client(self.worker, self.environment, self.log)
        self._open.add(client)
        return client

    def release(self, client: Client) -> None:
        """Keep a process for the next section; on a GPU end it, because it holds GPU memory."""
        if self.on_gpu:
            self.end_client(client)
        else:
            self._spare.append(client)

    def end_client(self, client: Client) -> None:
        """End a process."""
        client.close()
        self._open.discard(client)

    def run(self, names: Sequence[str]) -> None:
        """Run sections by stage; each gets its share of the time that is left."""
        for stage in sorted({SECTIONS[name].stage for name in names}):
            here = [name for name in names if SECTIONS[name].stage == stage]
            later = sum(
                max(SECTIONS[n].seconds for n in names if SECTIONS[n].stage == s)
                for s in {SECTIONS[name].stage for name in names}
                if s > stage
            )
            own = max(SECTIONS[name].seconds for name in here)
            now = time.monotonic()
            deadline = now + max(self.end - now, 0.0) * own / (own + later)
            threads = [
                threading.Thread(target=self._section, args=(name, deadline), daemon=True)
                for name in here
            ]
            for thread in threads:
                thread.start()
                if not self.on_gpu:
                    thread.join()
            for thread in threads:
                thread.join()
            self.results.write()

    def _section(self, name: str, deadline: float) -> None:
        """Run the checks of a section that have no result."""
        section, began = SECTIONS[name], time.monotonic()
        client = self.client()
        try:
            listed = client.ask(section.limit, do="list", section=name)
        except NoReplyError as error:
            listed = {"error": str(error)}
        if "error" in listed:
            self.end_client(client)
            self.results.plan(name, ["list of the checks"])
            entry = {"status": "failed", "seconds": 0.0, "message": listed["error"]}
            self.results.record(name, "list of the checks", entry)
            self.say(f"{name}: failed: {listed['error']}")
            return
        pending = [c for c in self.results.plan(name, listed["checks"]) if self.only in c]
        self.say(f"{name}: {len(pending)} checks, {deadline - began:.0f} s")
        queue = _Queue(pending, deadline)
        lanes = max(1, min(section.lanes, self.lanes, len(pending))) if self.on_gpu else 1
        threads = [
            threading.Thread(target=self._lane, args=(name, section, queue, first), daemon=True)
            for first in [client, *[None] * (lanes - 1)]
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if queue.note:
            self.results.note(name, queue.note)
        self.results.write()
        seconds = time.monotonic() - began
        self.say(f"{name}: over after {seconds:.0f} s{', ' if queue.note else ''}{queue.note}")

    def _lane(self, name: str, section: Section, queue: "_Queue", client: Client | None) -> None:
        """Run checks of the queue in one process, and in a new one after a crash."""
        for check in queue:
            client = client or self.client()
            timeout = min(section.limit, self.end - time.monotonic())
            try:
                entry = client.ask(timeout, do="check", section=name, check=check)
                queue.deaths = 0
            except NoReplyError as error:
                self._open.discard(client)
                client = None
                if self._stopped or (error.late and timeout < section.limit):
                    queue.stop(f"the time of the run, {self.seconds:.0f} s, was over")
                    return
                entry = {"status": "failed", "seconds": 0.0, "message": str(error)}
                queue.count_death()
            if client is not None and not entry.pop("is_usable", True):
                self.end_client(client)
                client = None
            self.results.record(name, check, entry)
            self._report(name, check, entry, queue)
        if client is not None:
            self.release(client)

    def _report(self, name: str, check: str, entry: dict, queue: "_Queue") -> None:
        """Print one line for a result; in a long section, for some of those that passed."""
        now = time.monotonic()
        is_quiet = len(queue.checks) > 60 and now - queue.reported < _QUIET_SECONDS
        if entry["status"] == "passed" and is_quiet:
            return
        queue.reported = now
        message = (entry.get("message") or "\n").splitlines()[0]
        place = f"{queue.started}/{len(queue.checks)}"
        self.say(f"{name} {place}: {check}: {entry['status']} {message}"[:240].rstrip())


class _Queue:
    """Checks that several lanes share, until the deadline."""

    def __init__(self, checks: list[str], deadline: float) -> None:
        self.checks, self.deadline = checks, deadline
        self.started = self.deaths = 0
        self.note, self.reported = "", 0.0
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[str]:
        while (check := self._next()) is not None:
            yield check

    def _next(self) -> str | None:
        """Return the next check; None if there is none, or no time for it."""
        with self._lock:
            if self.note or self.started == len(self.checks):
                return None
            # One check runs in any case, so that every run makes progress.
            if self.started and time.monotonic() > self.deadline:
                self.note = "stopped because its time was used up"
                return None
            self.started += 1
            return self.checks[self.started - 1]

    def stop(self, note: str) -> None:
        """Start no more checks."""
        self.note = self.note or note

    def count_death(self) -> None:
        """Stop after several crashes without a result between them."""
        self.deaths += 1
        if self.deaths >= _MAX_DEATHS:
            self.stop(f"stopped after {self.deaths} crashes in a row")
