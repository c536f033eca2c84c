"""RPEAttention: replacement of timm's attentions, the equations, and module behavior."""

import copy
import pickle

import pytest
import timm.layers
import torch
from timm.models.eva import EvaAttention
from torch import nn

from irpe_core import RPEAttention, RPEConfig
from tests.irpe_core import naive
from tests.recipes import fill

VARIANTS = {
    "plain": {"qkv_bias": True},
    "no-bias": {"qkv_bias": False, "proj_bias": False},
    "qk-norm": {"qkv_bias": True, "qk_norm": True, "norm_layer": nn.LayerNorm},
    "scale-norm": {"scale_norm": True, "norm_layer": nn.LayerNorm},
    "gated": {"gated": True, "scale_norm": True, "norm_layer": nn.LayerNorm},
    "other-head-dim": {"num_heads": 5, "attn_head_dim": 8},
    "other-output": {"dim_out": 32},
}
CONFIG = RPEConfig(skip=1, rpe_on="qkv")


def naive_forward(module: RPEAttention, x: torch.Tensor, config: RPEConfig, grid) -> torch.Tensor:
    """Compute the layer by the equations; `x` is float64."""
    batch, length, _ = x.shape
    q, k, v = module.qkv(x).reshape(batch, length, 3, module.num_heads, -1).permute(2, 0, 3, 1, 4)
    out = naive.attention(q, k, v, module.rpe_q, module.rpe_k, module.rpe_v, config, grid)
    return module.proj(out.transpose(1, 2).reshape(batch, length, -1))


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("rpe_on", ["k", "qkv"])
def test_with_zero_tables_it_equals_timms_attention(options, rpe_on):
    attention = timm.layers.Attention(24, **{"num_heads": 3, **options}).double()
    fill(attention)
    ours = RPEAttention.from_attention(attention, RPEConfig(skip=1, rpe_on=rpe_on), (2, 5))
    x = torch.randn(2, 11, 24, dtype=torch.float64)
    torch.testing.assert_close(ours(x), attention(x))
    mask = torch.rand(2, 1, 11, 11) < 0.8
    torch.testing.assert_close(ours(x, attn_mask=mask), attention(x, attn_mask=mask))
    # Tables that are not zero change the outputs.
    fill(ours)
    assert (ours(x) - attention(x)).abs().max() > 1e-3


def test_it_keeps_layers_mode_dtype_and_device_and_draws_no_random_numbers():
    attention = timm.layers.Attention(24, 3, attn_drop=0.2, proj_drop=0.1).bfloat16().eval()
    state = torch.get_rng_state()
    ours = RPEAttention.from_attention(attention, CONFIG)
    assert torch.equal(torch.get_rng_state(), state)
    assert ours.qkv is attention.qkv
    assert ours.proj is attention.proj
    assert (ours.attn_drop.p, ours.proj_drop.p) == (0.2, 0.1)
    assert not any(module.training for module in ours.modules())
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    ours = RPEAttention.from_attention(timm.layers.Attention(24, 3, device="meta"), CONFIG)
    assert {p.device.type for p in ours.parameters()} == {"meta"}


@pytest.mark.parametrize("fused", [False, True])
def test_it_keeps_a_changed_scale_if_timm_uses_it(fused):
    attention = fill(timm.layers.Attention(24, 3, qkv_bias=True))
    attention.scale, attention.fused_attn = 0.9, fused
    ours, x = RPEAttention.from_attention(attention, CONFIG), torch.randn(2, 10, 24)
    torch.testing.assert_close(ours(x), attention(x))


def test_it_keeps_the_mode_of_every_layer():
    attention = timm.layers.Attention(24, 3).train()
    attention.attn_drop.eval()
    ours = RPEAttention.from_attention(attention, CONFIG)
    assert (ours.training, ours.attn_drop.training, ours.proj_drop.training) == (True, False, True)


def test_parameters_have_timms_names_and_the_published_ones():
    names = {name for name, _ in timm.layers.Attention(24, 3, qkv_bias=True).named_parameters()}
    names |= {f"rpe_{letter}.lookup_table_weight" for letter in "qkv"}
    assert {name for name, _ in RPEAttention(24, 3, CONFIG).named_parameters()} == names


class Subclass(timm.layers.Attention):
    """A subclass that computes the same."""


def with_a_parameter() -> nn.Module:
    attention = timm.layers.Attention(24, 3)
    attention.sink = nn.Parameter(torch.zeros(3))
    return attention


def with_a_hook() -> nn.Module:
    attention = timm.layers.Attention(24, 3)
    attention.register_forward_pre_hook(lambda module, args: None)
    return attention


def with_a_forward() -> nn.Module:
    attention = timm.layers.Attention(24, 3)
    attention.forward = lambda x: x
    return attention


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        (Subclass(24, 3), "Subclass is not timm's Attention or timm's EvaAttention: anything else"),
        (timm.layers.AttentionRope(24, 3, num_prefix_tokens=1), r"already rotates.*\(RoPE\)"),
        (RPEAttention(24, 3, CONFIG), "RPEAttention already has iRPE"),
        (nn.MultiheadAttention(24, 3), "MultiheadAttention is not timm's Attention"),
        (with_a_parameter(), "Attention also has sink, which would be lost"),
        (with_a_hook(), "Attention has hooks, which would be lost"),
        (with_a_forward(), "Attention has a forward that is not the one of its class"),
    ],
    ids=["subclass", "rope", "twice", "torchs", "parameter", "hook", "forward"],
)
def test_an_attention_that_may_compute_more_is_refused(attention, message):
    with pytest.raises(ValueError, match=message):
        RPEAttention.from_attention(attention, CONFIG)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"qk_norm": True},
        {"qkv_bias": False},
        {"qkv_bias_separate": True, "scale_norm": False},
        {"qkv_fused": False, "qk_norm": True},
        {"gated": True},
    ],
    ids=["no-key-bias", "normed", "no-bias", "bias-apart", "three-projections", "gated"],
)
def test_evas_attention_keeps_its_projections(options):
    attention = EvaAttention(24, 3, norm_layer=nn.LayerNorm, **{"scale_norm": True, **options})
    fill(attention.double())
    ours = RPEAttention.from_attention(attention, RPEConfig(skip=1, rpe_on="qkv"), (2, 5))
    x = torch.randn(2, 11, 24, dtype=torch.float64)
    torch.testing.assert_close(ours(x, rope=None), attention(x, rope=None))
    added = set(ours.state_dict()) - set(attention.state_dict())
    assert added == {f"rpe_{letter}.lookup_table_weight" for letter in "qkv"}
    with pytest.raises(ValueError, match="rope must be None, got a Tensor"):
        ours(x, rope=torch.ones(10, 16))


@pytest.mark.parametrize("grid", [(2, 5), (5, 2), None], ids=["2x5", "5x2", "square"])
@pytest.mark.parametrize("method", ["cross", "product"])
def test_values_and_gradients_equal_the_equations_on_its_grid(method, grid):
    config = RPEConfig(method=method, skip=1, rpe_on="qkv", shared_head=False)
    module = fill(RPEAttention(24, 3, config, grid).double())
    height, width = grid or (3, 3)
    x = torch.randn(2, 1 + height * width, 24, dtype=torch.float64, requires_grad=True)
    out, expected = module(x), naive_forward(module, x, config, (height, width))
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    inputs = [x, *module.parameters()]
    ours = torch.autograd.grad(out.square().sum(), inputs)
    wanted = torch.autograd.grad(expected.square().sum(), inputs)
    for actual, gradient in zip(ours, wanted, strict=True):
        torch.testing.assert_close(actual, gradient, rtol=1e-9, atol=1e-9)


def test_dropout_acts_in_training_only():
    module = fill(RPEAttention(24, 3, CONFIG, attn_drop=0.5))
    x = torch.randn(2, 10, 24)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


def test_without_an_encoding_it_is_plain_attention():
    attention = fill(timm.layers.Attention(24, 3, qkv_bias=True))
    module = RPEAttention(24, 3)
    module.load_state_dict(attention.state_dict())
    # Without an encoding, any number of tokens is allowed.
    x = torch.randn(2, 7, 24)
    torch.testing.assert_close(module(x), attention(x))


def test_errors_name_the_bad_argument():
    with pytest.raises(ValueError, match="num_heads must divide dim=24, got 5"):
        RPEAttention(24, 5)
    module = RPEAttention(24, 3, CONFIG)
    with pytest.raises(ValueError, match="is_causal must be False"):
        module(torch.randn(1, 10, 24), is_causal=True)
    with pytest.raises(ValueError, match="12 tokens without 1 skipped ones"):
        module(torch.randn(1, 12, 24))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_compute_the_same_and_have_their_own_grid(clone):
    module = fill(RPEAttention(24, 3, CONFIG, (2, 5))).eval()
    x = torch.randn(2, 11, 24)
    expected, twin = module(x), clone(module)
    assert torch.equal(twin(x), expected)
    twin.grid = (5, 2)
    assert not torch.allclose(twin(x), expected)
    assert torch.equal(module(x), expected)
