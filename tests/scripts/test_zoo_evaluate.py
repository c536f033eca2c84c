"""Evaluation of a small zoo: checkpoints from a local web server, on the embedded data sets."""

import csv
import io
import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from classification.main import main as classify
from irpe_core.download import sha256_of
from scripts.zoo.__main__ import main
from scripts.zoo.rows import Zoo
from tests.commands import failure_of
from tests.engine.launch import start
from tests.scripts.small_zoo import make_zoo
from tests.web_server import serve


def without_tables(checkpoint: bytes) -> bytes:
    """Return the checkpoint without the tables of iRPE."""
    weights = torch.load(io.BytesIO(checkpoint))["model"]
    buffer = io.BytesIO()
    torch.save({"model": {k: v for k, v in weights.items() if ".rpe_" not in k}}, buffer)
    return buffer.getvalue()


def records(folder: Path) -> dict[str, dict]:
    return json.loads((folder / "zoo.json").read_text())["rows"]


def measured_alone(zoo: Zoo, data: list[str], checkpoint: bytes, folder: Path) -> dict:
    """Return the `eval.json` of the trainer for `digits`."""
    (folder / "alone.pth").write_bytes(checkpoint)
    run = ["--config", str(zoo.rows[0].config_file), "--eval", "--device", "cpu"]
    run += ["--resume", str(folder / "alone.pth"), "--data-path", data[1]]
    classify([*run, "--output_dir", str(folder / "alone")])
    return json.loads((folder / "alone" / "eval.json").read_text())


def test_the_zoo_is_downloaded_evaluated_and_compared_and_continues_after_a_failure(
    data, checkpoints, site, cache, tmp_path, capsys
):
    zoo = make_zoo(tmp_path, site.address)
    alone = measured_alone(zoo, data, checkpoints["digits"], tmp_path)
    published = {"top1": round(alone["test_acc1"], 1), "top5": round(alone["test_acc5"], 1)}
    assert 0 < published["top1"] < published["top5"] < 100
    make_zoo(
        tmp_path,
        site.address,
        digits={"checkpoint": site.url("digits.pth"), "published": published},
        gone={"checkpoint": site.url("gone.pth")},
        foreign={"checkpoint": site.url("scenes.pth")},
        plain={"checkpoint": site.url("plain.pth")},
    )
    site.files["/plain.pth"] = without_tables(checkpoints["digits"])
    out = tmp_path / "out"
    run = ["evaluate", "--zoo", str(tmp_path / "zoo.yaml"), "--output", str(out), *data]

    # The first download, of `digits`, is interrupted in the middle.
    site.break_after = [len(checkpoints["digits"]) // 2]
    code, line = failure_of(main, run, capsys)
    assert code == 1
    assert line.endswith(
        "5 of 5 rows failed or are outside the tolerance: "
        + ", ".join(["digits", "gone", "foreign", "plain", "scenes"])
    )
    first = records(out)
    assert "digits.pth" in first["digits"]["reason"]
    assert "404" in first["gone"]["reason"]
    assert "must be the checkpoint of a classifier" in first["foreign"]["reason"]
    assert "plain.pth' must have iRPE on q, k, v, got none: " in first["plain"]["reason"]
    assert first["scenes"]["verdict"] == "outside"
    assert first["scenes"]["images"] == 5
    assert first["scenes"]["images_per_s"] > 0
    assert first["scenes"]["settings"]["flags"][-3:] == ["--eval-padding", "--batch-size", "2"]
    assert {path.name for path in cache.glob("*.pth")} == {"plain.pth", "scenes.pth"}

    asked = len(site.requests)
    capsys.readouterr()
    code, line = failure_of(main, [*run, "--rows", "digits", "gone", "scenes"], capsys)
    assert code == 1
    assert "2 of 3 rows failed or are outside the tolerance: gone, scenes" in line
    assert [request.get("Range") for request in site.requests[asked:]] == [
        f"bytes={len(checkpoints['digits']) // 2}-",
        None,
    ]
    second = records(out)
    assert second["scenes"] == first["scenes"]
    assert second["foreign"] == first["foreign"]
    digits = second["digits"]
    assert digits["verdict"] == "within"
    assert digits["measured"] == {"top1": alone["test_acc1"], "top5": alone["test_acc5"]}
    assert digits["images"] == 359
    assert digits["sha256"] == sha256_of(tmp_path / "alone.pth")
    assert (cache / "digits.pth").read_bytes() == checkpoints["digits"]
    check_documents(out, published)

    # Other settings fail: the metrics are kept with the reason, until these settings run again.
    code, _ = failure_of(main, [*run, "--rows", "digits", "--imagenet", "nowhere"], capsys)
    assert code == 1
    failed = digits | {"failed_later": "--imagenet must be a folder, got nowhere"}
    assert records(out)["digits"] == failed
    main([*run, "--rows", "digits"])
    assert records(out)["digits"] == digits


def check_documents(out: Path, published: dict[str, float]) -> None:
    """Check that Markdown and CSV agree with the JSON."""
    with (out / "zoo.csv").open() as file:
        lines = {(line["row"], line["metric"]): line for line in csv.DictReader(file)}
    assert len(lines) == 2 + 1 + 1 + 1 + 6
    top1 = lines["digits", "top1"]
    assert float(top1["published"]) == published["top1"]
    assert abs(float(top1["difference"])) <= 0.05
    assert (top1["tolerance"], top1["within"], top1["images"]) == ("0.1", "True", "359")
    assert lines["scenes", "AP"]["within"] == "False"
    assert lines["scenes", "AP50"]["published"] == ""
    assert "404" in lines["gone", ""]["reason"]
    text = (out / "zoo.md").read_text()
    for words in ("within 0.1", "within 0.002", f" ({published['top1']:.1f}, ", "## Not run"):
        assert words in text
    assert f"torch {torch.__version__}" in text


def test_two_processes_give_the_metrics_of_one(data, checkpoints, site, cache, tmp_path):
    zoo = make_zoo(tmp_path, site.address)
    alone = measured_alone(zoo, data, checkpoints["digits"], tmp_path)
    run = ["evaluate", "--zoo", str(tmp_path / "zoo.yaml"), "--output", str(tmp_path), *data]
    main([*run, "--rows", "digits", "--nproc", "2", "--batch-size", "100"])
    record = records(tmp_path)["digits"]
    assert record["measured"] == {"top1": alone["test_acc1"], "top5": alone["test_acc5"]}
    assert record["verdict"] == "not compared"
    assert record["machine"]["processes"] == 2


def test_an_interrupted_evaluation_ends_its_processes_and_keeps_finished_rows(
    data, site, cache, tmp_path, capsys
):
    make_zoo(tmp_path, site.address, again={"checkpoint": site.url("digits.pth")})
    out = tmp_path / "out"
    run = ["evaluate", "--zoo", str(tmp_path / "zoo.yaml"), "--output", str(out), *data]
    run += ["--rows", "classification"]
    process = start("scripts.zoo", *run)
    end = time.monotonic() + 120
    while not (out / "again" / "output.txt").exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.02)
    time.sleep(0.5)  # the trainer of the second row is running
    process.send_signal(signal.SIGTERM)
    printed, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "error: interrupted\n")
    assert "run the same command again to continue" in printed
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    finished = records(out)
    assert finished.keys() == {"digits"}
    main(run)
    assert "digits: kept from an earlier run" in capsys.readouterr().out
    assert records(out).keys() == {"digits", "again"}
    assert records(out)["again"]["measured"] == finished["digits"]["measured"]


def failing(run: list[str], capsys: pytest.CaptureFixture, out: Path) -> dict[str, str]:
    """Return the reasons of an evaluation whose rows all fail."""
    assert failure_of(main, [*run, "--output", str(out), "--device", "cpu"], capsys)[0] == 1
    return {name: record["reason"] for name, record in records(out).items()}


def test_missing_data_sets_are_reported_before_any_download(site, cache, tmp_path, capsys):
    make_zoo(tmp_path, site.address)
    run = ["evaluate", "--zoo", str(tmp_path / "zoo.yaml"), "--imagenet", str(tmp_path / "none")]
    assert failing(run, capsys, tmp_path) == {
        "digits": f"--imagenet must be a folder, got {tmp_path / 'none'}",
        "scenes": "--coco must be a folder, got none",
    }
    assert not site.requests


def test_without_network_every_row_has_the_reason(data, cache, tmp_path, capsys):
    with serve() as site:
        make_zoo(tmp_path, site.address)
    run = ["evaluate", "--zoo", str(tmp_path / "zoo.yaml"), *data]
    for reason in failing(run, capsys, tmp_path).values():
        assert reason.startswith(f"cannot download {site.address}/")
        assert reason.endswith("Connection refused")
    assert not list(cache.iterdir())
