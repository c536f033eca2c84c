"""The transformer: equations of pre-norm and post-norm, padding, grids, memory."""

import pytest
import torch
from torch import nn

from detection.position_encoding import build_position_encoding
from detection.transformer import Transformer
from irpe_core import METHODS, RPEMultiheadAttention, parse_rpe_spec
from scripts.benchmark.peak_memory import peak_memory
from tests.recipes import fill

SHAPE = {"dim": 24, "num_heads": 3, "enc_layers": 2, "dec_layers": 2, "dim_feedforward": 40}
SPECS = ["", "rpe-1.9-product-ctx-1-k", "rpe-2.0-cross-ctx-0-qkv", "rpe-3.0-euc-bias-1-qk"]
orders = pytest.mark.parametrize("pre_norm", [False, True], ids=["post-norm", "pre-norm"])


def transformer(spec: str = "", **options) -> Transformer:
    model = Transformer(**SHAPE, rpe=parse_rpe_spec(spec), **options).double()
    return fill(model.eval())


@orders
@pytest.mark.parametrize("place", ["encoder", "decoder"])
def test_layers_equal_those_of_torch_with_positions_added_to_queries_and_keys(place, pre_norm):
    ours = transformer(pre_norm=pre_norm)
    cls = nn.TransformerEncoderLayer if place == "encoder" else nn.TransformerDecoderLayer
    layer = getattr(ours, place).layers[0]
    theirs = cls(24, 3, 40, batch_first=True, norm_first=pre_norm).double().train(False)
    theirs.load_state_dict(layer.state_dict())
    x, pos, memory = (torch.randn(2, 15, 24, dtype=torch.float64) for _ in range(3))
    padding = torch.zeros(2, 15, dtype=torch.bool)
    padding[1, 9:] = True
    none = torch.zeros_like(pos)
    if place == "encoder":
        out, expected = layer(x, none, padding, (3, 5)), theirs(x, None, padding)
        with_positions = layer(x, pos, padding, (3, 5))
    else:
        out = layer(x, none, memory, none, padding)
        expected = theirs(x, memory, memory_key_padding_mask=padding)
        with_positions = layer(x, pos, memory, none, padding)
    torch.testing.assert_close(out, expected)
    # The layer of torch has no positions, so the inputs of the attention are compared instead.
    assert (with_positions - out).abs().max() > 1e-3
    seen = {}
    attention = layer.self_attn
    attention.register_forward_hook(lambda _, args, out: seen.update(args=args))
    layer(x, pos, *((padding, (3, 5)) if place == "encoder" else (memory, none, padding)))
    tokens = layer.norm1(x) if pre_norm else x
    for actual, wanted in zip(seen["args"][:3], (tokens + pos, tokens + pos, tokens), strict=True):
        torch.testing.assert_close(actual, wanted)


@orders
def test_decoder_outputs_are_normalized_and_a_pre_norm_encoder_has_a_last_norm(pre_norm):
    model = transformer(pre_norm=pre_norm)
    assert (model.encoder.norm is not None) == pre_norm
    features = torch.randn(2, 24, 3, 5, dtype=torch.float64)
    queries = torch.randn(7, 24, dtype=torch.float64)
    inner = []
    for layer in model.decoder.layers:
        layer.register_forward_hook(lambda _, __, out: inner.append(out))
    objects, memory = model(features, None, queries, torch.zeros_like(features))
    assert objects.shape == (2, 2, 7, 24)
    assert memory.shape == features.shape
    torch.testing.assert_close(objects, torch.stack([model.decoder.norm(x) for x in inner]))


@orders
@pytest.mark.parametrize("kind", ["sine", "learned"])
@pytest.mark.parametrize("spec", SPECS)
def test_padding_has_no_effect(spec, kind, pre_norm):
    model = transformer(spec, pre_norm=pre_norm)
    encode_positions = fill(build_position_encoding(kind, 24))
    queries = torch.randn(7, 24, dtype=torch.float64)
    features = torch.randn(1, 24, 4, 5, dtype=torch.float64)
    wide = 10 * torch.randn(2, 24, 6, 9, dtype=torch.float64)
    wide[:1, :, :4, :5] = features
    mask = torch.ones(2, 6, 9, dtype=torch.bool)
    mask[0, :4, :5] = mask[1, :6, :3] = False
    inside = torch.zeros(1, 4, 5, dtype=torch.bool)
    alone = model(features, None, queries, encode_positions(inside).double())
    padded = model(wide, mask, queries, encode_positions(mask).double())
    torch.testing.assert_close(padded[0][:, :1], alone[0])
    torch.testing.assert_close(padded[1][:1, :, :4, :5], alone[1])


@pytest.mark.parametrize("mode_on", ["ctx-1-q", "ctx-0-v", "ctx-1-qkv", "bias-0-k", "bias-1-qk"])
@pytest.mark.parametrize("method", METHODS)
def test_every_irpe_follows_the_grid_and_gets_gradients(method, mode_on):
    model = transformer(f"rpe-1.5-{method}-{mode_on}")
    queries = torch.randn(7, 24, dtype=torch.float64)
    for hw in ((3, 5), (5, 3), (1, 7)):
        features = torch.randn(2, 24, *hw, dtype=torch.float64)
        model.zero_grad()
        model(features, None, queries, torch.zeros_like(features))[0].square().sum().backward()
        tables = [p for name, p in model.named_parameters() if "lookup_table" in name]
        letters = mode_on.split("-")[-1]
        assert len(tables) == SHAPE["enc_layers"] * len(letters) * (1 + (method == "cross"))
        assert all(table.grad.abs().max() > 0 for table in tables)
    assert not any("rpe" in name for name, _ in model.decoder.named_parameters())


def test_tables_have_xavier_initialization():
    model = Transformer(48, 3, 1, 1, 64, rpe=parse_rpe_spec("rpe-2.0-product-ctx-0-v"))
    table = model.encoder.layers[0].self_attn.rpe_v.lookup_table_weight
    assert table.shape == (3, 81, 16)
    bound = (6 / (16 * 81 + 16 * 3)) ** 0.5
    assert 0.95 * bound < table.abs().max() <= bound
    assert not model.encoder.layers[0].self_attn.in_proj_bias.any()


def peak_of_attention(spec: str, *, training: bool) -> int:
    """Return the peak memory in bytes of one encoder attention on 2 feature maps of 25 × 38."""
    attention = RPEMultiheadAttention(256, 8, 0.1, batch_first=True, rpe=parse_rpe_spec(spec))
    attention.train(training)
    x = torch.randn(2, 25 * 38, 256, requires_grad=training)
    padding = torch.zeros(2, 25 * 38, dtype=torch.bool)
    padding[1, 800:] = True

    def attend() -> None:
        with torch.set_grad_enabled(training):
            out, _ = attention(x, x, x, padding, need_weights=False, hw=(25, 38))
            if training:
                out.sum().backward()

    return peak_memory(attend, "cpu")


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("implementation", ["reference", "cpp"], indirect=True)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_irpe_on_values_needs_less_than_150_mb_more(training):
    spec = "rpe-2.0-product-ctx-1-v"
    plain = peak_of_attention("", training=training)
    assert peak_of_attention(spec, training=training) - plain < 150e6
