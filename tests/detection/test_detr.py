"""The whole model: options, batches, precision, training."""

import pytest
import torch

from detection.build import build_model
from tests.detection.models import SMALL, config, images_of, network
from tests.detection.synthetic import targets

SPECS = ["rpe-1.9-product-ctx-1-k", "rpe-2.0-cross-ctx-0-qkv", "rpe-2.0-euc-bias-1-qk"]


def flat(outputs: dict) -> list[torch.Tensor]:
    layers = [outputs, *outputs.get("aux_outputs", [])]
    return [layer[name] for layer in layers for name in ("pred_logits", "pred_boxes")]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(
    "options", ["", "--pre_norm", "--position_embedding learned", "--position_embedding none"]
)
def test_outputs_have_the_right_shape_and_depend_on_irpe(options, spec):
    images, mask = images_of((64, 80), (48, 96))
    with torch.no_grad():
        outputs = network(f"{SMALL} {options} --enc_rpe2d {spec}")(images, mask)
        without = network(f"{SMALL} {options}")(images, mask)
    assert outputs["pred_logits"].shape == (2, 7, 6)
    assert outputs["pred_boxes"].shape == (2, 7, 4)
    assert all(value.min() > 0 and value.max() < 1 for value in flat(outputs)[1::2])
    assert len(outputs["aux_outputs"]) == 2
    assert (outputs["pred_logits"] - without["pred_logits"]).abs().max() > 1e-3
    assert "aux_outputs" not in network(f"{SMALL} {options} --no-aux_loss")(images, mask)


def test_an_image_has_the_same_outputs_alone_and_in_a_batch_of_its_size():
    images, mask = images_of((64, 80), (64, 80), (64, 80))
    # In float32 the rounding errors of the convolutions depend on the processor.
    images, detr = images.double(), network(f"{SMALL} --enc_rpe2d {SPECS[0]}").double()
    with torch.no_grad():
        together = flat(detr(images, mask))
        for i in range(3):
            for alone in (detr(images[i : i + 1], mask[i : i + 1]), detr(images[i : i + 1])):
                for one, batch in zip(flat(alone), together, strict=True):
                    torch.testing.assert_close(one[0], batch[i], rtol=0, atol=1e-10)


def test_heads_compute_in_the_data_type_of_their_weights_under_autocast():
    images, mask = images_of((64, 80), (48, 96))
    detr = network(f"{SMALL} --enc_rpe2d {SPECS[1]}")
    with torch.no_grad():
        expected = flat(detr(images, mask))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = flat(detr(images, mask))
    for actual, wanted in zip(outputs, expected, strict=True):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual, wanted, rtol=0.1, atol=0.15)
        # The outputs are not bfloat16 values.
        assert not torch.equal(actual.bfloat16().float(), actual)


def test_a_model_in_double_precision_has_outputs_in_double_precision():
    images, mask = images_of((64, 80), (48, 96))
    detr = network(f"{SMALL} --enc_rpe2d {SPECS[0]}")
    with torch.no_grad():
        expected = flat(detr(images, mask))
        outputs = flat(detr.double()(images.double(), mask))
    for actual, wanted in zip(outputs, expected, strict=True):
        assert actual.dtype == torch.float64
        torch.testing.assert_close(actual, wanted.double(), rtol=0, atol=1e-4)


def test_the_model_of_the_digit_scenes_has_558000_parameters():
    flags = (
        "--backbone small --backbone_norm batch --hidden_dim 64 --nheads 4 --dim_feedforward 256 "
        "--enc_layers 2 --dec_layers 2 --num_queries 15 --num_classes 10 --pre_norm --dropout 0 "
        "--enc_rpe2d rpe-2.0-product-ctx-1-k"
    )
    detr, _, _ = build_model(config(flags))
    assert round(sum(p.numel() for p in detr.parameters()) / 1000) == 558


@pytest.mark.parametrize("options", ["", "--masks"])
def test_all_parameters_get_gradients_from_the_losses(options):
    detr, criterion, _ = build_model(config(f"{SMALL} {options} --enc_rpe2d {SPECS[1]}"))
    images, mask = images_of((64, 80), (48, 96))
    objects = targets(3, 1)
    for target in objects:
        target["masks"] = torch.rand(len(target["labels"]), 64, 96) < 0.5
    losses = criterion(detr(images, mask), objects)
    sum(losses[name] * w for name, w in criterion.weight_dict.items() if name in losses).backward()
    without = [name for name, p in detr.named_parameters() if p.grad is None]
    assert not without
    assert all(p.grad.isfinite().all() for p in detr.parameters())


def test_loss_weights_follow_the_options_for_every_layer():
    _, criterion, _ = build_model(config(f"{SMALL} --cls_loss_coef 5 --giou_loss_coef 3"))
    names = [f"loss_{n}{layer}" for layer in ("", "_0", "_1") for n in ("ce", "bbox", "giou")]
    assert list(criterion.weight_dict) == names
    assert [criterion.weight_dict[name] for name in names] == [5, 5, 3] * 3
    assert criterion.num_classes == 5


def test_the_model_compiles_to_one_graph():
    detr = network(f"{SMALL} --enc_layers 1 --dec_layers 1 --enc_rpe2d {SPECS[0]}")
    images, mask = images_of((64, 80), (48, 96))
    torch.compiler.reset()
    compiled = torch.compile(detr, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        actual, wanted = compiled(images, mask), detr(images, mask)
    torch.testing.assert_close(flat(actual), flat(wanted), rtol=1e-4, atol=1e-4)
