"""add_irpe on the families of timm's vision transformers: equal outputs, or refused."""

from collections import OrderedDict

import pytest
import timm
import torch
from timm.layers import Attention
from torch import Tensor, nn

from irpe_core import RPEAttention, add_irpe, load_weights
from tests.recipes import fill

SPEC = "rpe-1.9-product-ctx-1-qkv"
GRID = (2, 4)
# timm's name, number of tokens before the grid, and options in addition to the small sizes.
RES_POST = {"block_fn": timm.models.vision_transformer.ResPostBlock}
FAMILIES = {
    "vit": ("vit_tiny_patch16_224", 1, {}),
    "augreg": ("vit_small_patch32_224.augreg_in21k", 1, {}),
    "deit": ("deit_tiny_patch16_224.fb_in1k", 1, {}),
    "deit-distilled": ("deit_tiny_distilled_patch16_224", 2, {}),
    "deit3": ("deit3_small_patch16_224.fb_in1k", 1, {}),
    "dinov2": ("vit_small_patch14_dinov2", 1, {}),
    "dinov2-registers": ("vit_small_patch14_reg4_dinov2.lvd142m", 5, {}),
    "clip": ("vit_base_patch32_clip_224.openai", 1, {}),
    "clip-quickgelu": ("vit_base_patch16_clip_quickgelu_224", 1, {}),
    "siglip": ("vit_base_patch16_siglip_224.webli", 0, {}),
    "gap": ("vit_medium_patch16_gap_240", 0, {}),
    "qk-norm-register": ("vit_so150m2_patch16_reg1_gap_256", 1, {}),
    "registers-gap": ("vit_betwixt_patch16_reg4_gap_256", 4, {}),
    "flexivit": ("flexivit_small", 1, {}),
    "hybrid": ("vit_tiny_r_s16_p8_224", 1, {}),
    "post-norm": ("vit_tiny_patch16_224", 1, RES_POST),
    "gated": ("vit_tiny_patch16_224", 1, {}),
    "parallel": ("vit_small_patch16_18x2_224", 1, {}),
    "eva": ("eva_giant_patch14_224.clip_ft_in1k", 1, {}),
    "eva-three-projections": ("eva_giant_patch14_224", 1, {"qkv_fused": False}),
    "eva-inner-norm": ("eva_giant_patch14_clip_224", 1, {"scale_attn_inner": True}),
}


def build(family: str) -> nn.Module:
    """Build a small model of the family with a grid of 2 x 4 tokens."""
    name, _, options = FAMILIES[family]
    patch = 32 if "patch32" in name else 14 if "patch14" in name else 16
    size = (GRID[0] * patch, GRID[1] * patch)
    small = {"embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3, "img_size": size}
    model = timm.create_model(name, pretrained=False, **small, **options)
    if family == "gated":
        for block in model.blocks:
            block.attn = Attention(16, 2, qkv_bias=True, gated=True)
    return fill(model.double())


def images(model: nn.Module) -> Tensor:
    return torch.randn(2, 3, *model.patch_embed.img_size, dtype=torch.float64)


def tables(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if "lookup_table" in name}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_computes_the_same_until_its_tables_are_trained(family, training):
    model = build(family).train(training)
    x, names = images(model), set(model.state_dict())
    before = model(x), model.forward_features(x)
    add_irpe(model, SPEC)
    torch.testing.assert_close((model(x), model.forward_features(x)), before)
    attentions = [m for m in model.modules() if isinstance(m, RPEAttention)]
    assert {attn.rpe_k.config.skip for attn in attentions} == {FAMILIES[family][1]}
    assert {attn.grid for attn in attentions} == {model.patch_embed.grid_size}
    assert set(model.state_dict()) - names == set(tables(model))
    assert set(model.state_dict()) >= names
    # The loss is a sum over all tokens. Logits depend only on the class token in the last layer,
    # whose pairs are all in one bucket and give no gradient.
    optimizer = torch.optim.SGD(tables(model).values(), lr=0.1)
    (model.forward_features(x) * before[1].cos()).sum().backward()
    assert len(tables(model)) == 3 * len(attentions) == (12 if family == "parallel" else 6)
    assert all(table.grad.abs().max() > 1e-6 for table in tables(model).values())
    optimizer.step()
    assert (model.forward_features(x) - before[1]).abs().max() > 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_an_equipped_family_loads_its_own_and_the_original_weights(family, tmp_path):
    original = build(family).eval()
    x, model = images(original), add_irpe(build(family).eval(), SPEC)
    missing = model.load_state_dict(original.state_dict(), strict=False).missing_keys
    assert set(missing) == set(tables(model))
    fill(model)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    fresh = add_irpe(build(family).eval(), SPEC)
    assert not torch.equal(fresh(x), model(x))
    load_weights(fresh, torch.load(tmp_path / "model.pth"))
    assert torch.equal(fresh(x), model(x))


@pytest.mark.parametrize("family", ["eva", "hybrid", "siglip"])
def test_a_family_follows_its_images(family):
    name, _, options = FAMILIES[family]
    small = {"embed_dim": 16, "depth": 1, "num_heads": 2, "dynamic_img_size": True}
    model = add_irpe(timm.create_model(name, **small, **options), SPEC)
    side = model.patch_embed.feat_ratio()
    for grid in [(3, 5), (5, 3)]:
        model(torch.randn(1, 3, grid[0] * side, grid[1] * side))
        assert model.blocks[0].attn.grid == grid


def test_the_pooling_attention_of_siglip_is_not_replaced():
    model = build("siglip")
    pooling = model.attn_pool
    add_irpe(model, SPEC)
    assert model.attn_pool is pooling
    assert not any("attn_pool" in name for name in tables(model))


BIAS = "already adds a relative position bias"
ROPE = r"already rotates queries and keys by position \(RoPE\)"
WINDOWS = r"its layers\.0\.blocks\.0\.attn .* attends within windows, not over the whole grid"
ANOTHER = "is not timm's Attention or timm's EvaAttention or nn.MultiheadAttention"
REFUSED = {
    "beit": ("beit_base_patch16_224", {}, rf"blocks\.0\.attn \(timm\.models\.beit.* {BIAS}"),
    "beit-v2": ("beitv2_base_patch16_224", {}, BIAS),
    "relpos": ("vit_relpos_small_patch16_224", {}, BIAS),
    "shared-relpos": ("vit_srelpos_small_patch16_224", {}, BIAS),
    "sam": ("samvit_base_patch16", {}, BIAS),
    "eva02": ("eva02_tiny_patch14_224", {}, f"Eva {ROPE}"),
    "dinov3": ("vit_small_patch16_dinov3", {}, ROPE),
    "swin": ("swin_tiny_patch4_window7_224", {}, WINDOWS),
    "swin-v2": ("swinv2_tiny_window8_256", {}, WINDOWS),
    "talking-heads": ("cait_xxs24_224", {}, rf"cait\.TalkingHeadAttn\) {ANOTHER}"),
    "cross-covariance": ("xcit_nano_12_p16_224", {}, rf"xcit\.XCA\) {ANOTHER}"),
    "gated-positional": ("convit_tiny", {}, rf"convit\.GPSA\) {ANOTHER}"),
    "differential": ("vit_tiny_patch16_224", {"attn_layer": "diff"}, f"DiffAttention.* {ANOTHER}"),
    "in-the-block": ("vit_base_patch16_xp_224", {}, "its blocks are ParallelScalingBlock"),
    "pyramid": ("pit_ti_224", {}, r"transformers\.0\.blocks\.0\.attn .*in layers="),
    "no-grid": ("naflexvit_base_patch16_gap", {}, "no patch_embed that gives the grid: pass grid="),
    "drops-patches": (
        "vit_tiny_patch16_224",
        {"patch_drop_rate": 0.5},
        "build .*patch_drop_rate=0",
    ),
    "convolutions": ("resnet18", {}, "no layers with self_attn in ResNet"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_family_that_computes_something_else_is_refused_and_unchanged(case):
    name, options, message = REFUSED[case]
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False, **options)
    modules = list(model.named_modules())
    with pytest.raises(ValueError, match=message) as refusal:
        add_irpe(model, SPEC)
    assert "\n" not in str(refusal.value)
    assert list(model.named_modules()) == modules
    assert not any(module._forward_hooks for _, module in modules)


def test_the_error_for_a_wrapped_model_names_the_model_to_pass():
    inner = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=24)
    model = nn.Sequential(OrderedDict(net=inner, head=nn.Linear(1000, 2)))
    with pytest.raises(ValueError, match="call it on its net, which is a VisionTransformer"):
        add_irpe(model, "rpe-1.9-product-ctx-1-k")
    with pytest.raises(ValueError, match=r"is part of net, .* call add_irpe on it"):
        add_irpe(model, "rpe-1.9-product-ctx-1-k", layers=["net.blocks.0.attn"])
    assert type(inner.blocks[0].attn).__name__ == "Attention"
    add_irpe(model.net, "rpe-1.9-product-ctx-1-k")
