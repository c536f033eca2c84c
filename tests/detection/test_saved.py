"""A checkpoint names its task, classes and images, and gives the options that the user does not."""

import json

import pytest
import torch
import yaml

from datasets import build_coco_transforms
from detection.main import main
from tests.origins import evaluation


def test_a_checkpoint_describes_itself_in_plain_values(trained):
    content = torch.load(trained / "checkpoint.pth", weights_only=True)
    assert content["task"] == "detection"
    assert content["classes"] == list("0123456789")
    assert content["label_to_category"] == {label: label + 1 for label in range(10)}
    assert content["image_size"] == 64
    assert content["transform"] == build_coco_transforms("val", image_size=64).settings()
    json.dumps(content["transform"])


def test_own_checkpoint_is_evaluated_without_options(flags, scenes, tmp_path):
    main([*flags, "--epochs", "1", "--cls_loss_coef", "5", "--output_dir", str(tmp_path / "run")])
    trained = tmp_path / "run"
    expected = json.loads((trained / "log.txt").read_text().splitlines()[-1])
    run = ["--coco_path", str(scenes), "--num_workers", "0", "--device", "cpu"]
    metrics = evaluation(main, tmp_path, *run, "--resume", str(trained / "checkpoint.pth"))
    # Another batch size rounds the losses differently.
    assert metrics == pytest.approx({key: expected[key] for key in metrics}, rel=1e-6)


def test_fine_tuning_takes_the_model_and_records_it(trained, scenes, tmp_path):
    run = ["--coco_path", str(scenes), "--num_workers", "0", "--device", "cpu", "--epochs", "1"]
    run += ["--batch_size", "8", "--finetune", str(trained / "checkpoint.pth")]
    main([*run, "--output_dir", str(tmp_path)])
    recorded = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert recorded["hidden_dim"] == 16
    assert recorded["image_size"] == 64
    assert recorded["lr"] == 1e-4, "the recipe of the checkpoint is not taken"
    assert recorded["num_classes"] is None


def test_classifiers_are_refused(scenes, tmp_path, failure):
    torch.save({"model": {"head.weight": torch.zeros(3, 4)}}, tmp_path / "deit.pth")
    for option in ("--resume", "--finetune"):
        words = ["--coco_path", str(scenes), "--eval", option, str(tmp_path / "deit.pth")]
        code, line = failure(*words)
        assert code == 1
        assert "deit.pth must be the checkpoint of a detector, got that of a classifier" in line


@pytest.mark.parametrize(("flag", "word"), [("--hidden_dim", "32"), ("--num_queries", "9")])
def test_flags_override_the_checkpoint(flag, word, trained, scenes, failure):
    words = ["--coco_path", str(scenes), "--eval", "--device", "cpu", flag, word]
    code, line = failure(*words, "--resume", str(trained / "checkpoint.pth"))
    assert code == 1
    assert "does not fit DETR" in line
