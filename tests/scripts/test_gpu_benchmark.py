"""The GPU benchmark without a GPU: a dry run, its report, continuation, and found errors.

Checks really run in the dry runs. For crashes and time limits, a process that only follows the
protocol replaces the one that runs checks.
"""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from scripts.benchmark.gpu import main
from scripts.benchmark.gpu.sections import SECTIONS

ROOT = Path(__file__).parents[2]
RUN_WORKER = "from scripts.benchmark.gpu.worker import main; main()"
MACHINE = {"device": "d", "torch": "2", "triton": "3", "sources": "s", "dry_run": True, "cores": 1}
# Answers by name: `crash...` ends the process, `hang...` waits, `fail...` and `skip...` say so.
PRETENDER = f"""
import json, os, sys, time
for line in sys.stdin:
    request = json.loads(line)
    name = request.get("check", "")
    if name.startswith("crash"):
        os.abort()
    if name.startswith("hang"):
        time.sleep(600)
    status = {{"fail": "failed", "skip": "skipped"}}.get(name[:4], "passed")
    entry = {{"status": status, "seconds": 0.0, "message": name, "result": {{"pid": os.getpid()}}}}
    replies = {{"machine": {MACHINE}, "list": {{"checks": os.environ["CHECKS"].split()}}}}
    print(json.dumps(replies.get(request["do"], entry)), flush=True)
"""


def pretend(output: Path, checks: str, *options: str, section: str = "correctness") -> int:
    """Run a section with checks that only pretend to run."""
    worker = ["env", f"CHECKS={checks}", sys.executable, "-c", PRETENDER]
    argv = ["--output", str(output), "--dry_run", "--sections", section, *options]
    return main(argv, worker)


def results_of(output: Path, section: str = "correctness") -> dict[str, dict]:
    return json.loads(output.read_text())["sections"][section]["results"]


def statuses(output: Path, section: str = "correctness") -> dict[str, str]:
    return {name: entry["status"] for name, entry in results_of(output, section).items()}


def grids(report: str) -> list[list[str]]:
    """Return the tables of a report as lists of lines."""
    blocks = [block.splitlines() for block in report.split("\n\n")]
    return [block for block in blocks if block[0].startswith("| ")]


def test_a_dry_run_writes_results_and_a_report(tmp_path, capsys):
    output = tmp_path / "new" / "cpu.json"
    names = ["correctness", "extension", "attention", "train"]
    status = main(["--output", str(output), "--dry_run", "--sections", ",".join(names)])
    content = json.loads(output.read_text())
    printed = capsys.readouterr()
    assert (status, printed.err) == (0, "")
    assert content["machine"].keys() >= {"device", "torch", "triton", "sources", "git"}
    assert list(content["sections"]) == names
    for name, kept in content["sections"].items():
        assert list(kept["results"]) == kept["checks"], name
    for reason in [e["message"] for e in results_of(output, "extension").values()]:
        assert "CUDA" in reason or "cuda" in reason or "compiles nothing" in reason
    rows = results_of(output, "attention")["tiny, B 1, qkv, bfloat16"]["result"]["rows"]
    assert rows.keys() >= {"flash, no encoding", "fused, triton", "composed, triton"}
    assert all(row["both_ms"] > 0 and row["peak_mb"] > 0 for row in rows.values())
    for check in content["sections"]["train"]["results"].values():
        assert all(row["images_per_second"] > 0 for row in check["result"]["rows"].values())
        assert check["result"]["rows"].keys() == {"without iRPE", "k", "qkv"}
    report = output.with_suffix(".md").read_text()
    assert "**Failures:** none" in report
    assert "attention, triton: another stream, bfloat16" in report
    for grid in grids(report):
        assert len({line.replace("\\|", "").count("|") for line in grid}) == 1, grid[0]
    assert max(map(len, report.splitlines())) < 1000


def test_a_wrong_kernel_is_a_failure_and_the_exit_status(tmp_path, capsys):
    wrong = """
from rpe_ops import reference
right = reference.attention_backward
def wrong(*arguments):
    grads = list(right(*arguments))
    grads[1] = 1.01 * grads[1]
    return tuple(grads)
reference.attention_backward = wrong
"""
    output = tmp_path / "cpu.json"
    argv = ["--output", str(output), "--dry_run", "--sections", "correctness"]
    worker = [sys.executable, "-c", wrong + RUN_WORKER]
    status = main([*argv, "--only", "attention, reference: product"], worker)
    assert status == 1
    (check,) = [name for name, status in statuses(output).items() if status == "failed"]
    assert "grad_k" in results_of(output)[check]["message"]
    assert f"FAILED: correctness: {check}: AssertionError: grad_k" in capsys.readouterr().err
    report = output.with_suffix(".md").read_text()
    assert report.index("**Failures: 1**") < report.index(check) < report.index("## ")


def test_main_sections_run_without_pydantic_and_say_what_needs_it(tmp_path):
    output = tmp_path / "cpu.json"
    argv = ["--output", str(output), "--dry_run", "--sections", "train", "--only", "bfloat16"]
    hidden = "import sys; sys.modules['pydantic'] = sys.modules['pycocotools'] = None\n"
    assert main(argv, [sys.executable, "-c", hidden + RUN_WORKER]) == 0
    found = results_of(output, "train")
    assert found["DeiT-S, B 2, bfloat16"]["status"] == "passed"
    detr = found["DETR-R50, B 1, bfloat16"]
    assert (detr["status"], "pydantic" in detr["message"]) == ("skipped", True)


@pytest.mark.slow
def test_the_trainings_of_a_dry_run_end(tmp_path):
    output = tmp_path / "cpu.json"
    assert main(["--output", str(output), "--dry_run", "--sections", "end_to_end"]) == 0
    assert statuses(output, "end_to_end") == {
        "scenes": "passed",
        "digits": "passed",
        "one process of NCCL": "passed",
        "GradScaler in float16": "skipped",
    }


def test_the_same_command_runs_only_what_is_missing(tmp_path):
    output = tmp_path / "cpu.json"
    assert pretend(output, "a b", "--only", "a") == 0
    first = results_of(output)
    assert list(first) == ["a"]
    assert "| correctness | 1 | 0 | 0 | 1 |" in output.with_suffix(".md").read_text()
    assert pretend(output, "a b") == 0
    second = results_of(output)
    assert (second["a"], list(second)) == (first["a"], ["a", "b"])
    assert pretend(output, "a b", "--restart") == 0
    assert results_of(output)["a"] != first["a"]


def test_a_crash_or_an_endless_check_ends_only_that_check(tmp_path, monkeypatch, capsys):
    for name, section in SECTIONS.items():
        monkeypatch.setitem(SECTIONS, name, replace(section, limit=2))
    output = tmp_path / "cpu.json"
    assert pretend(output, "first crash hang skip last") == 1
    assert statuses(output) == {
        "first": "passed",
        "crash": "failed",
        "hang": "failed",
        "skip": "skipped",
        "last": "passed",
    }
    found = results_of(output)
    assert found["crash"]["message"] == "the process ended with SIGABRT"
    assert found["hang"]["message"] == "no result after 2 s"
    assert "correctness 2/5: crash: failed" in capsys.readouterr().out


def test_on_a_gpu_only_sections_that_are_not_timed_share_processes(tmp_path):
    output = tmp_path / "gpu.json"
    checks = " ".join(f"c{i}" for i in range(200))
    worker = ["env", f"CHECKS={checks}", sys.executable, "-c", PRETENDER]
    assert main(["--output", str(output), "--lanes", "3"], worker) == 0
    processes = {}
    for name in SECTIONS:
        assert set(statuses(output, name).values()) == {"passed"}, name
        found = results_of(output, name).values()
        assert len(found) == 200
        processes[name] = {entry["result"]["pid"] for entry in found}
    assert {name: len(pids) for name, pids in processes.items()} == {
        "correctness": 3,
        "extension": 1,
        "end_to_end": 3,
        "attention": 1,
        "train": 1,
    }
    assert len(set.union(*processes.values())) == 9


def test_a_process_that_always_crashes_ends_the_section(tmp_path):
    output = tmp_path / "cpu.json"
    assert pretend(output, " ".join(f"crash{i}" for i in range(9))) == 1
    assert len(results_of(output)) == 4
    assert "stopped after 4 crashes in a row" in output.with_suffix(".md").read_text()


def test_a_failed_measurement_is_reported_but_not_the_exit_status(tmp_path, capsys):
    output = tmp_path / "cpu.json"
    assert pretend(output, "fail", section="attention") == 0
    assert "FAILED: attention: fail: fail" in capsys.readouterr().err
    assert "**Failures: 1**" in output.with_suffix(".md").read_text()


def test_the_time_ends_a_section_and_the_rest_follows_in_the_next_run(tmp_path):
    output = tmp_path / "cpu.json"
    # The running check is ended without a result; it is not a failure.
    assert pretend(output, "a hang b", "--minutes", "0.03") == 0
    assert statuses(output) == {"a": "passed"}
    assert "the time of the run, 2 s, was over" in output.with_suffix(".md").read_text()
    assert pretend(output, "a b") == 0
    assert statuses(output) == {"a": "passed", "b": "passed"}


def test_a_stopped_run_leaves_its_results(tmp_path):
    output = tmp_path / "cpu.json"
    code = "import pathlib, sys; from tests.scripts import test_gpu_benchmark as tests\n"
    code += "sys.exit(tests.pretend(pathlib.Path(sys.argv[1]), 'a hang b'))"
    run = subprocess.Popen(
        [sys.executable, "-c", code, str(output)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    for line in run.stdout:
        if "1/3: a: passed" in line:
            break
    time.sleep(0.5)
    run.send_signal(signal.SIGTERM)
    assert run.wait(20) == 128 + signal.SIGTERM
    assert statuses(output) == {"a": "passed"}
    assert output.with_suffix(".md").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_results_of_other_sources_are_not_continued(tmp_path, capsys):
    output = tmp_path / "cpu.json"
    pretend(output, "a")
    content = json.loads(output.read_text())
    content["machine"]["sources"] = "other"
    output.write_text(json.dumps(content))
    assert pretend(output, "a b") == 2
    assert "has results with sources 'other', now it is 's'" in capsys.readouterr().err
    assert json.loads(output.read_text()) == content
    assert pretend(output, "a b", "--restart") == 0
    output.write_text("[]")
    assert pretend(output, "a") == 2
    assert "must be a file of this command" in capsys.readouterr().err
    assert output.read_text() == "[]"


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so(tmp_path, capsys):
    assert main(["--output", str(tmp_path / "gpu.json")]) == 2
    assert "no GPU is visible to torch (--dry_run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--output", "a.txt"], "--output must end in .json, got 'a.txt'"),
        (["--output", "a.json", "--sections", "train,speed"], "must be names from correctness, "),
        (["--output", "a.json", "--minutes", "0"], "must be a number above 0, got '0'"),
    ],
)
def test_a_wrong_option_is_refused(argv, message, capsys):
    with pytest.raises(SystemExit) as leaving:
        main(argv)
    assert leaving.value.code == 2
    assert message in capsys.readouterr().err
