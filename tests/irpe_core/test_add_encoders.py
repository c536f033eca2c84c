"""add_irpe on torch's encoders, on encoders like DETR's, and on attentions given by name."""

import copy
from unittest import mock

import pytest
import torch
import torchvision
from torch import Tensor, nn

from detection.transformer import Transformer
from irpe_core import RPEConfig, RPEMultiheadAttention, add_irpe, load_weights, set_grid
from tests.recipes import fill

SPEC = "rpe-1.9-product-ctx-1-qkv"
GRID, DIM, HEADS = (2, 4), 16, 2
pytestmark = pytest.mark.filterwarnings("ignore:.*nested.tensor")
batch_first = pytest.mark.parametrize("batch_first", [True, False], ids=["BLC", "LBC"])


def layer(**options) -> nn.TransformerEncoderLayer:
    options = {"dropout": 0.0, "batch_first": True, "dtype": torch.float64, **options}
    return nn.TransformerEncoderLayer(DIM, HEADS, 24, **options)


def encoder(**options) -> nn.TransformerEncoder:
    return fill(nn.TransformerEncoder(layer(**options), 2).eval())


def tokens(batch_first: bool = True, length: int = 8) -> Tensor:
    x = torch.randn(2, length, DIM, dtype=torch.float64)
    return x if batch_first else x.transpose(0, 1)


def tables(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if "lookup_table" in name]


def check_training(model: nn.Module, call, before: Tensor) -> None:
    """Check that one step on the tables changes all tables and the outputs."""
    optimizer = torch.optim.SGD(tables(model), lr=0.1)
    (call(model) * before.cos()).sum().backward()
    assert all(table.grad.abs().max() > 1e-6 for table in tables(model))
    optimizer.step()
    assert (call(model) - before).abs().max() > 1e-6


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
@batch_first
def test_torchs_encoder_computes_the_same_until_its_tables_are_trained(
    batch_first, norm_first, training
):
    model = encoder(batch_first=batch_first, norm_first=norm_first).train(training)
    x, names = tokens(batch_first), set(model.state_dict())
    before = model(x).detach()
    assert add_irpe(model, SPEC, grid=GRID) is model
    torch.testing.assert_close(model(x), before)
    assert set(model.state_dict()) > names
    assert len(tables(model)) == 6
    check_training(model, lambda m: m(x), before)
    fresh = add_irpe(encoder(batch_first=batch_first, norm_first=norm_first), SPEC, grid=GRID)
    load_weights(fresh.train(training), model.state_dict())
    assert torch.equal(fresh(x), model(x))


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_torchs_fast_path_is_not_used_with_an_encoding(padded):
    """In evaluation, torch's layers call a fused kernel and make padded tokens nested tensors."""
    model, x = encoder(), tokens()
    padding = torch.zeros(2, 8, dtype=torch.bool)
    padding[1, 5:] = padded
    seen = ~padding
    kernel = torch._transformer_encoder_layer_fwd
    with torch.no_grad(), mock.patch("torch._transformer_encoder_layer_fwd", wraps=kernel) as fast:
        before = model(x, src_key_padding_mask=padding if padded else None)
        assert fast.call_count == 2
        add_irpe(model, SPEC, grid=GRID)
        after = model(x, src_key_padding_mask=padding if padded else None)
        assert fast.call_count == 2
        torch.testing.assert_close(after[seen], before[seen])
        fill(model)
        trained = model(x, src_key_padding_mask=padding if padded else None)
    assert (trained - after)[seen].abs().max() > 1e-3
    slow = model.train()(x, src_key_padding_mask=padding if padded else None)
    torch.testing.assert_close(trained[seen], slow[seen])


def test_a_single_layer_can_be_equipped_while_others_use_torchs_kernel():
    model, x = encoder(), tokens()
    with torch.no_grad():
        before = model(x)
        add_irpe(model, SPEC, grid=GRID, layers=[1])
        torch.testing.assert_close(model(x), before)
        fill(model.layers[1].self_attn)
        assert (model(x) - before).abs().max() > 1e-3
    assert [len(tables(each)) for each in model.layers] == [0, 3]


def test_the_error_for_nested_tensors_says_what_to_do():
    model = encoder()
    add_irpe(model.layers[0], SPEC, grid=GRID)
    padding = torch.zeros(2, 8, dtype=torch.bool)
    padding[1, 5:] = True
    with torch.no_grad(), pytest.raises(ValueError, match=r"got a nested one.*pass it to add_irpe"):
        model(tokens(), src_key_padding_mask=padding)


@batch_first
def test_the_grid_is_the_given_one_and_may_change(batch_first):
    model = add_irpe(encoder(batch_first=batch_first), SPEC, grid=GRID).train()
    attention = fill(model.layers[0].self_attn)
    x = tokens(batch_first)
    expected = {grid: attention(x, x, x, hw=grid)[0] for grid in [(2, 4), (4, 2)]}
    assert (expected[2, 4] - expected[4, 2]).abs().max() > 1e-3
    assert torch.equal(attention(x, x, x)[0], expected[2, 4])
    set_grid(model, (4, 2))
    assert torch.equal(attention(x, x, x)[0], expected[4, 2])
    assert torch.equal(attention(x, x, x, hw=(2, 4))[0], expected[2, 4])
    set_grid(model, None)
    with pytest.raises(ValueError, match="8 tokens without 0 skipped ones do not form a square"):
        model(x)


def test_a_single_layer_and_a_single_attention_can_be_equipped():
    one, x = fill(layer()), tokens(length=9)
    before = one(x)
    torch.testing.assert_close(add_irpe(one, RPEConfig(skip=1), grid=GRID)(x), before)
    attention = nn.MultiheadAttention(DIM, HEADS, bias=False, dtype=torch.float64)
    ours = add_irpe(attention, RPEConfig(skip=1), grid=GRID)
    assert isinstance(ours, RPEMultiheadAttention)
    assert type(attention) is nn.MultiheadAttention
    assert ours.out_proj is attention.out_proj
    x = x.transpose(0, 1)
    torch.testing.assert_close(ours(x, x, x), attention(x, x, x))


def test_only_the_encoder_of_torchs_transformer_is_equipped():
    model = nn.Transformer(DIM, HEADS, 2, 2, 24, dropout=0.0, batch_first=True, dtype=torch.float64)
    fill(model.eval())
    x, queries = tokens(), tokens(length=3)
    before = model(x, queries)
    add_irpe(model, SPEC, grid=GRID)
    torch.testing.assert_close(model(x, queries), before)
    kinds = {name for name, m in model.named_modules() if isinstance(m, RPEMultiheadAttention)}
    assert kinds == {f"encoder.layers.{i}.self_attn" for i in range(2)}


class Layer(nn.Module):
    """A layer as in DETR: `(L, B, C)`, with positions added to queries and keys."""

    def __init__(self, crosses: bool) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(DIM, HEADS, dtype=torch.float64)
        if crosses:
            self.multihead_attn = nn.MultiheadAttention(DIM, HEADS, dtype=torch.float64)

    def forward(self, x: Tensor, pos: Tensor, memory=None, padding=None) -> Tensor:
        placed = x + pos
        x = x + self.self_attn(placed, placed, value=x, key_padding_mask=padding)[0]
        return x if memory is None else x + self.multihead_attn(x + pos, memory, memory)[0]


class Detector(nn.Module):
    """A model with names and shapes as in DETR."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Conv2d(3, 8, 4, stride=4, dtype=torch.float64)
        self.input_proj = nn.Conv2d(8, DIM, 1, dtype=torch.float64)
        self.transformer = nn.Module()
        self.transformer.encoder = nn.Module()
        self.transformer.encoder.layers = nn.ModuleList([Layer(False), Layer(False)])
        self.transformer.decoder = nn.Module()
        self.transformer.decoder.layers = nn.ModuleList([Layer(True)])
        self.queries = nn.Parameter(torch.randn(4, 1, DIM, dtype=torch.float64))

    def forward(self, images: Tensor, padding: Tensor | None = None) -> Tensor:
        x = self.input_proj(self.backbone(images)).flatten(2).permute(2, 0, 1)
        for each in self.transformer.encoder.layers:
            x = each(x, x.cos(), padding=padding)
        queries = self.queries.expand(-1, x.shape[1], -1)
        return self.transformer.decoder.layers[0](queries, queries, x)


@pytest.mark.parametrize("grid", [None, "input_proj", "backbone"])
def test_a_model_like_detr_follows_its_images_and_keeps_its_decoder(grid):
    model = fill(Detector())
    wide, tall = (torch.randn(2, 3, *size, dtype=torch.float64) for size in [(8, 24), (24, 8)])
    padding = torch.zeros(2, 12, dtype=torch.bool)
    padding[1, 7:] = True
    before = model(wide, padding).detach()
    add_irpe(model, SPEC, grid=grid)
    torch.testing.assert_close(model(wide, padding), before)
    assert len(tables(model.transformer.encoder)) == len(tables(model)) == 6
    check_training(model, lambda m: m(wide, padding), before)
    fill(model)
    attention = model.transformer.encoder.layers[1].self_attn
    for images, seen in [(wide, (2, 6)), (tall, (6, 2)), (wide, (2, 6))]:
        model(images)
        assert attention.grid == seen
    fixed = add_irpe(fill(Detector()), SPEC, grid=(2, 6))
    load_weights(fixed, model.state_dict())
    assert torch.equal(fixed(wide), model(wide))
    assert (fixed(tall) - model(tall)).abs().max() > 1e-3


def test_adding_irpe_to_our_detr_equals_building_it_with_irpe():
    plain = fill(Transformer(DIM, HEADS, 2, 1, 24, dropout=0.0))
    built = Transformer(DIM, HEADS, 2, 1, 24, dropout=0.0, rpe=RPEConfig(rpe_on="qkv"))
    inputs = torch.randn(2, DIM, 2, 4), None, torch.randn(3, DIM), torch.randn(2, DIM, 2, 4)
    before = plain(*inputs)
    add_irpe(plain, SPEC)
    torch.testing.assert_close(plain(*inputs), before)
    load_weights(built, fill(plain).state_dict())
    assert torch.equal(built(*inputs)[0], plain(*inputs)[0])


def test_torchvisions_vision_transformer_is_equipped_by_name():
    model = torchvision.models.VisionTransformer(32, 8, 2, HEADS, DIM, 24).double()
    fill(model.eval())
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    before = model(x).detach()
    with pytest.raises(ValueError, match=r"encoder_layer_0\.self_attention .* named in layers="):
        add_irpe(model, SPEC)
    names = [f"encoder.layers.encoder_layer_{i}.self_attention" for i in range(2)]
    config = RPEConfig(skip=1, rpe_on="v")
    add_irpe(model, config, grid="conv_proj", layers=names)
    torch.testing.assert_close(model(x), before)
    assert model.get_submodule(names[1]).grid == (4, 4)
    check_training(model, lambda m: m(x), before)


class Subclass(nn.MultiheadAttention):
    """A subclass that computes the same."""


def hooked(**options) -> nn.MultiheadAttention:
    attention = nn.MultiheadAttention(DIM, HEADS, **options)
    attention.register_forward_hook(lambda module, args, output: None)
    return attention


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        (Subclass(DIM, HEADS), "Subclass.* is not timm's Attention or .* nn.MultiheadAttention"),
        (nn.MultiheadAttention(DIM, HEADS, kdim=8), "another width .*: it is not self-attention"),
        (nn.MultiheadAttention(DIM, HEADS, add_bias_kv=True), "adds a token to keys and values"),
        (nn.MultiheadAttention(DIM, HEADS, add_zero_attn=True), "adds a token to keys and values"),
        (RPEMultiheadAttention(DIM, HEADS, rpe=RPEConfig()), "already has iRPE"),
        (hooked(), "has hooks, which would be lost"),
    ],
    ids=["subclass", "cross", "bias-kv", "zero-attn", "twice", "hook"],
)
def test_an_attention_that_computes_something_else_is_refused(attention, message):
    model = encoder()
    model.layers[1].self_attn = attention
    modules = list(model.named_modules())
    with pytest.raises(ValueError, match=rf"layers\.1\.self_attn .*{message}"):
        add_irpe(model, SPEC, grid=GRID)
    assert list(model.named_modules()) == modules
    assert model.use_nested_tensor
    with pytest.raises(ValueError, match=r"Linear is not nn\.MultiheadAttention: anything else"):
        RPEMultiheadAttention.from_attention(nn.Linear(2, 2), RPEConfig())


def test_attention_to_other_tokens_is_refused():
    layer = nn.TransformerDecoderLayer(DIM, HEADS, 24)
    decoder = nn.TransformerDecoder(layer, 1)
    with pytest.raises(ValueError, match=r"multihead_attn .* is in a layer with self_attn"):
        add_irpe(decoder, SPEC, layers=["layers.0.multihead_attn"])
    add_irpe(decoder, SPEC, layers=["layers.0.self_attn"])


@pytest.mark.parametrize("layers", [1.5, [True], {"layers.0.self_attn": 1}], ids=str)
def test_layers_that_are_not_names_or_indices_are_refused(layers):
    with pytest.raises(ValueError, match="layers must hold indices of the 2 attentions"):
        add_irpe(encoder(), SPEC, grid=GRID, layers=layers)


def test_an_encoding_of_another_type_is_refused():
    with pytest.raises(ValueError, match="rpe must be a spec or an RPEConfig, got 5"):
        add_irpe(encoder(), 5, grid=GRID)


def test_copies_of_encoders_have_their_own_grids():
    model = add_irpe(encoder(), SPEC, grid=GRID)
    twin = copy.deepcopy(model)
    set_grid(twin, (4, 2))
    assert model.layers[0].self_attn.grid == GRID
    assert twin.layers[0].self_attn.grid == (4, 2)
