"""Errors of users: one line on stderr, exit code 2 for wrong usage and 1 for other failures."""

import shutil

import pytest
import torch

MODEL = "deit_tiny_patch16_224_ctx_product_50_shared_k"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--model", "deit_gigantic"], ["--model", "deit_gigantic", "timm.list_models()"]),
        (["--rpe", "rpe-1.9-product-ctx-1"], ["--rpe", "5 parts", "rpe-{ratio}"]),
        (["--rpe", "rpe-1.9-foo-ctx-1-k"], ["method", "foo", "product"]),
        (["--rpe", "rpe-1.9-product-bias-1-v"], ["values have no bias"]),
        (["--rpe", "rpe-1.9-product-ctx-1-K"], ["rpe_on", "'K'"]),
        (["--dtype", "float8"], ["--dtype", "float8", "bfloat16"]),
        (["--resume", "a.pth", "--pretrained"], ["--resume and --pretrained exclude each other"]),
        (["--batch-size", "0"], ["--batch-size", "0", "1"]),
        (["--batch-size", "31"], ["--batch-size must be even", "31"]),
        (["--opt", "adamx"], ["--opt", "adamx", "timm.optim.list_optimizers()"]),
        (["--input_size", "0"], ["--input-size", "0", "at least 1 pixel per side"]),
        (["--batchsize", "64"], ["--batchsize", "--batch-size"]),
        (["--world_size", "3"], ["--world-size must", "processes, 1, got 3"]),
        (["--distillation-type", "soft"], ["--teacher-path"]),
        (["--auto_resume"], ["--auto-resume needs --output-dir"]),
        (["--resplit"], ["--resplit", "true", "false"]),
        (["--eval"], ["--eval needs weights"]),
        (["--device", "tpu"], ["--device", "tpu"]),
        (["--model", MODEL, "--rpe", "rpe-1.9-product-ctx-1-k"], ["already has iRPE"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else "",
)
def test_usage_mistake_names_the_option_its_value_and_what_is_allowed(argv, words, flags, failure):
    code, line = failure(*(flags if "already" in words[0] else []), *argv)
    assert code == 2
    assert all(word in line for word in words), line


def test_a_policy_that_the_device_does_not_have_is_refused(flags, failure):
    code, line = failure(*flags, "--aa", "original", "--augment_on", "device")
    assert code == 2
    assert "augment_on must be cpu" in line
    assert "AutoAugment" in line


def test_unknown_key_in_a_file_is_refused_with_file_and_key(tmp_path, failure):
    path = tmp_path / "run.yaml"
    path.write_text("model: deit_tiny_patch16_224\nbatchsize: 64\n")
    code, line = failure("--config", str(path))
    assert code == 2
    assert "run.yaml" in line
    assert "batchsize" in line
    assert "batch_size" in line


def test_batch_larger_than_the_data_is_refused_before_training(flags, failure):
    code, line = failure(*flags, "--batch_size", "2048")
    assert code == 2
    assert "2048" in line
    assert "1280" in line


def test_model_that_does_not_support_irpe_is_refused(flags, failure):
    code, line = failure(*flags[2:], "--model", "resnet10t", "--rpe", "rpe-1.9-product-ctx-1-k")
    assert code == 2
    assert "resnet10t" in line


def test_missing_data_folder_is_named(flags, tmp_path, failure):
    code, line = failure(*flags, "--data_set", "IMNET", "--data_path", str(tmp_path / "none"))
    assert code == 1
    assert "none" in line


def test_empty_data_folder_is_refused_with_what_was_expected(flags, tmp_path, failure):
    (tmp_path / "train").mkdir()
    code, line = failure(*flags, "--data_set", "IMNET", "--data_path", str(tmp_path))
    assert code == 1
    assert "train" in line


def test_class_in_val_that_train_lacks_is_named(flags, digits, tmp_path, failure):
    data = tmp_path / "digits"
    shutil.copytree(digits, data)
    shutil.rmtree(data / "train" / "7")
    code, line = failure(*flags, "--data_set", "IMNET", "--data_path", str(data))
    assert code == 1
    assert "7" in line


def test_truncated_tar_is_refused(flags, digits, tmp_path, failure):
    (tmp_path / "val.tar").write_bytes((digits / "val.tar").read_bytes())
    (tmp_path / "train.tar").write_bytes((digits / "train.tar").read_bytes()[:10_000])
    run = ["--data_set", "IMNET", "--load-tar", "--data_path", str(tmp_path)]
    code, line = failure(*flags, *run)
    assert code == 1
    assert "train.tar" in line


def test_output_dir_that_cannot_be_written_is_refused(flags, tmp_path, failure):
    (tmp_path / "file").write_text("")
    code, line = failure(*flags, "--output_dir", str(tmp_path / "file"))
    assert code == 1
    assert "file" in line


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 truncated"])
def test_file_that_is_not_a_checkpoint_is_refused(content, flags, tmp_path, failure):
    (tmp_path / "bad.pth").write_bytes(content)
    code, line = failure(*flags, "--resume", str(tmp_path / "bad.pth"))
    assert code == 1
    assert "bad.pth" in line


def test_truncated_checkpoint_is_refused(flags, trained, tmp_path, failure):
    whole = (trained / "checkpoint.pth").read_bytes()
    (tmp_path / "half.pth").write_bytes(whole[: len(whole) // 2])
    code, line = failure(*flags, "--eval", "--resume", str(tmp_path / "half.pth"))
    assert code == 1
    assert "half.pth" in line


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"args": ["--model", "deit"]}, ["'args' of", "must be a dict", "got a list"]),
        ({"args": {"input_size": "16"}}, ["height and width in pixels, got '16'"]),
        ({"args": {"input_size": [3, 16, 16]}}, ["height and width in pixels, got [3, 16, 16]"]),
        ({"args": {"input_size": [16, None]}}, ["height and width in pixels, got [16, None]"]),
        ({"args": {"input_size": 0}}, ["height and width in pixels, got 0"]),
        ({"args": {"input_size": 20}}, ["5 x 5 patches, as its image size is 20 x 20, got 16"]),
        ({"head.weight": 3.0}, ["must hold tensors", "a float under 'head.weight'"]),
        ({"pos_embed": None}, ["must hold tensors", "a NoneType under 'pos_embed'"]),
        ({"pos_embed": torch.zeros(3)}, ["pos_embed is (3,), the model's is (1, 17, 32)"]),
        ({"pos_embed": torch.zeros(1, 4, 32)}, ["4 x 4 patches", "16 x 16, got 3"]),
    ],
    ids=[
        *("args", "size-text", "size-three", "size-none", "size-zero", "size-other"),
        *("head-number", "positions-none", "positions-1-d", "positions-few"),
    ],
)
def test_checkpoint_with_wrong_content_is_refused(
    changes, words, flags, trained, tmp_path, failure
):
    content = torch.load(trained / "checkpoint.pth", weights_only=True)
    target = content if "args" in changes else content["model"]
    target |= changes
    torch.save(content, tmp_path / "odd.pth")
    code, line = failure(*flags, "--finetune", str(tmp_path / "odd.pth"))
    assert code == 1
    assert all(word in line for word in words), line


def test_missing_checkpoint_is_named(flags, failure):
    code, line = failure(*flags, "--resume", "nowhere.pth")
    assert code == 1
    assert "nowhere.pth" in line


def test_checkpoint_of_another_model_lists_what_does_not_fit(flags, trained, failure):
    checkpoint = str(trained / "checkpoint.pth")
    code, line = failure(*flags, "--rpe", "rpe-1.9-product-ctx-1-k", "--resume", checkpoint)
    assert code == 1
    assert "4 unexpected: blocks.*.attn.rpe_q.lookup_table_weight" in line
    assert line.endswith("the checkpoint has iRPE on q, k, v, the model on k")


def test_checkpoint_of_another_class_count_is_refused(flags, trained, tmp_path, failure):
    content = torch.load(trained / "checkpoint.pth", weights_only=True)
    content["model"]["head.weight"] = torch.zeros(7, 32)
    content["model"]["head.bias"] = torch.zeros(7)
    torch.save(content, tmp_path / "seven.pth")
    code, line = failure(*flags, "--eval", "--resume", str(tmp_path / "seven.pth"))
    assert code == 1
    assert "head.weight is (7, 32), the model's is (10, 32)" in line
    assert line.endswith("the checkpoint has 7 class outputs, the model 10")


def test_training_cannot_resume_from_weights_alone(flags, trained, tmp_path, failure):
    content = torch.load(trained / "checkpoint.pth", weights_only=True)
    torch.save({"model": content["model"]}, tmp_path / "weights.pth")
    code, line = failure(*flags, "--resume", str(tmp_path / "weights.pth"))
    assert code == 1
    assert "--finetune" in line


def test_resuming_in_mid_epoch_with_another_batch_size_is_refused(
    flags, trained, tmp_path, failure
):
    content = torch.load(trained / "checkpoint.pth", weights_only=True)
    torch.save(content | {"epoch": 0, "step": 5}, tmp_path / "middle.pth")
    run = ["--batch_size", "32", "--resume", str(tmp_path / "middle.pth")]
    code, line = failure(*flags, *run)
    assert code == 1
    assert "64" in line
    assert "32" in line


def test_loss_that_is_not_finite_stops_the_run_and_saves_the_batch(flags, tmp_path, failure):
    huge = ("--lr", "1000", "--weight_decay", "1000", "--opt", "sgd", "--epochs", "9")
    code, line = failure(*flags, *huge, "--output_dir", str(tmp_path))
    assert code == 1
    assert "not finite" in line or "nan" in line
    assert (tmp_path / "nonfinite_rank0.pth").exists()
