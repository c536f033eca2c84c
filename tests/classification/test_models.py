"""Models without recorded values: options, rectangles, position embeddings, timm."""

import pytest
import timm
import torch
from torch import nn

from classification.finetune import adapt_weights
from classification.models import PUBLISHED, build_model
from irpe_core import CheckpointError, RPEAttention, load_weights
from tests.recipes import fill

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 4}
SPEC = "rpe-1.9-product-ctx-1-qkv"


def small(name: str = "deit_tiny_patch16_224", size=(16, 16), **options) -> nn.Module:
    options = {"rpe": SPEC} | options
    return build_model(name, num_classes=10, input_size=size, **SMALL, **options).eval()


def test_published_models_are_listed_by_timm():
    assert set(PUBLISHED) <= set(timm.list_models("deit_*"))


def test_rectangle_has_other_buckets_than_a_square_with_as_many_patches():
    """The original uses the buckets of a 6 x 6 grid for a 4 x 9 grid, without a warning."""
    wide = fill(small(size=(16, 36)))
    square = fill(small(size=(24, 24)))
    load_weights(square, wide.state_dict())
    tokens = torch.randn(1, 37, 32, generator=torch.Generator().manual_seed(0))
    assert wide.blocks[0].attn.grid == (4, 9)
    assert square.blocks[0].attn.grid == (6, 6)
    assert not torch.allclose(wide.blocks(tokens), square.blocks(tokens), atol=1e-3)


def test_grid_follows_images_of_a_dynamic_size():
    model = fill(small(dynamic_img_size=True))
    fixed = small(size=(16, 36))
    load_weights(fixed, adapt_weights(model.state_dict(), fixed, (16, 16)))
    images = torch.randn(2, 3, 16, 36)
    with torch.no_grad():
        torch.testing.assert_close(model(images), fixed(images))


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "vit_tiny_patch16_224"])
def test_new_irpe_does_not_change_the_output(name):
    torch.manual_seed(0)
    plain = small(name, rpe="")
    torch.manual_seed(0)
    with_irpe = small(name)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(with_irpe(images), plain(images))


def test_irpe_skips_the_distillation_token():
    model = small(distillation_token=True)
    assert model.blocks[0].attn.rpe_k.config.skip == 2
    model.train().set_distilled_training(True)
    of_class, of_distillation = model(torch.randn(2, 3, 16, 16))
    assert of_class.shape == of_distillation.shape == (2, 10)


def test_published_model_accepts_a_distillation_token():
    name = "deit_tiny_patch16_224_ctx_product_50_shared_k"
    model = build_model(name, num_classes=10, input_size=(32, 32), distillation_token=True)
    assert model.num_prefix_tokens == 2
    assert model.blocks[0].attn.rpe_k.lookup_table_weight.shape == (1, 64, 50)


@pytest.mark.parametrize("distillation_token", [False, True])
def test_without_position_embedding_and_irpe_the_order_of_patches_has_no_effect(distillation_token):
    model = fill(small(rpe="", abs_pos_embed=False, distillation_token=distillation_token))
    assert "pos_embed" not in model.state_dict()
    images = torch.randn(1, 3, 16, 16)
    halves = torch.cat([images[..., 8:], images[..., :8]], -1)
    with torch.no_grad():
        torch.testing.assert_close(model(images), model(halves))


@pytest.mark.parametrize("distillation_token", [False, True])
def test_with_irpe_alone_the_order_of_patches_has_an_effect(distillation_token):
    model = fill(small(abs_pos_embed=False, distillation_token=distillation_token))
    images = torch.randn(1, 3, 16, 16)
    halves = torch.cat([images[..., 8:], images[..., :8]], -1)
    with torch.no_grad():
        assert not torch.allclose(model(images), model(halves), atol=1e-3)


def test_pretrained_is_refused_without_a_published_checkpoint():
    with pytest.raises(ValueError, match="no published checkpoint"):
        timm.create_model("deit_small_patch16_224_ctx_euc_20_shared_k", pretrained=True)


def test_pretrained_uses_the_file_name_of_the_published_url(monkeypatch, tmp_path):
    name = "deit_tiny_patch16_224_ctx_product_50_shared_k"
    weights = fill(timm.create_model(name)).state_dict()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    torch.save({"model": weights}, cache / f"{name}.pth")
    model = timm.create_model(name, pretrained=True)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    ten = timm.create_model(name, pretrained=True, num_classes=10)
    assert torch.equal(ten.blocks[3].attn.qkv.weight, weights["blocks.3.attn.qkv.weight"])


def test_image_size_and_patch_size_reach_timm():
    model = small(size=(20, 28))
    assert model.patch_embed.grid_size == (5, 7)
    assert all(isinstance(block.attn, RPEAttention) for block in model.blocks)


def test_adapted_weights_copy_tables_and_resample_positions_of_rectangles():
    old = fill(small(size=(16, 36)))
    new = build_model(
        "deit_tiny_patch16_224", num_classes=3, input_size=(24, 20), rpe=SPEC, **SMALL
    )
    weights = adapt_weights(old.state_dict(), new, (16, 36))
    load_weights(new, weights)
    key = "blocks.1.attn.rpe_v.lookup_table_weight"
    assert torch.equal(new.state_dict()[key], old.state_dict()[key])
    assert new.pos_embed.shape == (1, 1 + 6 * 5, 32)
    # The embedding of the class token is not part of the grid.
    assert torch.equal(new.pos_embed[:, 0], old.pos_embed[:, 0])
    grid = old.pos_embed[0, 1:].reshape(4, 9, 32).permute(2, 0, 1)[None]
    resized = nn.functional.interpolate(grid, size=(6, 5), mode="bicubic", antialias=True)
    torch.testing.assert_close(new.pos_embed[0, 1:], resized[0].permute(1, 2, 0).reshape(30, 32))


def test_positions_that_fit_are_kept_if_the_image_size_is_unknown():
    """The 16 patches of a 2 x 8 grid must not be resampled as a 4 x 4 grid."""
    model, fresh = fill(small(size=(8, 32))), small(size=(8, 32))
    weights = adapt_weights(model.state_dict(), fresh)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    model, fresh = fill(small(size=(16, 24))), small(size=(16, 24))
    load_weights(fresh, adapt_weights(model.state_dict(), fresh))
    assert torch.equal(fresh.pos_embed, model.pos_embed)


def test_positions_of_another_grid_with_as_many_patches_are_resampled():
    old, new = fill(small(size=(8, 32))), small()
    weights = adapt_weights(old.state_dict(), new, (8, 32))
    grid = old.pos_embed[0, 1:].reshape(2, 8, 32).permute(2, 0, 1)[None]
    resized = nn.functional.interpolate(grid, size=(4, 4), mode="bicubic", antialias=True)
    expected = resized[0].permute(1, 2, 0).reshape(16, 32)
    torch.testing.assert_close(weights["pos_embed"][0, 1:], expected)


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("deit_tiny_patch16_224", 1),
        ("deit_tiny_distilled_patch16_224", 2),
        ("deit3_small_patch16_224", 0),
        ("vit_medium_patch16_gap_240", 0),
        ("vit_betwixt_patch16_reg4_gap_256", 0),
        ("vit_base_patch16_reg4_gap_256", 0),
    ],
)
@pytest.mark.parametrize("known", [True, False], ids=["known", "square"])
def test_positions_of_prefix_tokens_are_not_resampled(name, prefix, known, caplog):
    caplog.set_level("INFO")
    sizes = ((16, 24), (24, 36)) if known else ((16, 16), (24, 24))
    old, new = (small(name, size) for size in sizes)
    weights = adapt_weights(fill(old).state_dict(), new, sizes[0] if known else None)
    load_weights(new, weights)
    assert torch.equal(new.pos_embed[:, :prefix], old.pos_embed[:, :prefix])
    rows, columns = old.patch_embed.grid_size
    grid = old.pos_embed[0, prefix:].reshape(rows, columns, 32).permute(2, 0, 1)[None]
    size = new.patch_embed.grid_size
    resized = nn.functional.interpolate(grid, size=size, mode="bicubic", antialias=True)
    expected = resized[0].permute(1, 2, 0).flatten(0, 1)
    torch.testing.assert_close(new.pos_embed[0, prefix:], expected)
    assumed = "the checkpoint records no image size: its images are assumed to be square"
    assert (assumed in caplog.messages) != known


@pytest.mark.parametrize(
    ("tokens", "image_size", "message"),
    [
        (1 + 6, None, r"a square number of patches, as it records no image size .*, got 6"),
        (1, None, r"a square number of patches.* got 0"),
        (0, None, r"a square number of patches.* got 0"),
        (1 + 8, (16, 36), "4 x 9 patches, as its image size is 16 x 36, got 8"),
        (1, (3, 3), "0 x 0 patches, as its image size is 3 x 3, got 0"),
    ],
)
def test_positions_of_an_unknown_grid_are_refused(tokens, image_size, message):
    model = small()
    weights = model.state_dict() | {"pos_embed": torch.zeros(1, tokens, 32)}
    with pytest.raises(CheckpointError, match=message):
        adapt_weights(weights, model, image_size)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pos_embed": torch.zeros(3)}, r"pos_embed is \(3,\), the model's is \(1, 17, 32\)"),
        ({"pos_embed": torch.tensor(3.0)}, r"pos_embed is \(\), the model's"),
        ({"pos_embed": torch.zeros(2, 26, 32)}, r"pos_embed is \(2, 26, 32\), the model's"),
        ({"pos_embed": torch.zeros(1, 26, 48)}, r"pos_embed is \(1, 26, 48\), the model's"),
        ({"patch_embed.proj.weight": torch.zeros(3)}, r"patch_embed.proj.weight is \(3,\)"),
        (
            {"dist_token": torch.zeros(1, 1, 32), "pos_embed": torch.zeros(1, 18, 32)},
            "has a distillation token, the model none",
        ),
    ],
    ids=["1-d", "0-d", "batch", "width", "patch", "token"],
)
@pytest.mark.parametrize("image_size", [None, (20, 20)])
def test_other_differences_than_the_grid_are_reported_by_load_weights(changes, message, image_size):
    model = small()
    weights = adapt_weights(model.state_dict() | changes, model, image_size)
    with pytest.raises(CheckpointError, match=message):
        load_weights(model, weights)


def test_weights_without_tables_leave_the_tables_at_zero():
    plain, with_irpe = fill(small(rpe="")), small()
    load_weights(with_irpe, plain.state_dict(), may_lack_tables=True)
    images = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(with_irpe(images), plain(images))
