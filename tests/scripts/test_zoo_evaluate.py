"""The zoo measured anew: stand-in checkpoints from a server of the test, on the embedded data."""

import csv
import errno
import io
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from classification.build import create_model
from classification.main import main as classify
from datasets.embedded import write_digits
from datasets.scenes import SceneOptions, write_scenes
from detection.detr import build_network
from engine import UserError
from irpe_core import CheckpointError
from irpe_core.download import sha256_of
from scripts.zoo.__main__ import main
from scripts.zoo.checkpoints import fetch
from scripts.zoo.report import Record, Report, compare, verdict
from scripts.zoo.rows import Zoo, load_zoo
from tests.commands import failure_of
from tests.engine.launch import start
from tests.recipes import fill
from tests.web_server import Site, serve

CLASSIFIER = {
    "model": "deit_tiny_patch16_224",
    "rpe": "rpe-1.9-product-ctx-1-qkv",
    "input_size": 16,
    "patch_size": 4,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "num_workers": 0,
}
DETECTOR = {
    "enc_rpe2d": "rpe-2.0-product-ctx-1-k",
    "backbone": "small",
    "backbone_weights": "none",
    "backbone_norm": "batch",
    "backbone_stride": 16,
    "hidden_dim": 16,
    "nheads": 2,
    "dim_feedforward": 32,
    "enc_layers": 1,
    "dec_layers": 1,
    "num_queries": 8,
    "num_classes": 11,
    "image_size": 64,
    "num_workers": 0,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Where the digits and a few scenes lie, as flags of `evaluate`, computed on the CPU."""
    root = tmp_path_factory.mktemp("data")
    digits = write_digits(root / "digits")
    scenes = write_scenes(root / "scenes", SceneOptions(train=1, val=5))
    return ["--imagenet", str(digits), "--coco", str(scenes), "--device", "cpu"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Checkpoints of a classifier and a detector with weights by recipe B."""
    folder = tmp_path_factory.mktemp("checkpoints")
    zoo = make_zoo(folder, "http://nowhere")
    configs = {row.name: row.config for row in zoo.rows}
    models = {
        "digits": create_model(configs["digits"], 10),
        "scenes": build_network(configs["scenes"]),
    }
    return {name: saved(fill(model)) for name, model in models.items()}


@pytest.fixture
def site(checkpoints: dict[str, bytes]) -> Iterator[Site]:
    """A server that has the two checkpoints."""
    with serve(**checkpoints) as site:
        yield site


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of checkpoints."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


def saved(model: nn.Module) -> bytes:
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict()}, buffer)
    return buffer.getvalue()


def without_tables(checkpoint: bytes) -> bytes:
    """The same weights as a model without iRPE has them."""
    weights = torch.load(io.BytesIO(checkpoint))["model"]
    buffer = io.BytesIO()
    torch.save({"model": {k: v for k, v in weights.items() if ".rpe_" not in k}}, buffer)
    return buffer.getvalue()


def make_zoo(folder: Path, address: str, **classifiers: dict) -> Zoo:
    """A zoo in a file: `digits`, more classifiers of its configuration, and `scenes`."""
    for name, config in (("digits", CLASSIFIER), ("scenes", DETECTOR)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    rows = {"digits": {"checkpoint": f"{address}/digits.pth"}} | classifiers
    content = {
        "source": "a test",
        "classification": {name: {"config": "digits.yaml"} | row for name, row in rows.items()},
        "detection": {
            "scenes": {
                "config": "scenes.yaml",
                "checkpoint": f"{address}/scenes.pth",
                "published": {"AP": 0.5},
            }
        },
    }
    (folder / "zoo.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return load_zoo(folder / "zoo.yaml")


def records(folder: Path) -> dict[str, dict]:
    return json.loads((folder / "zoo.json").read_text())["rows"]


def measured_alone(zoo: Zoo, data: list[str], checkpoint: bytes, folder: Path) -> dict:
    """What the trainer itself says of `digits`."""
    (folder / "alone.pth").write_bytes(checkpoint)
    run = ["--config", str(zoo.rows[0].config_file), "--eval", "--device", "cpu"]
    run += ["--resume", str(folder / "alone.pth"), "--data-path", data[1]]
    classify([*run, "--output_dir", str(folder / "alone")])
    return json.loads((folder / "alone" / "eval.json").read_text())


def test_the_zoo_is_downloaded_evaluated_and_compared_and_goes_on_where_it_failed(
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

    # The first download, of `digits`, breaks off in the middle.
    site.break_after = [len(checkpoints["digits"]) // 2]
    code, line = failure_of(main, run, capsys)
    assert code == 1
    assert line.endswith(
        "5 of 5 rows failed or are outside of the tolerance: "
        + ", ".join(["digits", "gone", "foreign", "plain", "scenes"])
    )
    first = records(out)
    assert "broke off at" in first["digits"]["reason"]
    assert "the server answered 404" in first["gone"]["reason"]
    assert "the checkpoint does not fit VisionTransformer: " in first["foreign"]["reason"]
    assert "plain.pth' has no iRPE, the row has it on q, k, v: " in first["plain"]["reason"]
    assert first["scenes"]["verdict"] == "outside"
    assert first["scenes"]["images"] == 5
    assert first["scenes"]["images_per_s"] > 0
    assert first["scenes"]["settings"]["flags"][-3:] == ["--eval-padding", "--batch-size", "2"]
    assert {path.name for path in cache.glob("*.pth")} == {"plain.pth", "scenes.pth"}

    asked = len(site.requests)
    capsys.readouterr()
    code, line = failure_of(main, [*run, "--rows", "digits", "gone", "scenes"], capsys)
    assert code == 1
    assert "2 of 3 rows failed or are outside of the tolerance: gone, scenes" in line
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

    # Other settings fail: the figures stay, with the reason beside them until they are asked for.
    code, _ = failure_of(main, [*run, "--rows", "digits", "--imagenet", "nowhere"], capsys)
    assert code == 1
    failed = digits | {"failed_later": "--imagenet nowhere is not a folder"}
    assert records(out)["digits"] == failed
    main([*run, "--rows", "digits"])
    assert records(out)["digits"] == digits


def check_documents(out: Path, published: dict[str, float]) -> None:
    """Markdown and CSV say what the JSON says."""
    with (out / "zoo.csv").open() as file:
        lines = {(line["row"], line["figure"]): line for line in csv.DictReader(file)}
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


def test_two_processes_measure_what_one_does(data, checkpoints, site, cache, tmp_path):
    zoo = make_zoo(tmp_path, site.address)
    alone = measured_alone(zoo, data, checkpoints["digits"], tmp_path)
    run = ["evaluate", "--zoo", str(tmp_path / "zoo.yaml"), "--output", str(tmp_path), *data]
    main([*run, "--rows", "digits", "--nproc", "2", "--batch-size", "100"])
    record = records(tmp_path)["digits"]
    assert record["measured"] == {"top1": alone["test_acc1"], "top5": alone["test_acc5"]}
    assert record["verdict"] == "not compared"
    assert record["machine"]["processes"] == 2


def test_interrupted_between_rows_it_leaves_no_process_and_keeps_what_is_finished(
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
    time.sleep(0.5)  # the trainer of the second row is at work
    process.send_signal(signal.SIGTERM)
    printed, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "error: interrupted\n")
    assert "the same command goes on from there" in printed
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    finished = records(out)
    assert finished.keys() == {"digits"}
    main(run)
    assert "digits: kept from an earlier run" in capsys.readouterr().out
    assert records(out).keys() == {"digits", "again"}
    assert records(out)["again"]["measured"] == finished["digits"]["measured"]


def failing(run: list[str], capsys: pytest.CaptureFixture, out: Path) -> dict[str, str]:
    """Why the rows of an evaluation could not be run."""
    assert failure_of(main, [*run, "--output", str(out), "--device", "cpu"], capsys)[0] == 1
    return {name: record["reason"] for name, record in records(out).items()}


def test_missing_data_is_said_before_anything_is_downloaded(site, cache, tmp_path, capsys):
    make_zoo(tmp_path, site.address)
    run = ["evaluate", "--zoo", str(tmp_path / "zoo.yaml"), "--imagenet", str(tmp_path / "none")]
    assert failing(run, capsys, tmp_path) == {
        "digits": f"--imagenet {tmp_path / 'none'} is not a folder",
        "scenes": "--coco is not given, where its data lies",
    }
    assert not site.requests


def test_without_network_a_row_says_so(data, cache, tmp_path, capsys):
    with serve() as site:
        make_zoo(tmp_path, site.address)
    run = ["evaluate", "--zoo", str(tmp_path / "zoo.yaml"), *data]
    for reason in failing(run, capsys, tmp_path).values():
        assert reason.startswith(f"cannot download {site.address}/")
        assert reason.endswith("Connection refused")
    assert not list(cache.iterdir())


def test_download_goes_on_after_a_failure(site, cache, tmp_path, capsys):
    wrong = {"checkpoint": site.url("wrong.pth"), "sha256": "0" * 64}
    zoo = make_zoo(tmp_path, site.address, gone={"checkpoint": site.url("gone.pth")}, wrong=wrong)
    site.files["/wrong.pth"] = b"something else"
    with pytest.raises(UserError, match=r"^not downloaded: gone, wrong$"):
        main(["download", "--zoo", str(zoo.file)])
    printed = capsys.readouterr()
    assert f"scenes: {cache / 'scenes.pth'}\n" in printed.out
    assert "404" in printed.err
    assert f"instead of {'0' * 64}" in printed.err
    assert {path.name for path in cache.iterdir()} == {"digits.pth", "scenes.pth"}
    asked = len(site.requests)
    main(["download", "--zoo", str(zoo.file), "--rows", "digits", "detection"])
    assert len(site.requests) == asked


@pytest.mark.parametrize("kind", ["folder", "address"])
def test_a_mirror_takes_the_place_of_the_published_address(
    kind, checkpoints, site, cache, tmp_path
):
    zoo = make_zoo(tmp_path, "http://127.0.0.1:1/release")
    for name, content in checkpoints.items():
        (tmp_path / f"{name}.pth").write_bytes(content)
    mirror = {"folder": str(tmp_path), "address": f"{site.address}/"}[kind]
    main(["download", "--zoo", str(zoo.file), "--mirror", mirror])
    assert {path.name: path.read_bytes() for path in cache.iterdir()} == {
        f"{name}.pth": content for name, content in checkpoints.items()
    }


def full_disk(source: Path, target: Path) -> None:
    target.write_bytes(b"half")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))


@pytest.mark.parametrize(
    ("content", "copy", "words"),
    [
        (None, shutil.copyfile, "does not exist"),
        (b"other", shutil.copyfile, "has the SHA-256 d9298a10.* instead of 0000"),
        (b"", full_disk, "No space left on device"),
    ],
    ids=["missing", "wrong-checksum", "full-disk"],
)
def test_a_mirrored_folder_that_fails_leaves_nothing_in_the_cache(
    content, copy: Callable, words, cache, tmp_path, monkeypatch
):
    sha256 = "0" * 64 if content else None
    zoo = make_zoo(
        tmp_path, "http://nowhere", digits={"checkpoint": "http://x/a.pth", "sha256": sha256}
    )
    if content is not None:
        (tmp_path / "a.pth").write_bytes(content)
    monkeypatch.setattr(shutil, "copyfile", copy)
    with pytest.raises(CheckpointError, match=words):
        fetch(zoo.rows[0], str(tmp_path))
    assert not cache.exists() or not list(cache.iterdir())


def test_two_copies_from_a_mirrored_folder_do_not_meet(checkpoints, cache, tmp_path, monkeypatch):
    row = make_zoo(tmp_path, "http://nowhere").rows[0]
    (tmp_path / "digits.pth").write_bytes(checkpoints["digits"])
    copy, places = shutil.copyfile, []

    def slow_copy(source: Path, target: Path) -> Path:
        places.append(target)
        if len(places) == 1:  # another call starts and ends while this one is at work
            assert fetch(row, str(tmp_path)).read_bytes() == checkpoints["digits"]
        return copy(source, target)

    monkeypatch.setattr(shutil, "copyfile", slow_copy)
    fetch(row, str(tmp_path))
    assert len(set(places)) == 2
    assert {p.name: p.read_bytes() for p in cache.iterdir()} == {
        "digits.pth": checkpoints["digits"]
    }


@pytest.mark.parametrize(
    ("top1", "expected"),
    [(82.4, "within"), (82.401, "outside"), (82.2, "within"), (82.199, "outside")],
)
def test_the_tolerance_is_a_tenth_of_a_point_inclusive(top1, expected, tmp_path):
    facts = {"checkpoint": "http://x/a.pth", "published": {"top1": 82.3, "top5": 95.9}}
    row = make_zoo(tmp_path, "http://nowhere", digits=facts).rows[0]
    record = Record(measured={"top1": top1, "top5": 95.9})
    assert verdict(row, record) == expected
    assert compare(row, record)["top1"].difference == pytest.approx(top1 - 82.3)


def test_figures_outlive_a_failure_which_is_told_beside_them(tmp_path):
    zoo = make_zoo(tmp_path, "http://nowhere")
    row, address = zoo.rows[0], "http://nowhere/digits.pth"
    record = Record(
        measured={"top1": 1.0, "top5": 2.0}, images=1, images_per_s=1.0, checkpoint=address
    )
    Report(tmp_path, zoo).put(row, record)
    assert "## Not run" not in (tmp_path / "zoo.md").read_text()
    Report(tmp_path, zoo).put(row, Record(reason="no network", checkpoint=address))
    assert Report(tmp_path, zoo).records == {"digits": replace(record, failed_later="no network")}
    text = (tmp_path / "zoo.md").read_text()
    assert "| 1.00 " in text
    assert "- digits: no network; its figures above are of an earlier evaluation\n" in text
    with (tmp_path / "zoo.csv").open() as file:
        assert {line["reason"] for line in csv.DictReader(file)} == {"no network"}
    Report(tmp_path, zoo).put(row, record)
    assert "no network" not in (tmp_path / "zoo.md").read_text()


def test_figures_of_another_checkpoint_give_way_to_the_reason(tmp_path):
    zoo = make_zoo(tmp_path, "http://nowhere")
    record = Record(
        measured={"top1": 1.0, "top5": 2.0}, images=1, images_per_s=1.0, checkpoint="http://old/a"
    )
    Report(tmp_path, zoo).put(zoo.rows[0], record)
    failure = Record(reason="no network", checkpoint="http://nowhere/digits.pth")
    Report(tmp_path, zoo).put(zoo.rows[0], failure)
    assert Report(tmp_path, zoo).records == {"digits": failure}
    assert "| 1.00 " not in (tmp_path / "zoo.md").read_text()
    assert "- digits: no network\n" in (tmp_path / "zoo.md").read_text()


def test_another_zoo_takes_no_figures_away(tmp_path):
    zoo = make_zoo(tmp_path, "http://nowhere")
    record = Record(measured={"top1": 1.0, "top5": 2.0}, images=1, images_per_s=1.0)
    Report(tmp_path, zoo).put(zoo.rows[0], record)
    other = load_zoo()
    Report(tmp_path, other).put(other.rows[0], record)
    assert Report(tmp_path, zoo).records == {"digits": record, other.rows[0].name: record}


@pytest.mark.parametrize("content", ["", "[]", '{"rows": {"a": 1}}', '{"rows": 1}'])
def test_a_file_that_is_no_report_is_not_overwritten(content, data, tmp_path, capsys):
    zoo = make_zoo(tmp_path, "http://nowhere")
    (tmp_path / "zoo.json").write_text(content)
    run = ["evaluate", "--zoo", str(zoo.file), "--output", str(tmp_path), *data]
    code, line = failure_of(main, run, capsys)
    assert code == 1
    assert "zoo.json cannot be read as the report of an evaluation" in line
    assert (tmp_path / "zoo.json").read_text() == content
