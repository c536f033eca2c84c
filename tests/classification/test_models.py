"""The models beyond the recorded numbers: options, rectangles, timm's conventions."""

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


def test_rectangle_equals_the_square_image_that_contains_it_only_in_its_own_buckets():
    """The original read a 4 x 9 grid as 6 x 6 and took wrong buckets without a word."""
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
def test_fresh_encoding_changes_nothing(name):
    torch.manual_seed(0)
    plain = small(name, rpe="")
    torch.manual_seed(0)
    equipped = small(name)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(equipped(images), plain(images))


def test_distillation_token_is_skipped_by_the_encoding():
    model = small(distillation_token=True)
    assert model.blocks[0].attn.rpe_k.config.skip == 2
    model.train().set_distilled_training(True)
    of_class, of_distillation = model(torch.randn(2, 3, 16, 16))
    assert of_class.shape == of_distillation.shape == (2, 10)


def test_published_model_takes_a_distillation_token():
    name = "deit_tiny_patch16_224_ctx_product_50_shared_k"
    model = build_model(name, num_classes=10, input_size=(32, 32), distillation_token=True)
    assert model.num_prefix_tokens == 2
    assert model.blocks[0].attn.rpe_k.lookup_table_weight.shape == (1, 64, 50)


@pytest.mark.parametrize("distillation_token", [False, True])
def test_without_absolute_embedding_and_encoding_the_patches_have_no_order(distillation_token):
    model = fill(small(rpe="", abs_pos_embed=False, distillation_token=distillation_token))
    assert "pos_embed" not in model.state_dict()
    images = torch.randn(1, 3, 16, 16)
    halves = torch.cat([images[..., 8:], images[..., :8]], -1)
    with torch.no_grad():
        torch.testing.assert_close(model(images), model(halves))


@pytest.mark.parametrize("distillation_token", [False, True])
def test_encoding_alone_gives_the_patches_an_order(distillation_token):
    model = fill(small(abs_pos_embed=False, distillation_token=distillation_token))
    images = torch.randn(1, 3, 16, 16)
    halves = torch.cat([images[..., 8:], images[..., :8]], -1)
    with torch.no_grad():
        assert not torch.allclose(model(images), model(halves), atol=1e-3)


def test_model_that_was_never_released_says_so():
    with pytest.raises(ValueError, match="no published checkpoint"):
        timm.create_model("deit_small_patch16_224_ctx_euc_20_shared_k", pretrained=True)


def test_pretrained_reads_the_published_file_under_its_published_address(monkeypatch, tmp_path):
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


def test_adapted_weights_carry_tables_and_resample_positions_of_rectangles():
    old = fill(small(size=(16, 36)))
    new = build_model(
        "deit_tiny_patch16_224", num_classes=3, input_size=(24, 20), rpe=SPEC, **SMALL
    )
    weights = adapt_weights(old.state_dict(), new, (16, 36))
    load_weights(new, weights)
    key = "blocks.1.attn.rpe_v.lookup_table_weight"
    assert torch.equal(new.state_dict()[key], old.state_dict()[key])
    assert new.pos_embed.shape == (1, 1 + 6 * 5, 32)
    # The class token's own embedding is no part of the grid.
    assert torch.equal(new.pos_embed[:, 0], old.pos_embed[:, 0])
    grid = old.pos_embed[0, 1:].reshape(4, 9, 32).permute(2, 0, 1)[None]
    resized = nn.functional.interpolate(grid, size=(6, 5), mode="bicubic", antialias=True)
    torch.testing.assert_close(new.pos_embed[0, 1:], resized[0].permute(1, 2, 0).reshape(30, 32))


def test_positions_that_fit_stay_where_no_image_size_is_known():
    """On a 2 x 8 grid 16 patches are no square of 4 x 4, and must not be read as one."""
    model, fresh = fill(small(size=(8, 32))), small(size=(8, 32))
    weights = adapt_weights(model.state_dict(), fresh)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    model, fresh = fill(small(size=(16, 24))), small(size=(16, 24))
    load_weights(fresh, adapt_weights(model.state_dict(), fresh))
    assert torch.equal(fresh.pos_embed, model.pos_embed)


def test_positions_of_as_many_patches_are_resampled_where_the_grids_differ():
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
def test_positions_are_resampled_with_as_many_prefix_tokens_as_the_model_embeds(
    name, prefix, known, caplog
):
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
    assumed = "the checkpoint does not tell its image size: it is taken for a square"
    assert (assumed in caplog.messages) != known


@pytest.mark.parametrize(
    ("tokens", "image_size", "fault"),
    [
        (1 + 6, None, "of 6 patches, which are no square, and the checkpoint does not tell its"),
        (1, None, "of 0 patches, which are no square"),
        (0, None, "of 0 patches, which are no square"),
        (1 + 8, (16, 36), "of 8 patches, which are not the 4 x 9 of its image size, 16 x 36"),
        (1, (3, 3), "of 0 patches, which are not the 0 x 0 of its image size, 3 x 3"),
    ],
)
def test_positions_of_an_unknown_grid_are_refused(tokens, image_size, fault):
    model = small()
    weights = model.state_dict() | {"pos_embed": torch.zeros(1, tokens, 32)}
    with pytest.raises(CheckpointError, match=fault):
        adapt_weights(weights, model, image_size)


@pytest.mark.parametrize(
    ("changes", "fault"),
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
def test_weights_that_differ_in_more_than_the_grid_are_left_to_the_loading(
    changes, fault, image_size
):
    model = small()
    weights = adapt_weights(model.state_dict() | changes, model, image_size)
    with pytest.raises(CheckpointError, match=fault):
        load_weights(model, weights)


def test_weights_without_tables_leave_the_tables_at_zero():
    plain, equipped = fill(small(rpe="")), small()
    load_weights(equipped, plain.state_dict(), may_lack_tables=True)
    images = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(equipped(images), plain(images))
