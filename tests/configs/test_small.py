"""Recipes for one GPU and for small data sets: they keep the published batch size, and they run."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from classification import config as classification
from classification.main import main as train_classifier
from datasets.embedded import write_digits
from datasets.scenes import SceneOptions, write_scenes
from detection import config as detection
from detection.main import main as train_detector

CONFIGS = Path(__file__).parents[2] / "configs"
TINY_CLASSIFIER = (
    "--model deit_tiny_patch16_224 --rpe rpe-1.9-product-ctx-1-qkv --input_size 16 --patch_size 4 "
    "--embed_dim 32 --depth 2 --num_heads 2 --mlp_ratio 2 --data_set DIGITS"
)
TINY_DETECTOR = (
    "--backbone small --backbone_weights none --backbone_norm batch --backbone_stride 16 "
    "--hidden_dim 16 --nheads 2 --dim_feedforward 32 --enc_layers 1 --dec_layers 2 "
    "--num_queries 8 --image_size 64"
)
SHORT = "--num_workers 0 --device cpu --max_steps 1 --no-val_sanity"


@pytest.mark.parametrize("memory", ["24gb", "8gb"])
@pytest.mark.parametrize(
    ("task", "parse_args", "total", "published"),
    [
        (
            "classification",
            classification.parse_args,
            1024,
            "deit_small_patch16_224_ctx_product_50_shared_qkv",
        ),
        ("detection", detection.parse_args, 16, "rpe-2.0-product-ctx-1-k_150_epochs"),
    ],
    ids=["classification", "detection"],
)
def test_one_gpu_has_the_published_recipe(task, parse_args, total, published, memory):
    recipe, other = (
        parse_args(["--config", str(CONFIGS / task / f"{name}.yaml")])
        for name in (f"one_gpu_{memory}", published)
    )
    assert recipe.batch_size * recipe.accumulate_steps == total
    how = ("batch_size", "accumulate_steps", "grad_checkpointing")
    assert recipe.model_copy(update={name: getattr(other, name) for name in how}) == other


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict]:
    """Return a function that trains a recipe with a tiny model, and returns its checkpoint."""
    folder = tmp_path_factory.mktemp("recipes")
    digits = write_digits(folder / "digits")
    scenes = write_scenes(folder / "scenes", SceneOptions(train=32, val=4))
    tasks = {
        "classification": (train_classifier, f"{TINY_CLASSIFIER} --data_path {digits}"),
        "detection": (train_detector, f"{TINY_DETECTOR} --coco_path {scenes}"),
    }

    def train(task: str, name: str, *flags: str) -> dict:
        main, tiny = tasks[task]
        output = folder / task / name
        config = CONFIGS / task / f"{name}.yaml"
        words = f"--config {config} {tiny} {SHORT} --output_dir {output}".split()
        main([*words, "--overwrite", *flags])
        return torch.load(output / "checkpoint.pth", weights_only=True) | {"folder": output}

    return train


@pytest.mark.parametrize(("task", "total"), [("classification", 1024), ("detection", 16)])
@pytest.mark.parametrize("memory", ["24gb", "8gb"])
def test_a_recipe_for_one_gpu_runs(task, total, memory, run):
    content = run(task, f"one_gpu_{memory}")
    assert content["images_per_step"] == total
    assert content["args"]["grad_checkpointing"] == (memory == "8gb")
    assert content["optimizer"]["state"][0]["step"] == 1


@pytest.mark.parametrize(("task", "total"), [("classification", 64), ("detection", 4)])
def test_a_recipe_for_fine_tuning_runs_from_a_checkpoint(task, total, run):
    start = run(task, "one_gpu_24gb")
    path = str(start["folder"] / "checkpoint.pth")
    content = run(task, "finetune", "--finetune", path)
    assert content["images_per_step"] == total
    assert content["evals_since_best"] == 0
    assert content["args"]["early_stop"] == 10
    # The warm-up of the EMA copies the weights at the first step.
    for name, value in content["model"].items():
        assert torch.equal(value, content["model_ema"][name]), name
    before = start["model"]
    moved = [name for name, x in content["model"].items() if not torch.equal(x, before[name])]
    assert any("lookup_table" in name for name in moved)
