"""The benchmarks run by their present and former commands and write their results."""

import importlib
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from datasets import coco_cache
from scripts.benchmark import coco
from scripts.benchmark.__main__ import main
from scripts.benchmark.host_syncs import OperatorCounter

ROOT = Path(__file__).parents[2]
COMMANDS = {
    "train": ["--size", "tiny", "--batch-size", "1", "--rounds", "1", "--device", "cpu"],
    "data": ["--count", "2", "--rounds", "1"],
    "checkpoint": ["--model", "deit_tiny_patch16_224", "--rounds", "1"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_benchmark_prints_its_table_and_writes_its_results(name, tmp_path, capsys):
    output = tmp_path / "new" / "results.json"
    main([name, *COMMANDS[name], "--output", str(output)])
    report = json.loads(output.read_text())
    assert report["rounds"] == 1
    assert report["machine"].keys() >= {"device", "threads", "torch"}
    printed = capsys.readouterr().out
    assert report["results"]
    assert all(kind in printed for kind in report["results"])


def test_the_benchmark_of_coco_writes_starts_and_metrics(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(coco_cache, "_SMALLEST", 1)

    def starts(root):
        """Start in this process, because to import torch in others takes long."""
        return {"masks": {name: coco._start(root, True) for name in ("first", "second")}}

    monkeypatch.setattr(coco, "measure_starts", starts)
    output = tmp_path / "new" / "coco.json"
    options = ["--images", "20", "--objects", "60", "--eval-images", "5", "--detections", "20"]
    main(["coco", *options, "--scratch", str(tmp_path), "--output", str(output)])
    report = json.loads(output.read_text())
    assert report["objects"] == 60
    assert report["starts"]["masks"]["second"]["peak_mb"] > 0
    for kind in ("bbox", "segm"):
        assert report["evaluation"][kind]["seconds"]["pycocotools"] > 0
        assert report["evaluation"][kind]["largest_difference"] < 1e-9
        assert report["evaluation"][kind]["metrics"][0] > 0
    assert "second start, masks" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new"]


def test_a_profile_counts_operators_and_host_syncs_of_a_step(tmp_path, capsys):
    output = tmp_path / "work.json"
    options = ["--size", "tiny", "--batch-size", "2", "--device", "cpu"]
    main(["train", "--profile", *options, "--output", str(output)])
    report = json.loads(output.read_text())
    assert report["operators"] > 1000
    assert report["syncs"] == 1
    assert f"{report['operators']:,} operators, 1 host sync(s)" in capsys.readouterr().out


def test_a_profile_of_an_odd_batch_is_refused():
    with pytest.raises(SystemExit, match="--batch-size must be even for mixup, got 3"):
        main(["train", "--profile", "--batch-size", "3"])


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.cpu(),
        lambda x: x.tolist(),
        lambda x: x.new_tensor([1.0]),
        lambda x: torch.tensor([1.0], device=x.device),
    ],
)
def test_each_wait_for_the_device_is_counted_once(work):
    with OperatorCounter() as counter:
        work(torch.ones(3))
    assert counter.syncs.total() == 1


def test_work_that_does_not_wait_is_not_counted():
    x, index = torch.ones(3), torch.tensor([0, 2])
    with OperatorCounter() as counter:
        x.to("cpu", non_blocking=True)
        x.double()
        x[index] = x[index] + 1
    assert counter.syncs.total() == 0
    assert counter.operators >= 4


def test_the_stages_of_an_image_are_timed(tmp_path, capsys):
    output = tmp_path / "results.json"
    main(["data", "--part", "stages", "--count", "1", "--rounds", "1", "--output", str(output)])
    results = json.loads(output.read_text())["results"]
    assert results.keys() >= {"decode", "crop and resize", "Rotate", "ShearX", "TranslateY"}
    assert results["ShearX"].keys() == {"timm", "torchvision", "here"}
    assert len(results) == 17
    printed = capsys.readouterr().out
    assert all(stage in printed for stage in results)


@pytest.mark.parametrize("part", ["imagenet", "coco"])
def test_the_loaders_are_compared(part, tmp_path, capsys):
    output = tmp_path / "results.json"
    main(["data", "--part", part, "--count", "1", "--rounds", "1", "--output", str(output)])
    results = json.loads(output.read_text())["results"]
    assert results["floats"]["ratio_to_floats"] == 1
    assert results.keys() >= {"ours", "torchvision"}
    assert all(row["cpu_ms_per_image"] > 0 for row in results.values())
    printed = capsys.readouterr().out
    assert all(name in printed for name in results)


@pytest.mark.parametrize("name", ["train", "ops", "data"])
def test_former_commands_run_the_present_ones_with_a_warning(name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmark", "--help"])
    with pytest.raises(SystemExit) as leaving:
        runpy.run_module(f"scripts.benchmark_{name}", run_name="__main__")
    printed = capsys.readouterr()
    assert leaving.value.code == 0
    assert printed.out.startswith(f"usage: python -m scripts.benchmark {name} ")
    command = f"`python -m scripts.benchmark {name}`"
    assert printed.err == f"warning: scripts.benchmark_{name} is now {command}\n"


def test_former_modules_do_nothing_when_they_are_imported(capsys):
    importlib.import_module("scripts.benchmark_ops")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["data", "--rounds", "0"], "--rounds: must be a whole number >= 1, got '0'"),
        (["ops", "--rounds", "many"], "--rounds: must be a whole number >= 1, got 'many'"),
        (["train", "--batch-size", "-1"], "--batch-size: must be a whole number >= 1, got '-1'"),
        (["train", "--implementation", "foo"], "--implementation: invalid choice: 'foo'"),
    ],
)
def test_an_option_out_of_range_is_refused_without_a_traceback(argv, message, capsys):
    with pytest.raises(SystemExit) as leaving:
        main(argv)
    assert leaving.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["speed"]])
def test_an_unknown_benchmark_is_refused_with_the_known_ones(argv, capsys):
    with pytest.raises(SystemExit) as leaving:
        main(argv)
    assert leaving.value.code == 2
    assert "{train,ops,data,coco,checkpoint,memory,host,gpu,static}" in capsys.readouterr().err


def test_the_host_time_of_a_layer_is_measured_without_a_gpu(tmp_path):
    output = tmp_path / "host.json"
    command = [sys.executable, "-m", "scripts.benchmark", "host", "--calls", "3"]
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [*command, "--output", str(output)],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("µs") == 12
    times = json.loads(output.read_text())["microseconds"]
    assert all(0 < us < 1e6 for passes in times.values() for us in passes.values())
