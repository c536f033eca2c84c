"""Exported files compute the outputs of their model; impossible exports are refused."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from classification.build import create_model
from classification.config import parse_args
from detection.build import build_network
from engine import dump
from scripts.export import program
from scripts.export.__main__ import main
from tests.commands import failure_of
from tests.detection.models import SMALL, config, images_of
from tests.recipes import fill

_CLASSIFIER = (
    "--model deit_tiny_patch16_224 --rpe rpe-1.9-product-ctx-1-qkv --input_size 32 48 "
    "--patch_size 8 --embed_dim 32 --depth 2 --num_heads 2 --mlp_ratio 2"
)
_DETECTOR = f"{SMALL} --enc_layers 1 --dec_layers 1 --enc_rpe2d rpe-2.0-product-ctx-1-qkv"
# 60 x 90 pixels become 4 x 6 features. The edges at 30 and 75 would move if the nearest pixel were
# computed with a scale that is wrong in its last bit.
_SIZES = [[(60, 90), (30, 75)], [(97, 250)], [(17, 200), (17, 33), (16, 180)]]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A classifier of 5 classes on 32 x 48 pixels, and its checkpoint."""
    options = parse_args(_CLASSIFIER.split())
    model = fill(create_model(options, 5).eval())
    path = tmp_path_factory.mktemp("classifier") / "checkpoint.pth"
    ema = {name: 2 * weight for name, weight in model.state_dict().items()}
    torch.save({"model": model.state_dict(), "model_ema": ema, "args": dump(options)}, path)
    return model, path


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A detector of 5 classes, and its checkpoint."""
    options = config(_DETECTOR)
    model = fill(build_network(options).eval())
    path = tmp_path_factory.mktemp("detector") / "checkpoint.pth"
    torch.save({"model": model.state_dict(), "args": dump(options)}, path)
    return model, path


@pytest.fixture
def onnxruntime() -> ModuleType:
    """The module onnxruntime, if all packages for ONNX are installed."""
    reason = "a package of requirements-export.txt is missing"
    pytest.importorskip("onnxscript", reason=reason)
    return pytest.importorskip("onnxruntime", reason=reason)


@pytest.fixture
def failure(capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str]]:
    """Run the command, and return its exit code and its one line on stderr."""
    return lambda *argv: failure_of(main, argv, capsys)


def run_elsewhere(path: Path, batches: list[tuple[Tensor, ...]], folder: Path) -> list:
    """Run a `.pt2` file in a process that imports torch and none of our packages."""
    torch.save(batches, folder / "batches.pt")
    code = """
import sys, torch
module = torch.export.load(sys.argv[1]).module()
with torch.no_grad():
    torch.save([module(*batch) for batch in torch.load("batches.pt")], "results.pt")
assert not {"irpe_core", "rpe_ops", "classification", "detection", "timm"} & set(sys.modules)
"""
    command = [sys.executable, "-I", "-c", code, str(path)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "results.pt")


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-4)


def test_classifier_runs_in_a_process_without_our_packages(classifier, tmp_path, capsys):
    model, checkpoint = classifier
    output = tmp_path / "new" / "model.pt2"
    main(["--checkpoint", str(checkpoint), "--output", str(output)])
    assert "differs by" in capsys.readouterr().out
    batches = [(torch.randn(n, 3, 32, 48),) for n in (1, 5)]
    for found, (images,) in zip(run_elsewhere(output, batches, tmp_path), batches, strict=True):
        assert_close({"logits": found}, {"logits": model(images)})


def test_detector_runs_in_a_process_without_our_packages(detector, tmp_path):
    model, checkpoint = detector
    output = tmp_path / "model.pt2"
    main(["--checkpoint", str(checkpoint), "--output", str(output)])
    files = {"metadata.json": ""}
    torch.export.load(output, extra_files=files)
    metadata = json.loads(files["metadata.json"])
    assert metadata["task"] == "detection"
    assert metadata["classes"] is None, "the checkpoint names none"
    assert metadata["image_size"] == metadata["transform"]["shortest_edge"] == 800
    batches = [images_of(*sizes) for sizes in _SIZES]
    for found, batch in zip(run_elsewhere(output, batches, tmp_path), batches, strict=True):
        assert list(found) == ["pred_logits", "pred_boxes"]
        assert_close(found, model(*batch))


def test_classifier_is_the_same_in_onnxruntime(classifier, tmp_path, onnxruntime):
    model, checkpoint = classifier
    output = tmp_path / "model.onnx"
    main(["--checkpoint", str(checkpoint), "--output", str(output)])
    session = onnxruntime.InferenceSession(output)
    assert [node.shape for node in session.get_inputs()] == [["batch", 3, 32, 48]]
    metadata = session.get_modelmeta().custom_metadata_map
    assert metadata["task"] == "classification"
    assert json.loads(metadata["image_size"]) == [32, 48]
    assert json.loads(metadata["transform"])["crop_pct"] == 0.875
    for n in (1, 4):
        images = torch.randn(n, 3, 32, 48)
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        assert_close({"logits": torch.from_numpy(logits)}, {"logits": model(images)})


def test_detector_is_the_same_in_onnxruntime(detector, tmp_path, onnxruntime):
    model, checkpoint = detector
    output = tmp_path / "model.onnx"
    main(["--checkpoint", str(checkpoint), "--output", str(output)])
    content = output.read_bytes()
    assert str(Path(__file__).parents[2]).encode() not in content
    session = onnxruntime.InferenceSession(content)
    axes = {node.name: node.shape for node in session.get_inputs()}
    assert axes["images"] == ["batch", 3, "height", "width"]
    assert axes["mask"] == ["batch", "height", "width"]
    names = [node.name for node in session.get_outputs()]
    assert names == ["pred_logits", "pred_boxes"]
    for sizes in _SIZES:
        images, mask = images_of(*sizes)
        arrays = session.run(names, {"images": images.numpy(), "mask": mask.numpy()})
        found = dict(zip(names, map(torch.from_numpy, arrays), strict=True))
        assert_close(found, model(images, mask))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "opset"),
    [
        ("--masks --enc_rpe2d rpe-2.0-cross-ctx-0-k", 18),
        ("--position_embedding learned --pre_norm --enc_rpe2d rpe-20.0-euc-bias-1-qk", 20),
        ("--backbone resnet18 --backbone_norm frozen --enc_rpe2d rpe-33.0-quant-ctx-1-v", 21),
        ("--enc_rpe2d rpe-2.0-product-ctx-1-k --no-aux_loss", 22),
        ("--backbone resnet50 --dilation --backbone_norm frozen", 18),
    ],
)
def test_detectors_of_every_kind_export(flags, opset, tmp_path, onnxruntime):
    options = config(f"{SMALL} {flags}")
    weights = fill(build_network(options).eval()).state_dict()
    checkpoint = tmp_path / "checkpoint.pth"
    torch.save({"model": weights, "args": dump(options)}, checkpoint)
    output = tmp_path / "model.onnx"
    main(["--checkpoint", str(checkpoint), "--output", str(output), "--opset", str(opset)])
    names = {node.name for node in onnxruntime.InferenceSession(output).get_outputs()}
    assert ("pred_masks" in names) == options.masks


def test_ema_is_exported_instead_of_the_weights(classifier, tmp_path):
    model, checkpoint = classifier
    output = tmp_path / "ema.pt2"
    main(["--checkpoint", str(checkpoint), "--output", str(output), "--use-ema"])
    ema = torch.export.load(output).state_dict
    for name, weight in model.state_dict().items():
        assert torch.equal(ema[name], 2 * weight)


def test_flags_and_files_complete_a_checkpoint_without_args(classifier, tmp_path, failure):
    model, _ = classifier
    bare = tmp_path / "bare.pth"
    torch.save(model.state_dict(), bare)
    output = tmp_path / "model.pt2"
    code, line = failure("--checkpoint", str(bare), "--output", str(output))
    assert (code, "bare.pth" in line, "--model" in line) == (2, True, True)
    words = _CLASSIFIER.split()
    file = tmp_path / "model.yaml"
    file.write_text("epochs: 3\nrpe: rpe-1.9-product-ctx-1-qkv\n")
    words = words[:2] + words[4:]
    main(["--checkpoint", str(bare), "--output", str(output), "--config", str(file), *words])
    assert output.exists()


def test_spec_of_a_detector_is_not_guessed(detector, tmp_path, failure):
    model, _ = detector
    bare = tmp_path / "bare.pth"
    torch.save({"model": model.state_dict()}, bare)
    code, line = failure("--checkpoint", str(bare), "--output", str(tmp_path / "model.pt2"))
    assert (code, "--enc-rpe2d" in line) == (2, True)


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["--output", "model.txt"], 2, ["model.txt", ".pt2", ".onnx"]),
        ([], 2, ["--output", "required"]),
        (["--output", "model.pt2", "--opset", "17"], 2, ["--opset", "17", "18"]),
        (["--output", "model.pt2", "--opset", "23"], 2, ["--opset", "23", "22"]),
        (["--output", "model.pt2", "--resume", "a.pth"], 2, ["resume", "checkpoint", "exclude"]),
        (["--output", "model.pt2", "--patch_size", "16"], 1, ["patch_embed.proj.weight"]),
        (["--output", "/dev/null/model.pt2"], 1, ["/dev/null"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_named(classifier, argv, code, words, failure, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found, line = failure("--checkpoint", str(classifier[1]), *argv)
    assert found == code
    assert all(word in line for word in words), line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        ([], "--checkpoint"),
        (["--pretrained"], "--model"),
        (["--pretrained", "--use-ema"], "--use-ema"),
        (["--checkpoint"], "--checkpoint"),
    ],
)
def test_exactly_one_option_gives_the_weights(argv, word, failure, tmp_path):
    code, line = failure("--output", str(tmp_path / "model.pt2"), *argv)
    assert (code, word in line) == (2, True)


def test_checkpoint_of_something_else_is_refused(failure, tmp_path):
    torch.save({"model": {"weight": torch.zeros(1)}}, tmp_path / "other.pth")
    output = str(tmp_path / "model.pt2")
    code, line = failure("--checkpoint", str(tmp_path / "other.pth"), "--output", output)
    assert (code, "neither a classifier" in line) == (1, True)


@pytest.mark.parametrize("head", ["head.weight", "class_embed.weight"])
@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.tensor(3.0), "neither a classifier"),
        (torch.zeros(3), "neither a classifier"),
        (3.0, "must hold tensors"),
    ],
    ids=["0-d", "1-d", "number"],
)
def test_head_that_is_not_a_matrix_is_refused(head, value, words, failure, tmp_path):
    torch.save({"model": {"a": torch.zeros(1), head: value}, "epoch": 1}, tmp_path / "odd.pth")
    output = str(tmp_path / "model.pt2")
    code, line = failure("--checkpoint", str(tmp_path / "odd.pth"), "--output", output)
    assert (code, words in line) == (1, True), line


def test_ema_of_another_kind_of_model_is_refused(detector, classifier, failure, tmp_path):
    content = {"model": detector[0].state_dict(), "model_ema": classifier[0].state_dict()}
    torch.save(content, tmp_path / "odd.pth")
    argv = ("--checkpoint", str(tmp_path / "odd.pth"), "--use-ema")
    code, line = failure(*argv, "--output", str(tmp_path / "model.pt2"))
    assert (code, "must hold a detector (a matrix class_embed.weight)" in line) == (
        1,
        True,
    ), line


def test_checkpoint_without_ema_is_refused(detector, failure, tmp_path):
    output = str(tmp_path / "model.pt2")
    code, line = failure("--checkpoint", str(detector[1]), "--output", output, "--use-ema")
    assert (code, "model_ema" in line) == (1, True)


def test_missing_packages_are_named_with_their_file(classifier, failure, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    output = str(tmp_path / "model.onnx")
    code, line = failure("--checkpoint", str(classifier[1]), "--output", output)
    assert code == 1
    assert "onnxscript" in line
    assert "pip install -r requirements-export.txt" in line


@pytest.mark.parametrize("wrong", [1.0, float("nan")], ids=["different", "nan"])
def test_file_that_differs_from_the_model_is_not_written(
    wrong, classifier, failure, tmp_path, monkeypatch
):
    open_exported = program.open_exported

    def open_wrongly(path):
        exported = open_exported(path)
        return lambda *inputs: exported(*inputs) + wrong

    monkeypatch.setattr(program, "open_exported", open_wrongly)
    output = tmp_path / "model.pt2"
    output.write_text("the one before")
    code, line = failure("--checkpoint", str(classifier[1]), "--output", str(output))
    assert (code, "differs from the model by" in line) == (1, True)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]
    assert output.read_text() == "the one before"
