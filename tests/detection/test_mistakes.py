"""Errors of users: one line on stderr, exit code 2 for wrong usage and 1 for other failures."""

import json
import shutil

import pytest
import torch


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("rpe-2.0-product-ctx-1", ["5 parts", "rpe-{ratio}"]),
        ("foo-2.0-product-ctx-1-k", ["does not begin with 'rpe'"]),
        ("rpe-0-product-ctx-1-k", ["ratio", "> 0"]),
        ("rpe-nan-product-ctx-1-k", ["ratio", "'nan'"]),
        ("rpe-2.0-round-ctx-1-k", ["method", "'round'", "euc, quant, cross, product"]),
        ("rpe-2.0-product-fix-1-k", ["mode", "'fix'", "bias, ctx"]),
        ("rpe-2.0-product-ctx-2-k", ["shared_head", "'2'", "0 or 1"]),
        ("rpe-2.0-product-bias-1-v", ["values have no bias"]),
        ("rpe-2.0-product-ctx-1-kk", ["rpe_on", "'kk'", "each once"]),
        ("rpe-2.0-product-ctx-1-x", ["rpe_on", "'x'", "q, k, v"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_malformed_spec_is_refused_with_its_part_and_what_is_allowed(spec, words, failure):
    code, line = failure("--enc_rpe2d", spec)
    assert code == 2
    assert all(word in line for word in ["--enc-rpe2d", *words]), line


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--backbone", "vgg"], ["--backbone", "vgg", "resnet50"]),
        (["--nheads", "7"], ["nheads", "7", "256"]),
        (["--frozen_weights", "a.pth"], ["--frozen-weights needs --masks"]),
        (["--finetune", "a.pth", "--resume", "b.pth"], ["exclude each other"]),
        (["--coco_path", "a", "--val_images", "b"], ["--coco-path must be none with --val-images"]),
        (["--backbone_stride", "8"], ["--backbone-stride", "8", "16 or 32"]),
        (["--remove_difficult"], ["--remove-difficult", "true", "false"]),
        (["--lr_dorp", "100"], ["--lr_dorp", "--lr-drop"]),
        (["--set_cost_class", "0", "--set_cost_bbox", "0", "--set_cost_giou", "0"], ["all be 0"]),
        (["--eval"], ["--eval needs weights"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else "",
)
def test_usage_mistake_names_the_option_its_value_and_what_is_allowed(argv, words, failure):
    code, line = failure(*argv)
    assert code == 2
    assert all(word in line for word in words), line


def test_missing_data_is_refused_with_what_was_expected(model_flags, tmp_path, failure):
    code, line = failure(*model_flags, "--coco_path", str(tmp_path / "none"))
    assert (code, "none" in line) == (1, True)
    code, line = failure(*model_flags)
    assert (code, "coco_path" in line) == (1, True)


def test_missing_annotations_are_named(model_flags, scenes, tmp_path, failure):
    shutil.copytree(scenes, tmp_path / "scenes")
    (tmp_path / "scenes" / "annotations" / "instances_val2017.json").unlink()
    out = tmp_path / "out"
    run = [*model_flags, "--coco_path", str(tmp_path / "scenes"), "--output_dir", str(out)]
    code, line = failure(*run)
    assert code == 1
    assert "instances_val2017.json" in line
    assert not (out / "checkpoint.pth").exists()
    assert "epoch 0" not in (out / "run.log").read_text()


def test_annotated_image_that_is_not_in_the_zip_is_named(model_flags, scenes, tmp_path, failure):
    shutil.copytree(scenes, tmp_path / "scenes")
    path = tmp_path / "scenes" / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    content["images"][3]["file_name"] = "nowhere.jpg"
    path.write_text(json.dumps(content))
    code, line = failure(*model_flags, "--coco_path", str(tmp_path / "scenes"))
    assert code == 1
    assert "nowhere.jpg" in line
    assert "train2017.zip" in line


def test_truncated_zip_is_named(model_flags, scenes, tmp_path, failure):
    shutil.copytree(scenes, tmp_path / "scenes")
    path = tmp_path / "scenes" / "train2017.zip"
    path.write_bytes(path.read_bytes()[:5000])
    code, line = failure(*model_flags, "--coco_path", str(tmp_path / "scenes"))
    assert code == 1
    assert "train2017.zip" in line


def test_batch_larger_than_the_data_is_refused(flags, failure):
    code, line = failure(*flags, "--batch_size", "64")
    assert code == 2
    assert "64" in line
    assert "48" in line


def test_checkpoint_of_another_spec_lists_what_does_not_fit(flags, trained, failure):
    checkpoint = str(trained / "checkpoint.pth")
    code, line = failure(*flags, "--enc_rpe2d", "rpe-1.9-product-ctx-1-qkv", "--resume", checkpoint)
    assert code == 1
    assert "lookup_table_weight" in line
    assert line.endswith("has 9×9 product tables (81 buckets), the model's spec asks for 7×7 (49)")


def test_fewer_classes_than_the_data_has_are_refused(flags, failure):
    code, line = failure(*flags, "--num_classes", "3")
    assert code == 2
    assert "3" in line
    assert "9" in line


@pytest.mark.parametrize("name", ["model", "model_ema"])
def test_weights_that_are_not_tensors_are_refused(name, flags, trained, tmp_path, failure):
    content = torch.load(trained / "checkpoint.pth", weights_only=True)
    content[name] = content["model"] | {"class_embed.weight": 3.0}
    torch.save(content, tmp_path / "odd.pth")
    code, line = failure(*flags, "--finetune", str(tmp_path / "odd.pth"))
    assert code == 1
    assert f"{name!r} of " in line
    assert "odd.pth' must hold tensors, got a float under 'class_embed.weight'" in line


def test_checkpoint_of_another_class_count_is_refused(flags, trained, failure):
    checkpoint = str(trained / "checkpoint.pth")
    code, line = failure(*flags, "--num_classes", "30", "--eval", "--resume", checkpoint)
    assert code == 1
    assert "class_embed" in line
    assert line.endswith("the checkpoint has 11 class outputs, the model 31")


def test_output_dir_that_cannot_be_written_is_refused(flags, tmp_path, failure):
    (tmp_path / "file").write_text("")
    code, line = failure(*flags, "--output_dir", str(tmp_path / "file"))
    assert code == 1
    assert "file" in line


def test_outputs_that_are_not_finite_stop_the_run_and_save_the_batch(
    flags, trained, tmp_path, failure
):
    content = torch.load(trained / "checkpoint.pth", weights_only=True)
    content["model"]["bbox_embed.layers.0.weight"].fill_(float("nan"))
    torch.save(content, tmp_path / "nan.pth")
    code, line = failure(*flags, "--eval", "--resume", str(tmp_path / "nan.pth"))
    assert (code, "bbox_embed.layers.0.weight has " in line) == (1, True)
    # Finite weights of both signs, whose products overflow.
    content["model"]["bbox_embed.layers.0.weight"][::2] = 3e38
    content["model"]["bbox_embed.layers.0.weight"][1::2] = -3e38
    torch.save(content, tmp_path / "large.pth")
    run = ["--finetune", str(tmp_path / "large.pth"), "--output_dir", str(tmp_path / "out")]
    code, line = failure(*flags, *run)
    assert code == 1
    assert "bbox_embed" in line
    assert (tmp_path / "out" / "nonfinite_rank0.pth").exists()
