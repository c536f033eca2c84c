"""rpe_ops.attention: arguments, derivatives, tracing and cost; its values are compared elsewhere.

Against equations written otherwise in tests/irpe_core/test_functional.py (every combination),
test_cpu_attention.py and test_triton_kernels.py (the kernels, every dtype).
"""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import rpe_ops
import rpe_ops.flops
from irpe_core import RPEConfig
from irpe_core.buckets import grid_buckets
from rpe_ops.dropout import keep_mask
from tests.rpe_ops.extension import provide_library

GRID = (3, 4)
LENGTH = 13
CONFIG = RPEConfig(skip=1)


@pytest.fixture(params=["reference", "cpp"])
def implementation(request: pytest.FixtureRequest) -> str:
    if request.param == "cpp":
        provide_library()
    return request.param


def inputs(dtype: torch.dtype = torch.float64, config: RPEConfig = CONFIG) -> list[Tensor]:
    """q, k, v, lookup_k, lookup_q."""
    num_lookups = grid_buckets(config, *GRID).num_lookups
    widths = (8, 8, 8, num_lookups, num_lookups)
    return [torch.randn(2, 3, LENGTH, n, dtype=dtype).requires_grad_() for n in widths]


def attend(q, k, v, lookup_k, lookup_q, config: RPEConfig = CONFIG, **options):
    return rpe_ops.attention(
        q, k, v, grid_buckets(config, *GRID), lookup_k=lookup_k, lookup_q=lookup_q, **options
    )


@pytest.mark.parametrize("method", ["product", "cross", "euc"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_derivatives_are_those_of_finite_differences(implementation, method, dropout_p):
    config = RPEConfig(method=method, skip=1)
    padding = torch.zeros(2, LENGTH, dtype=torch.bool)
    padding[0, 5:] = padding[1] = True

    def seeded(*args: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(5)
        options = {"dropout_p": dropout_p, "key_padding": padding, "want_sums": True}
        return attend(*args, config, implementation=implementation, **options)

    torch.autograd.gradcheck(seeded, inputs(config=config), fast_mode=True)


@pytest.mark.parametrize("want_sums", [True, False])
def test_opcheck(implementation, want_sums):
    q, k, v, lookup_k, lookup_q = inputs()
    tail = (None, torch.zeros(1, dtype=torch.int64), want_sums, 0.3, 0.0, implementation)
    arguments = (q, k, v, lookup_k, lookup_q, *grid_buckets(CONFIG, *GRID), *tail)
    torch.library.opcheck(torch.ops.rpe_ops.attention.default, arguments)
    out, sums, lse = torch.ops.rpe_ops.attention.default(*arguments)
    saved = (*(x.detach() for x in arguments[:5]), *arguments[5:14], out, sums, lse)
    backward = (torch.randn_like(out), torch.randn_like(sums) if want_sums else None, *saved)
    backward = [x.detach() if isinstance(x, Tensor) else x for x in backward]
    torch.library.opcheck(
        torch.ops.rpe_ops.attention_backward.default, (*backward, 0.3, 0.0, implementation)
    )


def test_it_compiles_and_checkpoints_into_the_same(implementation):
    args = inputs(torch.float32)

    def function(*args: Tensor) -> Tensor:
        out, sums = attend(*args, want_sums=True, implementation=implementation)
        return out.sum(-1) + sums.cos().sum(-1)

    expected = function(*args)
    wanted = torch.autograd.grad(expected.sum(), args)
    compiled = torch.compile(function, fullgraph=True)(*args)
    torch.testing.assert_close(compiled, expected)
    for actual, grad in zip(torch.autograd.grad(compiled.sum(), args), wanted, strict=True):
        torch.testing.assert_close(actual, grad)
    again = checkpoint(function, *args, use_reentrant=False)
    for actual, grad in zip(torch.autograd.grad(again.sum(), args), wanted, strict=True):
        assert torch.equal(actual, grad)


def test_dropout_repeats_with_the_generator_and_is_redrawn_otherwise(implementation):
    args = inputs()
    torch.manual_seed(1)
    first, _ = attend(*args, dropout_p=0.5, implementation=implementation)
    other, _ = attend(*args, dropout_p=0.5, implementation=implementation)
    torch.manual_seed(1)
    again, _ = attend(*args, dropout_p=0.5, implementation=implementation)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("dropout_p", [0.1, 0.5])
def test_the_mask_drops_what_it_should_and_neighbours_know_nothing_of_each_other(dropout_p):
    keep = keep_mask(torch.tensor([2**40 + 7]), 2, 4, 200, 300, dropout_p).double()
    count = keep.numel()
    deviation = (dropout_p * (1 - dropout_p) / count) ** 0.5
    assert abs(keep.mean() - (1 - dropout_p)) < 5 * deviation
    rest = keep - keep.mean()
    for other in (rest.roll(1, -1), rest.roll(1, -2), rest.roll(1, 1), rest.roll(1, 0)):
        correlation = (rest * other).mean() / rest.square().mean()
        assert abs(correlation) < 5 / count**0.5


def test_flops_are_those_of_torchs_attention():
    args = inputs(torch.float32)
    counts = []
    for function in (
        lambda q, k, v, *_: torch.nn.functional.scaled_dot_product_attention(q, k, v),
        lambda *args: attend(*args, implementation="reference")[0],
    ):
        with FlopCounterMode(display=False) as counter:
            function(*args)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 4 * 2 * 3 * LENGTH**2 * 8
    with FlopCounterMode(display=False) as counter:
        attend(*args, implementation="reference")[0].sum().backward()
    assert counter.get_total_flops() == 14 * 2 * 3 * LENGTH**2 * 8


WRONG = {
    "q must be": lambda a: a.update(q=a["q"][:, :, 1:]),
    "k must have the shape of q": lambda a: a.update(k=a["k"][..., :4]),
    "v must have the dtype of q": lambda a: a.update(v=a["v"].float()),
    "lookup_k must expand to": lambda a: a.update(lookup_k=a["lookup_k"][..., 1:]),
    "lookup_q must have the dtype": lambda a: a.update(lookup_q=a["lookup_q"].half()),
    "key_padding must be bool": lambda a: a.update(key_padding=torch.zeros(2, LENGTH)),
    r"dropout_p must be in \[0, 1\), got 1": lambda a: a.update(dropout_p=1),
    "scale must not be 0": lambda a: a.update(scale=0.0),
    "unknown rpe_ops implementation 'fast'": lambda a: a.update(implementation="fast"),
}


@pytest.mark.parametrize(("message", "spoil"), WRONG.items(), ids=WRONG)
def test_wrong_arguments_are_named(message, spoil):
    arguments = dict(zip(("q", "k", "v", "lookup_k", "lookup_q"), inputs(), strict=True))
    spoil(arguments)
    with pytest.raises(ValueError, match=message):
        attend(**arguments)
