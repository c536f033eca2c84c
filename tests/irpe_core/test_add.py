"""add_irpe: grids, chosen layers, refusals. For families of models see test_add_timm.py."""

import copy
import pickle

import pytest
import timm
import torch
from torch import nn

from irpe_core import RPEAttention, RPEConfig, add_irpe, set_grid
from tests.irpe_core import naive
from tests.recipes import fill

SPEC = "rpe-1.9-product-ctx-1-qkv"


def vit(**options) -> nn.Module:
    """Build a small vision transformer of timm, by default for 32 x 64 pixels (2 x 4 tokens)."""
    options = {"img_size": (32, 64), "embed_dim": 12, "depth": 2, "num_heads": 2, **options}
    return timm.create_model("vit_tiny_patch16_224", num_classes=5, **options).eval()


def images(height: int, width: int) -> torch.Tensor:
    return torch.randn(2, 3, height, width)


def assert_follows_the_equations(model: nn.Module, x: torch.Tensor, grid: tuple[int, int]) -> None:
    """Compare every attention of the model, as called on `x`, with the equations on `grid`."""
    seen: list[tuple[RPEAttention, torch.Tensor, torch.Tensor]] = []
    hooks = [
        block.attn.register_forward_hook(lambda m, args, out: seen.append((m, args[0], out)))
        for block in model.blocks
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(model.blocks)
    for module, tokens, out in seen:
        batch, length, _ = tokens.shape
        qkv = module.qkv(tokens).reshape(batch, length, 3, module.num_heads, -1)
        encodings = module.rpe_q, module.rpe_k, module.rpe_v
        config = next(e for e in encodings if e is not None).config
        attended = naive.attention(*qkv.permute(2, 0, 3, 1, 4), *encodings, config, grid)
        expected = module.proj(attended.float().transpose(1, 2).reshape(batch, length, -1))
        torch.testing.assert_close(out, expected)


def test_class_and_register_tokens_are_skipped_in_any_combination():
    for tokens in ({"reg_tokens": 3}, {"reg_tokens": 2, "class_token": False}, {}):
        model = add_irpe(vit(**tokens, global_pool="avg"), SPEC)
        skip = tokens.get("reg_tokens", 0) + tokens.get("class_token", True)
        assert {block.attn.rpe_k.config.skip for block in model.blocks} == {skip}
        assert_follows_the_equations(fill(model), images(32, 64), (2, 4))


@pytest.mark.parametrize("method", ["cross", "product"])
@pytest.mark.parametrize(
    "size", [(32, 64), (64, 32), (16, 128), (48, 80)], ids="{0[0]}x{0[1]}".format
)
def test_the_grid_follows_images_of_dynamic_size(method, size):
    model = fill(add_irpe(vit(dynamic_img_size=True), f"rpe-1.9-{method}-ctx-0-kv"))
    assert_follows_the_equations(model, images(*size), (size[0] // 16, size[1] // 16))


def test_padded_images_have_the_padded_grid():
    model = vit(dynamic_img_size=True, dynamic_img_pad=True)
    fill(add_irpe(model, SPEC))
    assert_follows_the_equations(model, images(30, 49), (2, 4))


def test_the_grid_follows_a_new_input_size():
    model = fill(add_irpe(vit(), SPEC))
    assert_follows_the_equations(model, images(32, 64), (2, 4))
    model.set_input_size(img_size=(64, 32))
    assert_follows_the_equations(model, images(64, 32), (4, 2))
    model.set_input_size(img_size=(32, 32), patch_size=(8, 16))
    assert_follows_the_equations(model, images(32, 32), (4, 2))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_follow_their_own_images(clone):
    model = fill(add_irpe(vit(dynamic_img_size=True), SPEC))
    wide, tall = images(32, 64), images(64, 32)
    expected = model(wide), model(tall)
    twin = clone(model)
    model(wide)
    assert torch.equal(twin(tall), expected[1])
    assert {block.attn.grid for block in model.blocks} == {(2, 4)}
    assert {block.attn.grid for block in twin.blocks} == {(4, 2)}
    assert torch.equal(model(wide), expected[0])


def test_gradient_checkpointing_and_training_reach_every_table():
    model = fill(add_irpe(vit(dynamic_img_size=True), SPEC)).train()
    model.set_grad_checkpointing(True)
    model(images(64, 32)).square().sum().backward()
    for name, parameter in model.named_parameters():
        if "lookup_table" in name:
            assert parameter.grad.abs().sum() > 0, name


def test_state_dict_has_timms_names_and_the_published_ones():
    model = vit()
    names = set(model.state_dict())
    names |= {f"blocks.{i}.attn.rpe_k.lookup_table_weight" for i in range(2)}
    assert set(add_irpe(model, "rpe-1.9-product-ctx-1-k").state_dict()) == names


def test_a_model_without_patch_embed_needs_a_given_grid():
    class Tokens(nn.Module):
        num_prefix_tokens = 1

        def __init__(self) -> None:
            super().__init__()
            self.blocks = vit().blocks

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.blocks(x)

    with pytest.raises(ValueError, match=r"Tokens has no patch_embed.*pass grid="):
        add_irpe(Tokens(), SPEC)
    model = fill(add_irpe(Tokens(), SPEC, grid=(2, 4)))
    assert_follows_the_equations(model, torch.randn(2, 9, 12), (2, 4))


def test_a_given_grid_is_never_overridden():
    model = fill(add_irpe(vit(), SPEC, grid=(4, 2)))
    assert_follows_the_equations(model, images(32, 64), (4, 2))


def test_a_configuration_must_skip_the_prefix_tokens():
    model = add_irpe(vit(reg_tokens=1), RPEConfig(skip=2))
    assert isinstance(model.blocks[1].attn, RPEAttention)
    with pytest.raises(ValueError, match=r"rpe\.skip must be 1, the model's prefix tokens, got 0"):
        add_irpe(vit(), RPEConfig())


def test_an_empty_spec_changes_nothing():
    model = vit()
    attentions = [block.attn for block in model.blocks]
    assert [block.attn for block in add_irpe(model, "").blocks] == attentions


def test_the_grid_may_come_from_any_module_that_returns_the_feature_map():
    model = fill(add_irpe(vit(dynamic_img_size=True), SPEC, grid="patch_embed.proj"))
    for size in [(64, 32), (32, 64), (48, 80)]:
        assert_follows_the_equations(model, images(*size), (size[0] // 16, size[1] // 16))
    model = add_irpe(vit(), SPEC, grid="patch_embed.norm")
    with pytest.raises(
        ValueError, match=r"shape \(B, C, height, width\), got \(2, 8, 12\) from Identity"
    ):
        model(images(32, 64))


@pytest.mark.parametrize(
    ("layers", "equipped"),
    [
        ([0, 2], {0, 2}),
        ([-1], {2}),
        (["blocks.1.attn"], {1}),
        ("blocks.1.attn", {1}),
        (0, {0}),
        (None, {0, 1, 2}),
    ],
    ids=["indices", "last", "name", "bare-name", "bare-index", "all"],
)
def test_only_the_chosen_layers_are_equipped(layers, equipped):
    model = add_irpe(vit(depth=3), SPEC, layers=layers)
    kinds = [isinstance(block.attn, RPEAttention) for block in model.blocks]
    assert {i for i, kind in enumerate(kinds) if kind} == equipped


def test_layers_can_be_equipped_one_after_the_other_and_all_follow_the_images():
    model = add_irpe(vit(dynamic_img_size=True), SPEC, layers=[0])
    add_irpe(model, "rpe-2.0-cross-bias-0-k", layers=[1])
    fill(model)(images(64, 32))
    assert [block.attn.grid for block in model.blocks] == [(4, 2), (4, 2)]
    assert [block.attn.rpe_k.config.method for block in model.blocks] == ["product", "cross"]


def test_parallel_attentions_are_equipped_by_name():
    model = vit(block_fn=timm.models.vision_transformer.ParallelThingsBlock)
    fill(model)
    x = images(32, 64)
    before = model(x)
    names = [f"blocks.{i}.attns.{j}.attn" for i in range(2) for j in range(2)]
    add_irpe(model, SPEC, layers=names)
    torch.testing.assert_close(model(x), before)
    assert model.blocks[1].attns[1].attn.grid == (2, 4)


def test_a_single_attention_is_replaced_not_changed():
    attention = timm.layers.Attention(24, 3)
    ours = add_irpe(attention, RPEConfig(skip=1, rpe_on="qkv"), grid=(2, 4))
    x = torch.randn(2, 9, 24)
    torch.testing.assert_close(ours(x), attention(x))
    assert type(attention) is timm.layers.Attention
    plain = add_irpe(RPEAttention(24, 3), SPEC, grid=(2, 4))
    assert plain.rpe_v.config.skip == 0


def test_set_grid_sets_the_grid_of_every_attention():
    model = add_irpe(vit(), SPEC, grid=(4, 2))
    set_grid(model, (2, 4))
    assert_follows_the_equations(fill(model), images(32, 64), (2, 4))
    with pytest.raises(ValueError, match=r"whole numbers >= 1, got \(0, 2\)"):
        set_grid(model, (0, 2))
    with pytest.raises(ValueError, match="Linear has no attention with iRPE: call add_irpe"):
        set_grid(nn.Linear(2, 2), (2, 4))


BAD_ARGUMENTS = {
    "index": ({"layers": [2]}, "indices of the 2 attentions found in VisionTransformer .*got 2$"),
    "unknown": (
        {"layers": ["blocks.0.attention"]},
        "names of its modules, got 'blocks.0.attention'",
    ),
    "another": (
        {"layers": [0, "blocks.1.mlp"]},
        r"blocks\.1\.mlp \(timm.*Mlp\) is not timm's Attention",
    ),
    "nested": ({"layers": [[0]]}, r"names of its modules, got \[0\]"),
    "no-layers": ({"layers": []}, "layers must name at least one attention, got none"),
    "grid": ({"grid": (2, 4.0)}, r"grid must be \(height, width\).*got \(2, 4\.0\)"),
    "square": ({"grid": 4}, r"grid must be \(height, width\).*got 4"),
    "no-module": (
        {"grid": "patch"},
        "grid must be the name of a module of VisionTransformer, got 'patch'",
    ),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_the_error_names_the_bad_argument_and_the_model_is_unchanged(case):
    options, message = BAD_ARGUMENTS[case]
    model = vit()
    modules = list(model.named_modules())
    with pytest.raises(ValueError, match=message):
        add_irpe(model, SPEC, **options)
    assert list(model.named_modules()) == modules
    assert not model.patch_embed._forward_hooks


def test_adding_irpe_twice_is_refused_and_the_model_is_unchanged():
    model = add_irpe(vit(), SPEC)
    modules = list(model.named_modules())
    with pytest.raises(ValueError, match=r"blocks\.0\.attn .*RPEAttention\) already has iRPE"):
        add_irpe(model, SPEC)
    assert list(model.named_modules()) == modules


def test_a_bad_spec_is_refused_and_the_model_is_unchanged():
    model = vit()
    with pytest.raises(ValueError, match="letters q, k, v, each once, got 'K'"):
        add_irpe(model, "rpe-1.9-product-ctx-1-K")
    assert not any(isinstance(module, RPEAttention) for module in model.modules())
