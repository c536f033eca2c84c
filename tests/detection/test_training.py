"""The whole trainer on a few built-in scenes: resuming, evaluation, several processes."""

import json
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from datasets.scenes import SceneOptions, write_scenes
from detection.build import build_model, build_network, create_schedule, param_groups
from detection.config import DetectionConfig, parse_args
from detection.main import main
from engine.config import make_config
from tests.engine.launch import start, start_pair
from tests.recipes import golden, golden_json

COCO = [
    f"test_{name}"
    for name in ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm")
]


def last_line(folder: Path) -> dict:
    return json.loads((folder / "log.txt").read_text().splitlines()[-1])


def evaluated(folder: Path) -> dict:
    record = json.loads((folder / "eval.json").read_text())
    assert record["images"] == 21
    assert record["images_per_s"] > 0
    return {name: value for name, value in record.items() if name.startswith("test_")}


def evaluation(folder: Path, *argv: str) -> dict:
    main([*argv, "--eval", "--output_dir", str(folder)])
    return evaluated(folder)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoint.pth", weights_only=True)["model"]


def assert_same_weights(one: Path, other: Path) -> None:
    expected, got = weights(one), weights(other)
    assert expected.keys() == got.keys()
    assert not [name for name in expected if not torch.equal(expected[name], got[name])]


def test_run_killed_in_mid_epoch_and_resumed_ends_with_the_same_weights(flags, trained, tmp_path):
    run = [*flags, "--epochs", "2", "--output_dir", str(tmp_path), "--checkpoint_steps", "1"]
    process = start("detection.main", *run)
    end = time.monotonic() + 120
    while True:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        path = tmp_path / "checkpoint.pth"
        if path.exists() and torch.load(path, weights_only=True)["step"] > 1:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    main([*run, "--auto_resume"])
    assert_same_weights(trained, tmp_path)
    assert last_line(tmp_path)["test_AP"] == last_line(trained)["test_AP"]


def test_evaluation_of_a_checkpoint_gives_the_metrics_of_training(flags, trained, tmp_path):
    metrics = evaluation(tmp_path, *flags, "--resume", str(trained / "checkpoint.pth"))
    expected = last_line(trained)
    assert set(COCO) <= metrics.keys()
    assert metrics == {name: expected[name] for name in metrics}


def test_metrics_do_not_depend_on_batch_size(flags, trained, tmp_path):
    run = [*flags, "--resume", str(trained / "checkpoint.pth")]
    one = evaluation(tmp_path / "1", *run, "--batch_size", "1")
    eight = evaluation(tmp_path / "8", *run, "--batch_size", "8")
    assert {n: one[n] for n in COCO} == pytest.approx({n: eight[n] for n in COCO}, abs=1e-4)
    assert one["test_loss"] == pytest.approx(eight["test_loss"], rel=1e-5)


def test_two_processes_have_the_metrics_of_one(flags, trained, tmp_path):
    run = [*flags, "--resume", str(trained / "checkpoint.pth")]
    one = evaluation(tmp_path / "one", *run)
    pair = [*run, "--eval", "--output_dir", str(tmp_path / "two")]
    for process in start_pair("detection.main", *pair):
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert evaluated(tmp_path / "two") == one
    details = [(tmp_path / name / "metrics_per_class.json").read_text() for name in ("one", "two")]
    assert details[0] == details[1]


def test_one_process_resumes_a_training_of_two(flags, tmp_path):
    run = [*flags, "--batch_size", "4", "--epochs", "1", "--output_dir", str(tmp_path)]
    for process in start_pair("detection.main", *run):
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    main([*run, "--epochs", "2", "--auto_resume"])
    assert last_line(tmp_path)["epoch"] == 1


def test_folders_train_to_the_same_weights_as_zips(model_flags, trained, tmp_path):
    root = write_scenes(tmp_path / "scenes", SceneOptions(train=48, val=21, folders=True))
    run = [*model_flags, "--coco_path", str(root), "--epochs", "2"]
    main([*run, "--output_dir", str(tmp_path / "out")])
    assert_same_weights(trained, tmp_path / "out")


def test_own_data_set_has_contiguous_labels_and_their_map_in_the_checkpoint(
    model_flags, scenes, tmp_path
):
    files = {}
    for split in ("train", "val"):
        path = scenes / "annotations" / f"instances_{split}2017.json"
        content = json.loads(path.read_text())
        for entry in content["annotations"]:
            entry["category_id"] = 7 * entry["category_id"] + 100
        for entry in content["categories"]:
            entry["id"] = 7 * entry["id"] + 100
        files[split] = tmp_path / f"{split}.json"
        files[split].write_text(json.dumps(content))
    own = ["--train_images", str(scenes / "train2017.zip")]
    own += ["--val_images", str(scenes / "val2017.zip")]
    own += ["--train_annotations", str(files["train"]), "--val_annotations", str(files["val"])]
    main([*model_flags, *own, "--epochs", "1", "--output_dir", str(tmp_path / "out")])
    content = torch.load(tmp_path / "out" / "checkpoint.pth", weights_only=True)
    assert sorted(content["label_to_category"]) == list(range(10))
    assert min(content["label_to_category"].values()) >= 100
    assert content["model"]["class_embed.weight"].shape[0] == 11
    network = build_network(make_config(DetectionConfig, content["args"]), load=False)
    network.load_state_dict(content["model"])
    run = [*model_flags, *own, "--resume", str(tmp_path / "out" / "checkpoint.pth")]
    metrics = evaluation(tmp_path / "eval", *run)
    assert metrics["test_AP"] == last_line(tmp_path / "out")["test_AP"]


def test_fine_tuning_replaces_the_class_head_and_logs_it(flags, trained, tmp_path, caplog):
    run = [*flags, "--finetune", str(trained / "checkpoint.pth"), "--num_classes", "12"]
    main([*run, "--eval", "--output_dir", str(tmp_path)])
    assert "class_embed.weight has new random weights for 12 classes" in caplog.messages


def test_the_best_mask_head_of_a_frozen_detector_is_that_of_the_best_masks(
    flags, trained, monkeypatch
):
    recipes = []
    monkeypatch.setattr(
        "detection.training.run_training", lambda session, recipe: recipes.append(recipe)
    )
    main(flags)
    main([*flags, "--masks"])
    main([*flags, "--masks", "--frozen_weights", str(trained / "checkpoint.pth")])
    assert [recipe.best_by for recipe in recipes] == ["AP", "AP", "segm_AP"]


def test_ema_masks_accumulation_and_bfloat16_work_together(flags, tmp_path):
    run = [*flags, "--masks", "--model_ema", "--accumulate_steps", "2", "--dtype", "bfloat16"]
    main([*run, "--batch_size", "4", "--epochs", "1", "--output_dir", str(tmp_path)])
    line = last_line(tmp_path)
    assert {"test_segm_AP", "test_ema_AP", "train_loss_mask", "train_loss_dice"} <= line.keys()


def test_published_padding_is_an_option(flags, trained, tmp_path):
    run = [*flags, "--resume", str(trained / "checkpoint.pth"), "--eval_padding"]
    assert evaluation(tmp_path, *run)["test_AP"] >= 0


def test_learning_rates_and_groups_equal_the_original():
    expected = golden_json("detr_train")
    config = parse_args(
        [
            "--lr_drop",
            "100",
            "--epochs",
            "150",
            "--backbone_weights",
            "none",
            "--enc_rpe2d",
            "rpe-2.0-product-ctx-1-k",
        ]
    )
    # The weights are not loaded, because only the names of the parameters are compared.
    model, _, _ = build_model(
        config.model_copy(update={"backbone_weights": "imagenet"}), load=False
    )
    groups = param_groups(config, model)
    names = {id(p): name for name, p in model.named_parameters()}
    assert [[names[id(p)] for p in group["params"]] for group in groups] == [
        group["names"] for group in expected["groups"]
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay)
    scheduler, per_step = create_schedule(config, optimizer, steps_per_epoch=10)
    assert not per_step
    learning_rates = []
    for _ in range(150):
        learning_rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    recorded = golden("detr_train")
    key = next(key for key in recorded.files if recorded[key].shape == (150, 2))
    torch.testing.assert_close(
        torch.tensor(learning_rates),
        torch.from_numpy(recorded[key]).to(torch.float32),
        rtol=1e-6,
        atol=0,
    )


def test_cosine_schedule_warms_up_and_ends_at_a_hundredth():
    config = parse_args(["--sched", "cosine", "--warmup_steps", "4", "--epochs", "2"])
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    scheduler, per_step = create_schedule(config, optimizer, steps_per_epoch=52)
    learning_rates = []
    for _ in range(105):
        learning_rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert per_step
    assert learning_rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert learning_rates[-1] == pytest.approx(0.01)
    assert learning_rates[4:] == sorted(learning_rates[4:], reverse=True)
