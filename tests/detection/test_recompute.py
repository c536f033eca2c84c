"""Gradient checkpointing of the detector: the same gradients and statistics, less memory."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from detection.build import build_model, create_ema
from detection.main import main
from tests.detection.models import SMALL, config, images_of
from tests.recipes import fill

RPE = f"{SMALL} --enc_rpe2d rpe-2.0-product-ctx-1-qkv --dropout 0.3"


def trained_step(flags: str, *, enable: bool) -> tuple[dict, dict, int]:
    """Return gradients, buffers and bytes stored for the backward pass, after one step."""
    model = fill(build_model(config(flags))[0]).train()
    model.set_grad_checkpointing(enable)
    images, mask = images_of((64, 80), (48, 96))
    stored: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        stored[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(1)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = model(images, mask)
        layers = [outputs, *outputs["aux_outputs"]]
        values = [x for layer in layers for x in layer.values() if isinstance(x, torch.Tensor)]
    sum(value.square().mean() for value in values).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return gradients, dict(model.named_buffers()), sum(stored.values())


@pytest.mark.parametrize(
    "flags",
    [f"{RPE} --backbone_norm frozen", f"{RPE} --backbone_norm frozen --pre_norm --masks", RPE],
    ids=["frozen norms", "pre-norm and masks", "trained norms"],
)
def test_gradients_and_statistics_equal_those_without(flags):
    plain, buffers, size = trained_step(flags, enable=False)
    gradients, same_buffers, smaller_size = trained_step(flags, enable=True)
    assert gradients.keys() == plain.keys()
    for name, gradient in plain.items():
        assert torch.equal(gradient, gradients[name]), name
    for name, buffer in buffers.items():
        assert torch.equal(buffer, same_buffers[name]), name
    assert smaller_size < size


def test_blocks_of_a_frozen_backbone_are_recomputed_and_trained_norms_are_not():
    for norm, recomputes in (("frozen", True), ("batch", False)):
        model = build_model(config(f"{SMALL} --backbone_norm {norm}"))[0]
        model.set_grad_checkpointing()
        assert model.backbone[0].grad_checkpointing == recomputes


def test_a_run_with_checkpointing_and_ema_warm_up_has_the_weights_of_one_without(flags, tmp_path):
    run = [*flags, "--epochs", "1", "--model_ema", "--model_ema_warmup", "--output_dir"]
    main([*run, str(tmp_path / "plain")])
    parts = [*run, str(tmp_path / "parts"), "--grad_checkpointing"]
    main([*parts, "--max_steps", "3"])
    main([*parts, "--auto_resume"])
    for name in ("model", "model_ema"):
        plain, other = (
            torch.load(tmp_path / run / "checkpoint.pth", weights_only=True)[name]
            for run in ("plain", "parts")
        )
        assert not [key for key in plain if not torch.equal(plain[key], other[key])]


def test_the_warm_up_of_the_ema_is_off_by_default():
    for flags, warms_up in (([], False), (["--model_ema_warmup"], True)):
        options = config(" ".join([SMALL, "--model_ema", *flags]))
        assert create_ema(options, build_model(options)[0], None).use_warmup == warms_up
