"""A process that runs checks: one request and one reply per line, in JSON.

`list` returns the names of a section's checks, `check` runs one of them. An error of a check is its
result. If the GPU cannot be used after it, the reply says so, and the parent starts a new process.
"""

import functools
import gc
import importlib
import json
import os
import sys
import time
import traceback
import warnings

import torch

from scripts.benchmark.gpu.setup import Check, Setup, SkipError, machine

__all__ = ["main"]

_MODULES = {
    "correctness": "scripts.benchmark.gpu.correctness",
    "extension": "scripts.benchmark.gpu.extension",
    "attention": "scripts.benchmark.gpu.attention",
    "train": "scripts.benchmark.gpu.training",
    "end_to_end": "scripts.benchmark.gpu.end_to_end",
}
_MESSAGE_CHARACTERS = 2000
_LARGE_SECONDS = 3.0


def main() -> None:
    """Answer requests until the input ends."""
    # Whatever a library prints goes to the log, so that only replies are on the original output.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.filterwarnings("ignore", category=UserWarning)
    setup = Setup.of_environment()
    if setup.dry_run:
        torch.set_num_threads(1)
    for line in sys.stdin:
        reply = _answer(json.loads(line), setup)
        replies.write(json.dumps(reply) + "\n")
        replies.flush()
        if not reply.get("is_usable", True):
            return


def _answer(request: dict, setup: Setup) -> dict:
    """Return the reply to a request."""
    if request["do"] == "check":
        return _result(request["section"], request["check"], setup)
    try:
        if request["do"] == "machine":
            return machine(setup)
        return {"checks": list(_checks(request["section"], setup))}
    except Exception as error:
        traceback.print_exc()
        return {"error": _message(error)}


@functools.cache
def _checks(section: str, setup: Setup) -> dict[str, Check]:
    """Return the checks of a section by name."""
    return importlib.import_module(_MODULES[section]).checks(setup)


def _result(section: str, check: str, setup: Setup) -> dict:
    """Run a check and return its status, seconds, message and result."""
    print(f"\n--- {section}: {check}", flush=True)
    start = time.perf_counter()
    entry = {"status": "passed", "message": ""}
    try:
        torch.manual_seed(0)
        result = _checks(section, setup)[check]()
        if setup.on_gpu:
            # An error of a kernel appears here at the latest.
            torch.cuda.synchronize()
        entry["result"] = result
        if result.get("errors"):
            entry["status"] = "failed"
            entry["message"] = "; ".join(f"{k}: {v}" for k, v in result["errors"].items())
    except SkipError as reason:
        entry |= {"status": "skipped", "message": str(reason)}
    except Exception as error:
        traceback.print_exc()
        entry |= {"status": "failed", "message": _message(error)}
    seconds = time.perf_counter() - start
    entry["seconds"] = round(seconds, 2)
    # The collection takes a while, so it is left out after short checks that passed.
    is_large = seconds > _LARGE_SECONDS or entry["status"] == "failed"
    entry["is_usable"] = not is_large or _is_usable(setup)
    return entry


def _message(error: Exception) -> str:
    """Return the type and the message of an error."""
    return f"{type(error).__name__}: {error}".strip()[:_MESSAGE_CHARACTERS]


def _is_usable(setup: Setup) -> bool:
    """Release memory, and return whether the device still computes."""
    gc.collect()
    if not setup.on_gpu:
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.ones(8, device=setup.device).sum().item() == 8
    except RuntimeError:
        traceback.print_exc()
        return False


if __name__ == "__main__":
    main()
