"""Classes of the command, of Python and of exported files are the same, and equal --eval."""

import csv
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import classification
from classification.build import create_model
from classification.config import parse_args
from classification.main import main as train
from classification.models import default_cfgs
from classification.predict import main
from classification.restore import restore
from datasets.image_files import find_images
from engine import UserError
from engine.prediction import select_weights
from irpe_core import load_checkpoint
from scripts.export.__main__ import main as export
from tests.commands import failure_of
from tests.recipes import fill


@pytest.fixture(scope="module")
def trained(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the output folder of a short run that learns something, with an EMA."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = "--augment affine --reprob 0 --mixup 0 --cutmix 0 --no-repeated_aug --batch_size 32"
    train([*flags, *recipe.split(), "--epochs", "3", "--output_dir", str(folder)])
    return folder


@pytest.fixture(scope="module")
def checkpoint(trained: Path) -> str:
    """Return the path of its last checkpoint."""
    return str(trained / "checkpoint.pth")


@pytest.fixture
def failure(capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str]]:
    """Run the command, and return its exit code and its one line on stderr."""
    return lambda *argv: failure_of(main, ["--device", "cpu", *argv], capsys)


def predictions(path: Path, *words: str) -> list[dict]:
    """Run the command and return its JSON file."""
    main([*words, "--output", str(path), "--device", "cpu", "--num_workers", "0"])
    return json.loads(path.read_text(encoding="utf-8"))


def test_accuracy_is_that_of_the_evaluation(checkpoint, trained, digits, tmp_path):
    logged = json.loads((trained / "log.txt").read_text().splitlines()[-1])
    images = str(digits / "val")
    for flags, prefix in ((["--no-use_ema"], "test_"), ([], "test_ema_")):
        found = predictions(tmp_path / f"{prefix}.json", checkpoint, images, *flags)
        assert len(found) == 359
        classes = [Path(entry["image"]).parent.name for entry in found]
        for metric, k in (("acc1", 1), ("acc5", 5)):
            hits = [
                name in [row["class"] for row in entry["predictions"][:k]]
                for name, entry in zip(classes, found, strict=True)
            ]
            assert 100 * sum(hits) / len(hits) == pytest.approx(logged[prefix + metric])
    firsts = {entry["predictions"][0]["class"] for entry in found}
    assert len(firsts) > 1, "the classifier has learned something"


def test_command_python_and_exported_files_find_the_same(checkpoint, digits, tmp_path):
    pytest.importorskip("onnxscript", reason="a package of requirements-export.txt is missing")
    images = str(digits / "val" / "3")
    expected = predictions(tmp_path / "command.json", checkpoint, images)
    files = [file.name for file in find_images([images])]
    for suffix in (".onnx", ".pt2"):
        exported = tmp_path / f"model{suffix}"
        export(["--checkpoint", checkpoint, "--output", str(exported), "--use-ema"])
        classifier = classification.load(exported)
        for entry, found in zip(expected, classifier(files), strict=True):
            assert found.classes == [row["class"] for row in entry["predictions"]]
            scores = [row["score"] for row in entry["predictions"]]
            assert found.scores.tolist() == pytest.approx(scores, abs=1e-4)
        command = predictions(tmp_path / f"{suffix}.json", str(exported), images)
        assert [entry["predictions"][0]["class"] for entry in command] == [
            entry["predictions"][0]["class"] for entry in expected
        ]
    classifier = classification.load(checkpoint, device="cpu")
    assert classifier.classes == list("0123456789")
    for image in (files[0], Image.open(files[0]), np.asarray(Image.open(files[0]))):
        scores = classifier(image, topk=2).scores.tolist()
        rows = expected[0]["predictions"][:2]
        assert scores == pytest.approx([row["score"] for row in rows], abs=1e-5)


def test_csv_has_a_line_for_each_image_and_rank(checkpoint, digits, tmp_path):
    image = tmp_path / "Grüße, 写真.png"
    image.write_bytes((digits / "val" / "3" / "0045.png").read_bytes())
    output = tmp_path / "found.csv"
    main([checkpoint, str(image), "--topk", "2", "--output", str(output), "--device", "cpu"])
    rows = list(csv.DictReader(io.StringIO(output.read_text(encoding="utf-8"))))
    assert [(row["image"], row["rank"]) for row in rows] == [(str(image), "1"), (str(image), "2")]
    assert float(rows[0]["score"]) > float(rows[1]["score"])


def test_unreadable_images_are_skipped_named_and_counted(checkpoint, digits, tmp_path, capsys):
    for number in range(5):
        (tmp_path / f"{number}.png").write_bytes((digits / "val/3/0045.png").read_bytes())
    (tmp_path / "3.png").write_bytes(b"")
    output = tmp_path / "found.json"
    with pytest.raises(UserError, match="1 of 5 images could not be read"):
        predictions(output, checkpoint, str(tmp_path), "--batch_size", "2")
    assert "3.png" in capsys.readouterr().err
    assert len(json.loads(output.read_text())) == 4


def test_published_models_have_the_classes_of_imagenet(tmp_path, monkeypatch):
    name = "deit_tiny_patch16_224_ctx_product_50_shared_k"
    model = fill(create_model(parse_args(["--model", name]), 1000))
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = cache / default_cfgs[name].default.url.rpartition("/")[2]
    torch.save({"model": model.state_dict()}, file)
    image = Image.effect_noise((300, 250), 80)
    by_name = classification.load(name, device="cpu")
    by_file = classification.load(file, model=name, device="cpu")
    assert by_name.classes[0] == "tench"
    assert by_name.classes[-1] == "toilet tissue"
    assert by_name(image) is not None
    assert torch.equal(by_name(image).scores, by_file(image).scores)


def test_folders_of_imagenet_get_readable_names():
    wordnet = [f"n{number:08d}" for number in range(1000)]
    words = "--model deit_tiny_patch16_224 --input_size 16 --embed_dim 12 --depth 1 --num_heads 2"
    config = parse_args([*words.split(), "--patch_size", "8"])
    weights = create_model(config, 1000).state_dict()
    for classes, expected in (
        (wordnet, "tench"),
        (wordnet[::-1], "n00000999"),
        (["own", *wordnet[1:]], "own"),
    ):
        _, metadata = restore(config, {"model": weights, "classes": classes}, weights, "x.pth")
        assert metadata["classes"][0] == expected


def test_an_ema_of_few_steps_is_reported(checkpoint, caplog):
    content = load_checkpoint(checkpoint)
    caplog.set_level("INFO")
    assert select_weights(content, "x", use_ema=None) is content["model_ema"]
    assert [record.levelname for record in caplog.records] == ["INFO"]
    content["args"]["model_ema_decay"] = 0.99996
    assert select_weights(content, "x", use_ema=True) is content["model_ema"]
    assert "99 % of the weights that training started with" in caplog.messages[-1]
    assert select_weights(content, "x", use_ema=False) is content["model"]
    assert select_weights(content | {"model_ema": None}, "x", use_ema=None) is content["model"]


def test_mistakes_are_one_sentence(checkpoint, digits, tmp_path, failure):
    image = str(digits / "val" / "3" / "0045.png")
    content = load_checkpoint(checkpoint)
    torch.save({"model": {"class_embed.weight": torch.zeros(3, 4)}}, tmp_path / "detr.pth")
    torch.save({"model": content["model"]}, tmp_path / "bare.pth")
    del content["classes"]
    torch.save(content, tmp_path / "nameless.pth")
    old = tmp_path / "old.csv"
    old.write_text("mine")
    for argv, code, words in [
        ([checkpoint], 2, "IMAGES"),
        ([checkpoint, image, "--topk", "0"], 2, "--topk"),
        ([checkpoint, image, "--output", "a.txt"], 2, "--output must end in .csv or .json"),
        ([checkpoint, image, "--output", str(old)], 2, "old.csv must not exist: --force"),
        ([checkpoint, image, "--no-such"], 2, "unknown flag --no-such"),
        ([str(tmp_path / "detr.pth"), image], 1, "must be the checkpoint of a classifier"),
        ([str(tmp_path / "bare.pth"), image], 2, "does not name its model: give --model"),
        ([str(tmp_path / "nameless.pth"), image], 1, "has no class names: --classes must be"),
        ([str(tmp_path / "none.pth"), image], 1, "does not exist"),
        ([str(tmp_path / "none.onnx"), image], 1, "does not exist"),
        ([str(tmp_path / "none.pt2"), image, "--device", "cuda"], 2, "--device must be auto"),
        ([str(tmp_path / "none.pt2"), image, "--rpe", ""], 2, "--rpe has no effect on"),
        ([checkpoint, image, "--patch_size", "2"], 1, "patch_embed.proj.weight"),
    ]:  # fmt: skip
        found, line = failure(*argv)
        assert (found, words in line) == (code, True), line
    assert old.read_text() == "mine"


def test_missing_onnxruntime_is_named(checkpoint, digits, tmp_path, monkeypatch, failure):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    (tmp_path / "a.onnx").write_bytes(b"")
    code, line = failure(str(tmp_path / "a.onnx"), str(digits / "val" / "3" / "0045.png"))
    assert (code, "pip install onnxruntime" in line) == (1, True)


def test_options_in_python_are_checked(checkpoint):
    with pytest.raises(UserError, match="depht is not an option: did you mean depth"):
        classification.load(checkpoint, depht=3)
    with pytest.raises(UserError, match="depth must be greater"):
        classification.load(checkpoint, depth=0)
    classifier = classification.load(checkpoint, classes=list("abcdefghij"), device="cpu")
    assert classifier.classes[0] == "a"
    with pytest.raises(ValueError, match="topk must be at least 1, got 0"):
        classifier(Image.new("RGB", (9, 9)), topk=0)
