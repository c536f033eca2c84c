"""Backbones: levels, strides, norms, weights, and frozen stages."""

import pytest
import torch
import torchvision

from detection import backbone as backbone_module
from detection.backbone import build_backbone
from detection.config import parse_args
from irpe_core import CheckpointError
from tests.detection.models import config
from tests.recipes import fill, golden_json


@pytest.mark.parametrize(
    ("flags", "strides", "channels"),
    [
        ("--backbone resnet18", (4, 8, 16, 32), (64, 128, 256, 512)),
        ("--backbone resnet50", (4, 8, 16, 32), (256, 512, 1024, 2048)),
        ("--backbone resnet50 --dilation", (4, 8, 16, 16), (256, 512, 1024, 2048)),
        ("--backbone resnet34", (2, 4, 8, 16), (64, 64, 128, 256)),
        ("--backbone small", (2, 4, 8, 16), (16, 32, 64, 128)),
    ],
    ids=["resnet18", "resnet50", "dc5", "stride-16", "small"],
)
def test_levels_have_their_strides_and_channels(flags, strides, channels):
    stride = 16 if strides[-1] == 16 and "--dilation" not in flags else 32
    backbone = build_backbone(config(flags, backbone_stride=stride)).eval()
    assert backbone.channels[-4:] == channels
    with torch.no_grad():
        features = backbone(torch.randn(1, 3, 64, 96), levels=4)
        (last,) = backbone(torch.randn(1, 3, 33, 65))
    assert [tuple(f.shape[1:]) for f in features] == [
        (c, 64 // s, 96 // s) for c, s in zip(channels, strides, strict=True)
    ]
    assert last.shape[2:] == (-(-33 // strides[-1]), -(-65 // strides[-1]))


def test_dilation_keeps_the_published_names_and_shapes():
    body = build_backbone(config("--dilation")).state_dict()
    published = {
        name.removeprefix("backbone.0."): shape
        for name, shape, _ in golden_json("detr")["configs"]["none"]["state_dict"]
        if name.startswith("backbone.0.")
    }
    assert {name: list(value.shape) for name, value in body.items()} == published


@pytest.mark.parametrize("norm", ["frozen", "batch"])
def test_a_file_of_an_imagenet_classifier_loads_without_its_head(norm, tmp_path):
    classifier = fill(torchvision.models.resnet18())
    path = tmp_path / "resnet18.pth"
    torch.save(classifier.state_dict(), path)
    flags = f"--backbone resnet18 --backbone_norm {norm} --backbone_weights {path}"
    for stride in (32, 16):
        own = build_backbone(config(flags, backbone_stride=stride)).body.state_dict()
        assert any(name.startswith("layer4") for name in own) == (stride == 32)
        for name, value in own.items():
            assert torch.equal(value, classifier.state_dict()[name]), name


def test_weights_that_do_not_fit_or_do_not_exist_are_refused_in_one_sentence(tmp_path):
    path = tmp_path / "resnet18.pth"
    torch.save(torchvision.models.resnet18().state_dict(), path)
    for source, message in ((path, "the checkpoint does not fit Sequential"), ("no", "not exist")):
        with pytest.raises(CheckpointError, match=message):
            build_backbone(parse_args(["--backbone_weights", str(source)]))


def test_imagenet_selects_the_first_weights_of_torchvision(monkeypatch):
    sources = []

    def load(source: str) -> dict:
        sources.append(source)
        return {"model": torchvision.models.resnet18().state_dict()}

    monkeypatch.setattr(backbone_module, "load_checkpoint", load)
    build_backbone(parse_args(["--backbone", "resnet18"]))
    assert sources == ["https://download.pytorch.org/models/resnet18-f37072fd.pth"]
    build_backbone(parse_args(["--backbone", "resnet18"]), load=False)
    assert len(sources) == 1


@pytest.mark.parametrize(
    ("flags", "trained"),
    [
        ("", {"layer2", "layer3", "layer4"}),
        ("--lr_backbone 0", set()),
        ("--backbone_norm batch", {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"}),
        ("--backbone_weights none", {"layer2", "layer3", "layer4"}),
        ("--backbone_weights none --lr_backbone 0", set()),
    ],
    ids=["published", "lr-0", "batch-norm", "no-weights", "no-weights-lr-0"],
)
def test_trained_stages_depend_on_norm_and_learning_rate(flags, trained):
    backbone = build_backbone(parse_args(["--backbone", "resnet18", *flags.split()]), load=False)
    names = {n.split(".")[1] for n, p in backbone.named_parameters() if p.requires_grad}
    assert names == trained


@pytest.mark.parametrize("lr", ["0", "1e-5"])
def test_a_frozen_backbone_keeps_its_statistics(lr):
    flags = f"--backbone small --backbone_norm batch --lr_backbone {lr}"
    backbone = build_backbone(config(flags)).train()
    before = backbone.body.bn1.running_mean.clone()
    backbone(torch.randn(2, 3, 32, 32))
    assert torch.equal(backbone.body.bn1.running_mean, before) == (lr == "0")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"backbone": "resnet18", "dilation": True},
            "with dilation, got 'resnet18'",
        ),
        (
            {"backbone": "small", "dilation": True},
            "with dilation, got 'small'",
        ),
        (
            {"dilation": True, "backbone_stride": 16},
            "backbone_stride must be 32 with dilation",
        ),
        (
            {"backbone": "small", "backbone_weights": "imagenet"},
            "backbone_weights must be none",
        ),
    ],
    ids=["basic-blocks", "small", "stride-16", "weights"],
)
def test_contradicting_options_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        build_backbone(config("", **changes))
