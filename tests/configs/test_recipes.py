"""The recipe files: each shows a whole recipe, and equals what its trainer does by default."""

from pathlib import Path

import pytest
import yaml

from classification import config as classification
from detection import config as detection

CONFIGS = Path(__file__).parents[2] / "configs"
DEIT = CONFIGS / "classification" / "deit_recipe.yaml"
DETR = CONFIGS / "detection" / "detr_recipe.yaml"


@pytest.mark.parametrize(
    ("path", "parse_args", "differs"),
    [(DEIT, classification.parse_args, {"batch_size": 128}), (DETR, detection.parse_args, {})],
    ids=["deit", "detr"],
)
def test_a_recipe_is_what_the_trainer_does_by_default(path, parse_args, differs):
    default, recipe = parse_args([]), parse_args(["--config", str(path)])
    assert recipe == default.model_copy(update=differs)


# Options that the recipes do not use.
NOT_IN_DEIT = {
    *("momentum", "decay_epochs", "decay_rate", "patience_epochs", "cooldown_epochs"),
    *("lr_noise", "lr_noise_pct", "lr_noise_std", "cutmix_minmax", "resplit"),
    *("model_ema_force_cpu", "model_ema_warmup", "layer_decay"),
}
NOT_IN_DETR = {
    *("enc_rpe2d", "rpe_implementation", "num_classes", "masks", "frozen_weights", "finetune"),
    *("mask_loss_coef", "dice_loss_coef", "model_ema", "model_ema_decay", "model_ema_warmup"),
}


@pytest.mark.parametrize(
    ("path", "groups", "left_out"),
    [
        (DEIT, (classification.AugmentConfig, classification.OptimConfig), NOT_IN_DEIT),
        (
            DETR,
            (
                detection.BackboneConfig,
                detection.TransformerConfig,
                detection.StartConfig,
                detection.LossConfig,
                detection.OptimConfig,
            ),
            NOT_IN_DETR,
        ),
    ],
    ids=["deit", "detr"],
)
def test_a_recipe_leaves_no_option_of_its_groups_out(path, groups, left_out):
    shown = yaml.safe_load(path.read_text()).keys()
    options = {name for group in groups for name in group.__annotations__}
    assert shown & options == options - left_out
    assert left_out <= options
