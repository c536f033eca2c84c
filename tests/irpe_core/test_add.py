"""add_irpe on timm's vision transformers: same outputs at first, and the grid of every image."""

import copy
import pickle

import pytest
import timm
import torch
from torch import nn

from irpe_core import RPEAttention, RPEConfig, add_irpe
from tests.irpe_core import naive
from tests.recipes import fill

SPEC = "rpe-1.9-product-ctx-1-qkv"


def vit(**options) -> nn.Module:
    """A small vision transformer of timm's, 32 x 64 pixels by default: 2 x 4 tokens."""
    options = {"img_size": (32, 64), "embed_dim": 12, "depth": 2, "num_heads": 2, **options}
    return timm.create_model("vit_tiny_patch16_224", num_classes=5, **options).eval()


def images(height: int, width: int) -> torch.Tensor:
    return torch.randn(2, 3, height, width)


def assert_follows_the_equations(model: nn.Module, x: torch.Tensor, grid: tuple[int, int]) -> None:
    """Every attention of the model, as it was called on `x`, equals the equations on `grid`."""
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


@pytest.mark.parametrize(
    ("options", "skip"),
    [
        ({}, 1),
        ({"class_token": False, "global_pool": "avg"}, 0),
        ({"reg_tokens": 3}, 4),
        ({"reg_tokens": 2, "class_token": False, "global_pool": "avg"}, 2),
        ({"no_embed_class": True, "qk_norm": True}, 1),
    ],
    ids=["class", "no-class", "registers", "registers-only", "qk-norm"],
)
def test_outputs_stay_the_same_until_the_tables_are_trained(options, skip):
    model, x = vit(**options), images(32, 64)
    fill(model)
    before = model(x)
    assert add_irpe(model, SPEC) is model
    torch.testing.assert_close(model(x), before)
    assert {block.attn.rpe_k.config.skip for block in model.blocks} == {skip}
    fill(model)
    assert (model(x) - before).abs().max() > 1e-3


@pytest.mark.parametrize("method", ["cross", "product"])
@pytest.mark.parametrize(
    "size", [(32, 64), (64, 32), (16, 128), (48, 80)], ids="{0[0]}x{0[1]}".format
)
def test_dynamic_images_have_their_own_grid(method, size):
    model = fill(add_irpe(vit(dynamic_img_size=True), f"rpe-1.9-{method}-ctx-0-kv"))
    assert_follows_the_equations(model, images(*size), (size[0] // 16, size[1] // 16))


def test_padded_images_have_the_grid_of_the_padding():
    model = vit(dynamic_img_size=True, dynamic_img_pad=True)
    fill(add_irpe(model, SPEC))
    assert_follows_the_equations(model, images(30, 49), (2, 4))


def test_a_new_input_size_is_followed():
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


def test_a_given_grid_serves_a_model_that_does_not_tell():
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
    with pytest.raises(ValueError, match=r"rpe\.skip must equal the model's 1 prefix.*got 0"):
        add_irpe(vit(), RPEConfig())


def test_an_empty_spec_leaves_the_model_alone():
    model = vit()
    attentions = [block.attn for block in model.blocks]
    assert [block.attn for block in add_irpe(model, "").blocks] == attentions


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.Linear(2, 2), "Linear has no num_prefix_tokens, no blocks, no patch_embed"),
        (lambda: add_irpe(vit(), SPEC), "RPEAttention also has rpe_k, rpe_q, rpe_v"),
        (lambda: vit(block_fn=timm.models.vision_transformer.ParallelThingsBlock), "attn in every"),
    ],
    ids=["no-vit", "twice", "parallel-blocks"],
)
def test_a_model_of_another_form_is_refused_and_left_alone(build, message):
    model = build()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        add_irpe(model, SPEC)
    assert [name for name, _ in model.named_modules()] == names


def test_a_bad_spec_is_refused_before_anything_changes():
    model = vit()
    with pytest.raises(ValueError, match="letters q, k, v, each once, got 'K'"):
        add_irpe(model, "rpe-1.9-product-ctx-1-K")
    assert not any(isinstance(module, RPEAttention) for module in model.modules())
