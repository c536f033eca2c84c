"""A checkpoint names its task, classes and images, and gives the options that the user does not."""

import argparse
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from timm.data import create_transform

from classification.main import main
from datasets import build_transform
from tests.origins import evaluation


def run_flags(digits: Path) -> list[str]:
    """Return flags of a run without any option of the model."""
    return ["--data_path", str(digits), "--num_workers", "0", "--device", "cpu"]


def test_a_checkpoint_describes_itself_in_plain_values(trained):
    content = torch.load(trained / "checkpoint.pth", weights_only=True)
    assert content["task"] == "classification"
    assert content["classes"] == list("0123456789")
    assert content["image_size"] == [16, 16]
    json.dumps(content["transform"])


@pytest.mark.parametrize("augment", ["recipe", "affine", "none"])
@pytest.mark.parametrize("size", [(224, 224), (24, 32), (64, 96)])
def test_recorded_transform_is_that_of_evaluation(augment, size):
    from datasets.transforms import eval_settings

    noise = torch.randint(256, (80, 120, 3), dtype=torch.uint8).numpy()
    image = Image.fromarray(noise)
    recorded = json.loads(json.dumps(eval_settings(size, augment)))
    expected = build_transform(False, input_size=size, augment=augment)(image)
    assert torch.equal(create_transform(**recorded)(image), expected)
    assert expected.shape == (3, *size)


def test_own_checkpoint_is_evaluated_without_options_of_the_model(trained, digits, tmp_path):
    expected = json.loads((trained / "log.txt").read_text().splitlines()[-1])
    source = str(trained / "checkpoint.pth")
    metrics = evaluation(main, tmp_path, *run_flags(digits), "--resume", source)
    assert metrics == {key: expected[key] for key in metrics}
    assert "test_ema_acc1" in metrics


def test_the_validation_part_of_a_split_is_that_of_the_training(flags, tmp_path, failure):
    for number in range(40):
        image = Image.new("L", (8, 8), color=6 * number)
        folder = tmp_path / "data" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{number}.png")
    run, data = tmp_path / "run", ["--data_path", str(tmp_path / "data"), "--data_set", "IMNET"]
    split = ["--train_val_split", "0.3", "--split_seed", "5"]
    options = [*flags, *data, *split, "--epochs", "1", "--batch_size", "8"]
    main([*options, "--output_dir", str(run)])
    last = json.loads((run / "log.txt").read_text().splitlines()[-1])
    source = ["--resume", str(run / "checkpoint.pth")]
    same = ["--batch_size", "8", "--num_workers", "0", "--device", "cpu"]
    metrics = evaluation(main, tmp_path / "eval", *data, *source, *same)
    assert metrics == {key: last[key] for key in metrics}
    # Other data keeps its own splits.
    shutil.copytree(tmp_path / "data", tmp_path / "other")
    code, line = failure(*data, "--eval", *source, "--data_path", str(tmp_path / "other"))
    assert code == 1
    assert "val/<class>/<image>.jpg, or --train_val_split 0.2 to use a part" in line


def test_flags_override_the_checkpoint(trained, digits, failure):
    source = str(trained / "checkpoint.pth")
    code, line = failure(*run_flags(digits), "--eval", "--resume", source, "--patch_size", "2")
    assert code == 1
    assert "patch_embed.proj.weight" in line


def test_another_model_takes_no_option_of_the_checkpoint(trained, digits, failure):
    # embed_dim 32 of the checkpoint does not belong to the model of the user.
    source = str(trained / "checkpoint.pth")
    other = ["--model", "deit_small_patch16_224", "--input_size", "16"]
    code, line = failure(*run_flags(digits), "--eval", "--resume", source, *other)
    assert code == 1
    assert "the model's is (1, 1, 384)" in line


def test_fine_tuning_takes_the_model_and_records_it(trained, digits, tmp_path):
    run = [*run_flags(digits), "--data_set", "DIGITS", "--epochs", "1", "--batch_size", "64"]
    source = str(trained / "checkpoint.pth")
    main([*run, "--finetune", source, "--output_dir", str(tmp_path / "run")])
    recorded = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert recorded["embed_dim"] == 32
    assert recorded["rpe"] == "rpe-1.9-product-ctx-1-qkv"
    assert recorded["lr"] == 5e-4, "the recipe of the checkpoint is not taken"
    args = torch.load(tmp_path / "run" / "checkpoint.pth", weights_only=True)["args"]
    assert args == recorded
    # A restarted run takes them from its own checkpoint, also if the first one is gone.
    gone = [*run, "--finetune", str(tmp_path / "gone.pth"), "--output_dir", str(tmp_path / "run")]
    main([*gone, "--epochs", "2", "--auto_resume"])


def test_args_of_the_original_are_taken_too(trained, digits, tmp_path):
    content = torch.load(trained / "checkpoint.pth", weights_only=True)
    args = argparse.Namespace(**content["args"], distributed=True, model_unknown="x")
    torch.save({"model": content["model"], "args": args}, tmp_path / "original.pth")
    source = str(tmp_path / "original.pth")
    metrics = evaluation(main, tmp_path / "out", *run_flags(digits), "--resume", source)
    expected = json.loads((trained / "log.txt").read_text().splitlines()[-1])
    assert metrics["test_acc1"] == expected["test_acc1"]


def test_wrong_values_and_detectors_are_named(trained, digits, tmp_path, failure):
    content = torch.load(trained / "checkpoint.pth", weights_only=True)
    torch.save(content | {"args": content["args"] | {"depth": -1}}, tmp_path / "odd.pth")
    code, line = failure(*run_flags(digits), "--eval", "--resume", str(tmp_path / "odd.pth"))
    assert code == 1
    assert f"args of {tmp_path / 'odd.pth'}: depth: Input should be greater than" in line
    torch.save({"model": {"class_embed.weight": torch.zeros(3, 4)}}, tmp_path / "detr.pth")
    for option in ("--resume", "--finetune"):
        code, line = failure(*run_flags(digits), "--eval", option, str(tmp_path / "detr.pth"))
        assert code == 1
        assert "detr.pth must be the checkpoint of a classifier, got that of a detector" in line
