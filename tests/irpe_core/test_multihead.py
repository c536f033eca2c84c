"""RPEMultiheadAttention: equality with nn.MultiheadAttention, and with the equations."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from irpe_core import METHODS, RPEConfig, RPEMultiheadAttention, set_implementation
from tests.irpe_core import naive
from tests.recipes import fill

BATCH, HEADS, DIM, GRID = 2, 3, 12, (3, 5)
LENGTH = GRID[0] * GRID[1]
CONFIG = RPEConfig(rpe_on="qkv")
MASKS = ["none", "padding", "padding-float", "pairs", "pairs-float", "heads", "both", "mixed"]
masks = pytest.mark.parametrize("kind", MASKS)
batch_first = pytest.mark.parametrize("batch_first", [True, False], ids=["BLC", "LBC"])


def make_masks(kind: str) -> dict[str, Tensor]:
    """Make masks for torch's module; every token may attend to at least one other."""
    padding = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    padding[1, 11:] = True
    pairs = torch.rand(LENGTH, LENGTH) < 0.3
    pairs[:, 0] = False
    heads = torch.rand(BATCH * HEADS, LENGTH, LENGTH) < 0.3
    heads[:, :, 0] = False
    added = torch.randn(LENGTH, LENGTH, dtype=torch.float64).masked_fill(pairs, -torch.inf)
    return {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "padding-float": {"key_padding_mask": padding.double() * -3},
        "pairs": {"attn_mask": pairs},
        "pairs-float": {"attn_mask": added},
        "heads": {"attn_mask": heads},
        "both": {"attn_mask": pairs, "key_padding_mask": padding},
        "mixed": {"attn_mask": added, "key_padding_mask": padding},
    }[kind]


def make_inputs(batch_first: bool = True) -> list[Tensor]:
    """Make query, key and value, all different."""
    shape = (BATCH, LENGTH, DIM) if batch_first else (LENGTH, BATCH, DIM)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(3)]


def module(rpe: RPEConfig | None = CONFIG, **options) -> RPEMultiheadAttention:
    """Build a float64 module with random weights and tables."""
    options = {"batch_first": True, "dtype": torch.float64, **options}
    return fill(RPEMultiheadAttention(DIM, HEADS, rpe=rpe, **options))


def torchs(ours: RPEMultiheadAttention) -> nn.MultiheadAttention:
    """Build torch's module with the same weights."""
    options = {"bias": ours.in_proj_bias is not None, "batch_first": ours.batch_first}
    theirs = nn.MultiheadAttention(DIM, HEADS, ours.dropout, **options, dtype=torch.float64)
    theirs.load_state_dict({k: v for k, v in ours.state_dict().items() if "rpe" not in k})
    return theirs.train(ours.training)


def gradients(out: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    weights = torch.sin(torch.arange(out.numel(), dtype=torch.float64)).reshape(out.shape)
    return torch.autograd.grad((out * weights).sum(), inputs)


def shared_parameters(module: nn.Module) -> list[Tensor]:
    return [p for name, p in module.named_parameters() if "rpe" not in name]


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
@masks
@batch_first
@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no-weights"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_without_an_encoding_it_is_bit_identical_to_torchs_module(
    training, need_weights, batch_first, kind
):
    ours = module(None, dropout=0.3, bias=training, batch_first=batch_first).train(training)
    theirs, inputs = torchs(ours), make_inputs(batch_first)
    options = {"need_weights": need_weights, **make_masks(kind)}
    results = []
    for attention, extra in ((ours, {"hw": GRID}), (theirs, {})):
        torch.manual_seed(1)
        out, weights = attention(*inputs, **options, **extra)
        grads = gradients(out, inputs + shared_parameters(attention))
        results.append([out, *grads] + ([weights] if need_weights else []))
        assert (weights is None) != need_weights
    assert all(map(torch.equal, *results))


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
@masks
@batch_first
@pytest.mark.parametrize("averaged", [True, False, None], ids=["mean", "heads", "no-weights"])
def test_with_zero_tables_it_equals_torchs_module(averaged, batch_first, kind):
    ours = module(bias=batch_first, batch_first=batch_first)
    for name, table in ours.named_parameters():
        if "lookup_table" in name:
            nn.init.zeros_(table)
    theirs, inputs = torchs(ours), make_inputs(batch_first)
    options = {"need_weights": averaged is not None, "average_attn_weights": averaged is not False}
    options |= make_masks(kind)
    out, weights = ours(*inputs, **options, hw=GRID)
    expected, expected_weights = theirs(*inputs, **options)
    torch.testing.assert_close(out, expected)
    assert (weights is None) == (averaged is None)
    if weights is not None:
        torch.testing.assert_close(weights, expected_weights)
    actual = gradients(out, inputs + shared_parameters(ours))
    wanted = gradients(expected, inputs + shared_parameters(theirs))
    for gradient, other in zip(actual, wanted, strict=True):
        torch.testing.assert_close(gradient, other)


@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no-weights"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-head"])
@pytest.mark.parametrize(
    ("mode", "rpe_on"),
    [("ctx", "k"), ("ctx", "q"), ("ctx", "v"), ("ctx", "qkv"), ("bias", "qk")],
    ids="-".join,
)
@pytest.mark.parametrize("method", METHODS)
def test_values_and_all_gradients_equal_the_equations(method, mode, rpe_on, shared, need_weights):
    config = RPEConfig(1.3, method, mode, shared, 0, rpe_on)
    ours, inputs = module(config), make_inputs()
    padding = make_masks("padding")["key_padding_mask"]
    heads = [
        F.linear(x, w, b).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        for x, w, b in zip(
            inputs, ours.in_proj_weight.chunk(3), ours.in_proj_bias.chunk(3), strict=True
        )
    ]
    encodings = (ours.rpe_q, ours.rpe_k, ours.rpe_v)
    mixed = naive.attention(*heads, *encodings, config, GRID, attn_mask=~padding[:, None, None, :])
    expected = ours.out_proj(mixed.transpose(1, 2).flatten(2))
    out, _ = ours(*inputs, padding, need_weights=need_weights, hw=GRID)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    leaves = inputs + list(ours.parameters())
    for actual, wanted in zip(gradients(out, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-10)


@batch_first
def test_batch_first_and_unbatched_inputs_give_the_same_outputs(batch_first):
    ours, inputs = module(), make_inputs()
    padding = make_masks("padding")["key_padding_mask"]
    expected, expected_weights = ours(*inputs, padding, hw=GRID)
    ours.batch_first = batch_first
    moved = inputs if batch_first else [x.transpose(0, 1) for x in inputs]
    out, weights = ours(*moved, padding, hw=GRID)
    torch.testing.assert_close(out if batch_first else out.transpose(0, 1), expected)
    torch.testing.assert_close(weights, expected_weights)
    out, weights = ours(*(x[1] for x in inputs), padding[1], hw=GRID)
    torch.testing.assert_close(out, expected[1])
    torch.testing.assert_close(weights, expected_weights[1])
    assert ours(*(x[1] for x in inputs), need_weights=False, hw=GRID)[1] is None


def test_dropout_drops_the_weights_that_are_returned():
    ours, inputs = module(dropout=0.4), make_inputs()
    # Only composed attention draws the same random numbers with and without weights.
    set_implementation(ours, "reference", "cpu")
    torch.manual_seed(1)
    out, weights = ours(*inputs, hw=GRID, average_attn_weights=False)
    assert 0 < (weights == 0).sum() < weights.numel()
    torch.manual_seed(1)
    torch.testing.assert_close(ours(*inputs, need_weights=False, hw=GRID)[0], out)
    _, weights = ours.eval()(*inputs, hw=GRID, average_attn_weights=False)
    assert not (weights == 0).any()


def test_a_query_that_may_attend_nowhere_gives_the_output_bias_and_finite_gradients():
    ours, inputs = module(), make_inputs()
    pairs = torch.zeros(LENGTH, LENGTH, dtype=torch.bool)
    pairs[4] = True
    for need_weights in (True, False):
        out, _ = ours(*inputs, attn_mask=pairs, need_weights=need_weights, hw=GRID)
        torch.testing.assert_close(out[:, 4], ours.out_proj.bias.expand(BATCH, -1))
        assert all(g.isfinite().all() for g in gradients(out, inputs))


def test_parameters_have_torchs_names_order_and_initial_values():
    torch.manual_seed(3)
    theirs = nn.MultiheadAttention(DIM, HEADS)
    torch.manual_seed(3)
    ours = RPEMultiheadAttention(DIM, HEADS, rpe=CONFIG)
    names = list(ours.state_dict())
    assert names[:4] == list(theirs.state_dict())
    assert names[4:] == [f"rpe_{letter}.lookup_table_weight" for letter in "qkv"]
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)
    assert ours.load_state_dict(theirs.state_dict(), strict=False).missing_keys == names[4:]
    assert list(RPEMultiheadAttention(DIM, HEADS).state_dict()) == names[:4]


def test_torchs_encoder_layer_uses_the_encoding_in_evaluation():
    layer = nn.TransformerEncoderLayer(DIM, HEADS - 1, 8, dropout=0.0, batch_first=True)
    layer.self_attn = fill(RPEMultiheadAttention(DIM, HEADS - 1, batch_first=True, rpe=CONFIG))
    x = torch.randn(BATCH, 9, DIM)
    trained = layer(x)
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), trained)


def test_a_copy_and_a_pickle_compute_the_same():
    ours, inputs = module(), make_inputs()
    expected, _ = ours(*inputs, hw=GRID)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(other(*inputs, hw=GRID)[0], expected)


def test_autocast_gives_low_precision_outputs_near_those_of_float32():
    ours, inputs = module(dtype=torch.float32), [x.float() for x in make_inputs()]
    padding = make_masks("padding")["key_padding_mask"]
    expected, _ = ours(*inputs, padding, hw=GRID)
    for need_weights in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out, _ = ours(*inputs, padding, need_weights=need_weights, hw=GRID)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.float(), expected, rtol=0.02, atol=0.03)


def test_it_compiles_into_one_graph():
    ours, inputs = module(), make_inputs()
    padding = make_masks("padding")["key_padding_mask"]
    torch.compiler.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    actual = compiled(*inputs, padding, need_weights=False, hw=GRID)[0]
    torch.testing.assert_close(actual, ours(*inputs, padding, need_weights=False, hw=GRID)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hw": (4, 5)}, "must be 20 for a grid of 4 x 5 and 0 skipped tokens, got 15"),
        ({}, "do not form a square"),
        ({"hw": GRID, "is_causal": True}, "attn_mask must be given with is_causal=True, got None"),
        (
            {"hw": GRID, "attn_mask": torch.zeros(4, 4, dtype=torch.bool)},
            r"attn_mask must have the shape \(15, 15\), got \(4, 4\)",
        ),
        (
            {"hw": GRID, "attn_mask": torch.zeros(2, 15, 15, dtype=torch.bool)},
            r"attn_mask must have the shape \(6, 15, 15\), got \(2, 15, 15\)",
        ),
        (
            {"hw": GRID, "key_padding_mask": torch.zeros(15, 2, dtype=torch.bool)},
            r"key_padding_mask must have the shape \(2, 15\), got \(15, 2\)",
        ),
        (
            {"hw": GRID, "key_padding_mask": torch.zeros(2, 15, dtype=torch.uint8)},
            "must be boolean or floating point",
        ),
    ],
    ids=["grid", "square", "causal", "pairs", "heads", "padding", "dtype"],
)
def test_errors_name_the_bad_argument(options, message):
    with pytest.raises(ValueError, match=message):
        module()(*make_inputs(), **options)


def test_wrong_numbers_of_keys_and_of_heads_are_refused():
    query, key, value = make_inputs()
    with pytest.raises(ValueError, match=r"same tokens.*\(2, 15, 12\) and \(2, 9, 12\)"):
        module()(query, key[:, :9], value[:, :9], hw=GRID)
    with pytest.raises(ValueError, match="num_heads must divide embed_dim=12, got 5"):
        RPEMultiheadAttention(12, 5)
