"""Instance masks: published names, attention maps, mask head, frozen detectors."""

import pytest
import torch

from detection.build import build_model, build_network
from detection.config import parse_args
from detection.segmentation import AttentionMap, MaskHead
from irpe_core import CheckpointError
from tests.detection.models import SMALL, config, images_of, network
from tests.recipes import fill, golden_json

# Shapes of the published DETR-ResNet50 panoptic model.
PUBLISHED = {
    "bbox_attention.q_linear": (256, 256),
    "bbox_attention.k_linear": (256, 256),
    "mask_head.lay1": (264, 264, 3, 3),
    "mask_head.gn1": (264,),
    "mask_head.lay2": (128, 264, 3, 3),
    "mask_head.gn2": (128,),
    "mask_head.lay3": (64, 128, 3, 3),
    "mask_head.gn3": (64,),
    "mask_head.lay4": (32, 64, 3, 3),
    "mask_head.gn4": (32,),
    "mask_head.lay5": (16, 32, 3, 3),
    "mask_head.gn5": (16,),
    "mask_head.out_lay": (1, 16, 3, 3),
    "mask_head.adapter1": (128, 1024, 1, 1),
    "mask_head.adapter2": (64, 512, 1, 1),
    "mask_head.adapter3": (32, 256, 1, 1),
}


def test_state_dict_has_the_published_keys_shapes_and_order():
    model = build_network(config("--masks"))
    expected = [
        (f"detr.{name}", tuple(shape))
        for name, shape, _ in golden_json("detr")["configs"]["none"]["state_dict"]
    ]
    for name, shape in PUBLISHED.items():
        expected += [(f"{name}.weight", shape), (f"{name}.bias", shape[:1])]
    assert [(name, tuple(value.shape)) for name, value in model.state_dict().items()] == expected
    assert all(model.mask_head.get_submodule(f"gn{i}").num_groups == 8 for i in range(1, 6))


@pytest.mark.parametrize(
    ("changes", "stride"),
    [
        ({}, 2),
        ({"backbone": "resnet18"}, 4),
        ({"backbone": "resnet18", "backbone_stride": 16}, 2),
        ({"backbone": "resnet50", "dilation": True}, 4),
    ],
    ids=["small", "resnet18", "stride-16", "dc5"],
)
def test_masks_have_the_resolution_of_the_finest_level(changes, stride):
    model = build_network(config(SMALL, masks=True, **changes)).eval()
    with torch.no_grad():
        outputs = model(*images_of((64, 80), (48, 96)))
    assert outputs["pred_masks"].shape == (2, 7, 64 // stride, 96 // stride)
    assert outputs["pred_masks"].isfinite().all()


def test_boxes_equal_those_of_the_detector():
    images, mask = images_of((64, 80), (48, 96))
    model = network(f"{SMALL} --masks")
    with torch.no_grad():
        outputs, expected = model(images, mask), model.detr(images, mask)
    assert torch.equal(outputs["pred_boxes"], expected["pred_boxes"])
    assert len(outputs["aux_outputs"]) == len(expected["aux_outputs"])


def test_attention_is_zero_on_padding_and_sums_to_one_over_heads_and_tokens():
    attend = fill(AttentionMap(12, 3))
    objects, memory = torch.randn(2, 5, 12), torch.randn(2, 12, 4, 6)
    mask = torch.zeros(2, 4, 6, dtype=torch.bool)
    mask[1, :, 3:] = True
    maps = attend(objects, memory, mask)
    assert maps.shape == (2, 5, 3, 4, 6)
    assert not maps[1, ..., 3:].any()
    torch.testing.assert_close(maps.sum((2, 3, 4)), torch.ones(2, 5))
    q, k = attend.q_linear(objects), attend.k_linear(memory.movedim(1, -1))
    products = torch.stack(
        [torch.einsum("bqc,bhwc->bqhw", q[..., i : i + 4], k[..., i : i + 4]) for i in (0, 4, 8)], 2
    )
    expected = (products / 2).masked_fill(mask[:, None, None], -torch.inf)
    expected = expected.exp() / expected.exp().sum((2, 3, 4), keepdim=True)
    torch.testing.assert_close(maps, expected)


def test_the_mask_of_an_object_does_not_depend_on_the_others():
    head = fill(MaskHead(34, 32, (8, 6, 4)))
    features, maps = torch.randn(2, 32, 3, 4), torch.rand(2, 5, 2, 3, 4)
    levels = [torch.randn(2, 8, 6, 8), torch.randn(2, 6, 11, 15), torch.randn(2, 4, 21, 30)]
    with torch.no_grad():
        masks = head(features, maps, levels)
        assert masks.shape == (2, 5, 21, 30)
        for image in range(2):
            one = slice(image, image + 1)
            for query in (0, 3):
                alone = head(
                    features[one], maps[one, query : query + 1], [level[one] for level in levels]
                )
                torch.testing.assert_close(alone[0, 0], masks[image, query], rtol=1e-4, atol=1e-5)


def test_frozen_weights_are_loaded_and_only_masks_are_trained(tmp_path):
    detector = network()
    path = tmp_path / "detector.pth"
    torch.save({"model": detector.state_dict()}, path)
    flags = ["--backbone_weights", "none", *SMALL.split(), "--masks", "--frozen_weights", str(path)]
    model, criterion, postprocessors = build_model(parse_args(flags))
    assert sorted(postprocessors) == ["bbox", "segm"]
    assert {"loss_mask", "loss_dice"} < set(criterion.weight_dict)
    for name, value in detector.state_dict().items():
        assert torch.equal(value, model.detr.state_dict()[name])
    trained = {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"bbox_attention", "mask_head"}
    statistics = {n: b.clone() for n, b in model.named_buffers()}
    model.train()(*images_of((64, 80)))
    assert all(torch.equal(b, statistics[n]) for n, b in model.named_buffers())
    other = parse_args([*flags, "--num_classes", "9"])
    with pytest.raises(CheckpointError, match="2 wrongly shaped: class_embed"):
        build_model(other)
