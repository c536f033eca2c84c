"""The published models behave in timm as its own vision transformers do."""

import copy
import warnings
from pathlib import Path

import pytest
import timm
import torch
from timm.models import get_pretrained_cfg, save_for_hf
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

import classification.models
from classification.models import PUBLISHED, VisionTransformerIRPE
from irpe_core import CheckpointError
from tests.recipes import fill

NAMES = list(PUBLISHED)
TINY = "deit_tiny_patch16_224_ctx_product_50_shared_k"
QKV = "deit_small_patch16_224_ctx_product_50_shared_qkv"
CROSS = "deit_small_patch16_224_ctx_cross_56_shared_k"
SMALL = {"embed_dim": 32, "depth": 3, "num_heads": 2, "img_size": (32, 48)}
IMAGES = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))


def small(name: str = TINY, **options) -> nn.Module:
    return fill(timm.create_model(name, **{**SMALL, **options}).eval())


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """Return a checkpoint of a whole model of 1000 classes, as the trainer writes it."""
    path = tmp_path_factory.mktemp("timm") / "own.pth"
    torch.save({"model": fill(timm.create_model(TINY, depth=2)).state_dict()}, path)
    return path


def pretrained(weights: Path, name: str = TINY, overlay: dict | None = None, **options):
    overlay = {"file": str(weights)} | (overlay or {})
    return timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=overlay, depth=2, **options
    )


@pytest.mark.parametrize("name", NAMES)
def test_forward_and_backward_reach_every_parameter(name):
    model = small(name, num_classes=7).train()
    out = model(IMAGES)
    assert out.shape == (2, 7)
    # The tables of the last block only reach the patches, which the logits do not depend on.
    (out.mean() + model.forward_features(IMAGES).square().mean()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_the_default_configuration_describes_the_model(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    config = model.default_cfg
    assert type(model) is VisionTransformerIRPE
    assert config is model.pretrained_cfg
    assert config["architecture"] == name
    assert config["input_size"][1:] == model.patch_embed.img_size
    state = model.state_dict()
    assert state[f"{config['classifier']}.weight"].shape[0] == config["num_classes"]
    assert state[f"{config['first_conv']}.weight"].shape[1] == config["input_size"][0]
    assert model.num_features == model.head_hidden_size == state["head.weight"].shape[1]
    with torch.device("meta"):
        assert timm.create_model(name).default_cfg is not config


@pytest.mark.parametrize("name", NAMES)
def test_the_classifier_can_be_reset_and_skipped(name):
    model = small(name)
    features = model.forward_features(IMAGES)
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, model.num_features)
    model.reset_classifier(0)
    assert torch.equal(model(IMAGES), pooled)
    model.reset_classifier(5, "avg")
    assert model(IMAGES).shape == (2, 5)
    assert torch.equal(small(name, num_classes=0)(IMAGES), pooled)


@pytest.mark.parametrize("name", NAMES)
def test_features_are_intermediate_outputs(name):
    model = small(name)
    final, maps = model.forward_intermediates(IMAGES)
    torch.testing.assert_close(final, model.forward_features(IMAGES))
    assert [tuple(m.shape) for m in maps] == [(2, 32, 2, 3)] * 3
    extractor = timm.create_model(name, features_only=True, out_indices=[0, 2], **SMALL)
    extractor.model.load_state_dict(model.state_dict(), strict=False)
    found = extractor.eval()(IMAGES)
    assert extractor.feature_info.channels() == [32, 32]
    torch.testing.assert_close(found, [maps[0], maps[2]])


@pytest.mark.parametrize("name", NAMES)
def test_torch_fx_traces_the_model(name):
    model = small(name)
    traced = torch.fx.symbolic_trace(model)
    images = IMAGES[:1]
    assert torch.equal(traced(images), model(images))
    assert "_attend" in {getattr(n.target, "__name__", "") for n in traced.graph.nodes}


def test_torchvision_extracts_features_with_trainable_tables():
    model = small(QKV).train()
    extractor = create_feature_extractor(model, ["blocks.1.attn", "norm"])
    found, expected = extractor(IMAGES), model.forward_features(IMAGES)
    assert torch.equal(found["norm"], expected)
    assert found["blocks.1.attn"].shape == (2, 7, 32)
    found["norm"].square().sum().backward()
    tables = [p for name, p in extractor.named_parameters() if "lookup_table" in name]
    assert len(tables) == 9
    assert all(p.grad.abs().max() > 0 for p in tables)


@pytest.mark.parametrize(
    "options",
    [
        {"class_token": False, "global_pool": "avg"},
        {"distilled": True},
        {"reg_tokens": 2},
        {"pos_embed": "none"},
        {"in_chans": 1},
        {"dynamic_img_size": True},
    ],
    ids=str,
)
def test_options_of_timm_reach_the_model(options):
    model = small(**options)
    images = IMAGES[:, : options.get("in_chans", 3)]
    if "dynamic_img_size" in options:
        images = images.transpose(2, 3)
    assert model(images).shape == (2, 1000)
    attentions = [block.attn for block in model.blocks]
    assert {attn.rpe_k.config.skip for attn in attentions} == {model.num_prefix_tokens}
    assert {attn.grid for attn in attentions} == {tuple(n // 16 for n in images.shape[2:])}
    assert torch.equal(copy.deepcopy(model)(images), model(images))


@pytest.mark.parametrize(
    "options",
    [
        {"num_classes": 0},
        {"num_classes": 3},
        {"in_chans": 1, "img_size": 96},
        {"global_pool": "avg"},
        {"patch_size": 8, "img_size": 112},
        {"features_only": True, "out_indices": [1]},
    ],
    ids=str,
)
def test_own_weights_are_adapted_to_the_options(weights, options):
    model = pretrained(weights, **options)
    assert "state_dict" not in model.pretrained_cfg
    model = getattr(model, "model", model)
    assert "state_dict" not in model.pretrained_cfg
    own, source = model.state_dict(), torch.load(weights)["model"]
    same = {key for key, x in own.items() if key in source and torch.equal(x, source[key])}
    changed = {
        "num_classes": {"head.weight", "head.bias"},
        "in_chans": {"patch_embed.proj.weight", "pos_embed"},
        "global_pool": {"fc_norm.weight", "fc_norm.bias"},
        "patch_size": {"patch_embed.proj.weight"},
        "features_only": set(),
    }[next(iter(options))]
    assert set(own) - same == changed & set(own)
    if "global_pool" in options:
        assert torch.equal(own["fc_norm.weight"], source["norm.weight"])
    if "in_chans" in options:
        kernel = source["patch_embed.proj.weight"].sum(1, keepdim=True)
        torch.testing.assert_close(own["patch_embed.proj.weight"], kernel)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distilled": True}, "1 missing: dist_token"),
        ({"num_classes": 3, "rpe": "rpe-1.9-product-ctx-1-qk"}, "missing: blocks.*rpe_q"),
        ({"num_classes": 3, "embed_dim": 96}, "192 channels wide, the model 96"),
    ],
    ids=["token", "table", "width"],
)
def test_weights_that_do_not_fit_are_refused(weights, options, message):
    with pytest.raises(CheckpointError, match=message):
        pretrained(weights, **options)


def test_a_rectangle_resamples_published_positions_and_keeps_own_ones(monkeypatch, tmp_path):
    """A grid of 7 x 28 has as many patches as the published one of 14 x 14."""
    size = (112, 448)
    source = fill(timm.create_model(TINY, depth=1)).state_dict()
    path = tmp_path / f"{TINY}.pth"
    torch.save({"model": source}, path)
    options = {"pretrained": True, "depth": 1, "img_size": size}
    published = timm.create_model(TINY, cache_dir=tmp_path, **options)
    assert not torch.equal(published.pos_embed, source["pos_embed"])
    torch.save({"model": source, "args": {"input_size": size}}, path)
    own = timm.create_model(TINY, pretrained_cfg_overlay={"file": str(path)}, **options)
    assert torch.equal(own.pos_embed, source["pos_embed"])
    assert torch.equal(published.norm.weight, own.norm.weight)


def test_every_source_of_weights_is_used(weights, tmp_path):
    source = torch.load(weights)["model"]

    def check(**overlay):
        model = timm.create_model(
            TINY, pretrained=True, pretrained_cfg_overlay=overlay, depth=2, cache_dir=tmp_path
        )
        assert all(torch.equal(x, source[key]) for key, x in model.state_dict().items())

    check(state_dict=source)
    check(file=str(weights))
    (tmp_path / "mine.pth").write_bytes(weights.read_bytes())
    check(url="https://example.invalid/mine.pth")  # in cache_dir already
    half = {key: x / 2 for key, x in source.items()}
    torch.save({"model": half, "model_ema": source}, tmp_path / "ema.pth")
    check(file=str(tmp_path / "ema.pth"))


def test_a_saved_folder_is_loaded_again(tmp_path):
    model = small(QKV, num_classes=7, distilled=True)
    save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(IMAGES), model(IMAGES))
    fewer = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=3)
    assert fewer.head_dist.weight.shape[0] == 3
    assert torch.equal(fewer.dist_token, model.dist_token)


def test_names_are_registered_with_their_module():
    assert set(PUBLISHED) <= set(timm.list_models(module="models"))
    released = {name for name in PUBLISHED if get_pretrained_cfg(name).url}
    assert set(timm.list_pretrained("*_ctx_*")) == released
    assert len(released) == 6
    with pytest.raises(RuntimeError, match=r"Invalid pretrained tag \(mine\)"):
        timm.create_model(f"{TINY}.mine")
    names = {}
    exec("from classification.models import *", names)
    assert set(PUBLISHED) <= set(names)
    assert names[TINY] is getattr(classification.models, TINY)
    assert names[TINY](**SMALL).default_cfg["architecture"] == TINY


@pytest.mark.parametrize("name", [TINY, QKV, CROSS])
def test_torch_jit_traces_the_model_for_any_batch(name):
    model = small(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, IMAGES)
    kinds = {node.kind() for node in traced.inlined_graph.nodes()}
    assert not any(kind.startswith(("rpe_ops", "irpe_core")) for kind in kinds)
    for images in (IMAGES, IMAGES[:1]):
        torch.testing.assert_close(traced(images), model(images))
    assert model.blocks[0].attn.grid == (2, 3)
    assert all(type(side) is int for side in model.blocks[0].attn.grid)


@pytest.mark.parametrize(
    ("name", "dynamo"), [(QKV, False), (CROSS, False), (QKV, True)], ids=["qkv", "cross", "dynamo"]
)
def test_torch_exports_the_model_to_onnx_for_any_batch(name, dynamo, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, path = small(name), str(tmp_path / "model.onnx")
    if dynamo:
        options = {"dynamic_shapes": ({0: torch.export.Dim("batch")},), "verbose": False}
    else:
        options = {"dynamic_axes": {"images": {0: "batch"}}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (IMAGES,), path, input_names=["images"], dynamo=dynamo, **options)
    session = onnxruntime.InferenceSession(path)
    for images in (IMAGES, IMAGES[:1]):
        (found,) = session.run(None, {"images": images.numpy()})
        torch.testing.assert_close(Tensor(found), model(images), rtol=1e-4, atol=1e-4)
