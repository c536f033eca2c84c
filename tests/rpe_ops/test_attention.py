"""rpe_ops.attention: arguments, derivatives, tracing and cost.

Its values are tested in tests/irpe_core/test_functional.py (every combination) and in
test_cpu_attention.py and test_triton_kernels.py (the kernels, every dtype).
"""

from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import rpe_ops
import rpe_ops.flops
from irpe_core import RPEConfig
from irpe_core.buckets import grid_buckets
from rpe_ops import ops
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
    """q, k, v, table_k, table_q, table_v."""
    num_lookups = grid_buckets(config, *GRID).num_lookups
    shapes = [(2, 3, LENGTH, 8)] * 3 + [(1, 8, num_lookups), (3, 8, num_lookups)]
    shapes.append((1, num_lookups, 8))
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def attend(q, k, v, table_k, table_q, table_v, config: RPEConfig = CONFIG, **options) -> Tensor:
    tables = {"table_k": table_k, "table_q": table_q, "table_v": table_v}
    return rpe_ops.attention(q, k, v, grid_buckets(config, *GRID), **tables, **options)


@pytest.mark.parametrize("method", ["product", "cross", "euc"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_derivatives_are_those_of_finite_differences(implementation, method, dropout_p):
    config = RPEConfig(method=method, skip=1)
    padding = torch.zeros(2, LENGTH, dtype=torch.bool)
    padding[0, 5:] = padding[1] = True

    def seeded(*args: Tensor) -> Tensor:
        torch.manual_seed(5)
        options = {"dropout_p": dropout_p, "key_padding": padding}
        return attend(*args, config, implementation=implementation, **options)

    torch.autograd.gradcheck(seeded, inputs(config=config), fast_mode=True)


@pytest.mark.parametrize("given", ["qkv", "k", "bias", "none", "padded bfloat16 qkv"])
def test_opcheck(implementation, given):
    hard = "padded" in given
    q, k, v, *tables = inputs(torch.bfloat16 if hard else torch.float64)
    padding = torch.arange(LENGTH).expand(2, -1) > 9 if hard else None
    if given == "bias":
        tables = [table[:, 0].detach().requires_grad_() for table in tables[:2]] + [None]
    else:
        on = given.split()[-1] if given != "none" else ""
        tables = [x if n in on else None for n, x in zip("kqv", tables, strict=True)]
    numbers = (0.3, 0.1 if hard else 0.0, implementation)
    tail = (padding, torch.zeros(1, dtype=torch.int64), *numbers)
    arguments = (q, k, v, *tables, *grid_buckets(CONFIG, *GRID), *tail)
    torch.library.opcheck(torch.ops.rpe_ops.attention.default, arguments)
    outputs = torch.ops.rpe_ops.attention.default(*arguments)
    backward = (torch.randn_like(outputs[0]), *arguments[:15], *outputs)
    backward = [x.detach() if isinstance(x, Tensor) else x for x in backward]
    torch.library.opcheck(torch.ops.rpe_ops.attention_backward.default, (*backward, *numbers))


@pytest.mark.parametrize("rpe_on", ["", "k", "qkv"])
def test_eager_attention_equals_the_operator_bit_for_bit(implementation, rpe_on):
    q, k, v, *tables = inputs(torch.float32)
    tables = [x if name in rpe_on else None for name, x in zip("kqv", tables, strict=True)]
    padding = torch.arange(LENGTH).expand(2, -1) > 9
    tail = (padding, torch.ones(1, dtype=torch.int64), 0.3, 0.1, implementation)
    buckets = grid_buckets(CONFIG, *GRID)
    wanted = [x for x in (q, k, v, *tables) if x is not None]
    eager = ops.attend(q, k, v, *tables, buckets, *tail)
    operator = ops.attention(q, k, v, *tables, *buckets, *tail)[0]
    assert "EagerAttention" in eager.grad_fn.name()
    assert "EagerAttention" not in operator.grad_fn.name()
    assert torch.equal(eager, operator)
    grad_out = torch.randn_like(eager)
    grads = [torch.autograd.grad(out, wanted, grad_out) for out in (eager, operator)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_modes_transforms_and_subclasses_get_the_operator():
    class Recorder(TorchDispatchMode):
        names: ClassVar[list[str]] = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.names.append(str(function))
            return function(*args, **(kwargs or {}))

    class Subclass(Tensor):
        pass

    arguments = inputs(torch.float32)
    with Recorder():
        attend(*arguments, implementation="reference").sum().backward()
    assert "rpe_ops.attention.default" in Recorder.names
    assert "rpe_ops.attention_backward.default" in Recorder.names
    assert ops._is_eager(tuple(arguments))
    assert not ops._is_eager((arguments[0].as_subclass(Subclass), *arguments[1:]))
    seen = []
    torch.func.vmap(lambda x: (seen.append(ops._is_eager((x,))), x)[1])(torch.ones(2, 3))
    assert seen == [False]


def test_a_second_derivative_is_an_error(implementation):
    args = inputs()
    out = attend(*args, implementation=implementation)
    (grad,) = torch.autograd.grad(out.square().sum(), args[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        (out.sum() + grad.square().sum()).backward()


def test_autocast_changes_nothing_inside(implementation):
    args = inputs(torch.float32)
    plain = torch.ops.rpe_ops.attention.default
    tail = (None, torch.zeros(1, dtype=torch.int64), 0.3, 0.0, implementation)
    arguments = (*args, *grid_buckets(CONFIG, *GRID), *tail)
    expected = plain(*arguments)
    wanted = torch.autograd.grad(expected[0].sum(), args)
    with torch.autocast("cpu", torch.bfloat16):
        found = plain(*arguments)
        grads = torch.autograd.grad(found[0].sum(), args)
    for x, y in zip((*found, *grads), (*expected, *wanted), strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


def test_compilation_and_checkpointing_change_nothing(implementation):
    args = inputs(torch.float32)

    def function(*args: Tensor) -> Tensor:
        return attend(*args, implementation=implementation).sum(-1)

    expected = function(*args)
    wanted = torch.autograd.grad(expected.sum(), args)
    compiled = torch.compile(function, fullgraph=True)(*args)
    torch.testing.assert_close(compiled, expected)
    for actual, grad in zip(torch.autograd.grad(compiled.sum(), args), wanted, strict=True):
        torch.testing.assert_close(actual, grad)
    again = checkpoint(function, *args, use_reentrant=False)
    for actual, grad in zip(torch.autograd.grad(again.sum(), args), wanted, strict=True):
        assert torch.equal(actual, grad)


def test_dropout_repeats_with_the_generator_and_differs_otherwise(implementation):
    args = inputs()
    torch.manual_seed(1)
    first = attend(*args, dropout_p=0.5, implementation=implementation)
    other = attend(*args, dropout_p=0.5, implementation=implementation)
    torch.manual_seed(1)
    again = attend(*args, dropout_p=0.5, implementation=implementation)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("dropout_p", [0.1, 0.5])
def test_the_mask_drops_the_given_share_and_adjacent_pairs_are_uncorrelated(dropout_p):
    keep = keep_mask(torch.tensor([2**40 + 7]), 2, 4, 200, 300, dropout_p).double()
    count = keep.numel()
    deviation = (dropout_p * (1 - dropout_p) / count) ** 0.5
    assert abs(keep.mean() - (1 - dropout_p)) < 5 * deviation
    rest = keep - keep.mean()
    for other in (rest.roll(1, -1), rest.roll(1, -2), rest.roll(1, 1), rest.roll(1, 0)):
        correlation = (rest * other).mean() / rest.square().mean()
        assert abs(correlation) < 5 / count**0.5


@pytest.mark.parametrize("rpe_on", ["", "k", "qkv"])
def test_flops_are_those_of_torchs_attention_and_of_the_tables(rpe_on):
    q, k, v, *tables = inputs(torch.float32)
    tables = [x if n in rpe_on else None for n, x in zip("kqv", tables, strict=True)]
    with FlopCounterMode(display=False) as plain:
        torch.nn.functional.scaled_dot_product_attention(q, k, v)
    product = 2 * 2 * 3 * LENGTH * 8
    buckets = grid_buckets(CONFIG, *GRID).num_lookups
    assert plain.get_total_flops() == 2 * product * LENGTH
    with FlopCounterMode(display=False) as counter:
        out = attend(q, k, v, *tables, implementation="reference")
    forward = counter.get_total_flops()
    assert forward == plain.get_total_flops() + len(rpe_on) * product * buckets
    with counter:
        out.sum().backward()
    # The backward recomputes the lookups of queries and keys.
    of_tables = {"": 0, "k": 3, "qkv": 8}[rpe_on] * buckets
    assert counter.get_total_flops() == product * (5 * LENGTH + of_tables)


WRONG = {
    "q must be": lambda a: a.update(q=a["q"][:, :, 1:]),
    "k must have the shape of q": lambda a: a.update(k=a["k"][..., :4]),
    "v must have the dtype of q": lambda a: a.update(v=a["v"].float()),
    r"table_k must have shape \(1 or 3, 8, 50\) or \(1 or 3, 50\)": lambda a: a.update(
        table_k=a["table_k"][..., 1:]
    ),
    "table_q must have the dtype": lambda a: a.update(table_q=a["table_q"].half()),
    r"table_v must have shape \(1 or 3, 50, 8\), got": lambda a: a.update(
        table_v=a["table_v"][:, 0]
    ),
    "key_padding must be bool": lambda a: a.update(key_padding=torch.zeros(2, LENGTH)),
    r"dropout_p must be in \[0, 1\), got 1": lambda a: a.update(dropout_p=1),
    "scale must be finite and not 0, got 0": lambda a: a.update(scale=0.0),
    "scale must be finite and not 0, got nan": lambda a: a.update(scale=float("nan")),
    r"got torch.float8_e4m3fn of shape": lambda a: a.update(q=a["q"].to(torch.float8_e4m3fn)),
    "implementation must be one of auto, .*, got 'fast'": lambda a: a.update(implementation="fast"),
}


@pytest.mark.parametrize(("message", "spoil"), WRONG.items(), ids=WRONG)
def test_wrong_arguments_are_named(message, spoil):
    arguments = dict(zip(("q", "k", "v", "table_k", "table_q", "table_v"), inputs(), strict=True))
    spoil(arguments)
    with pytest.raises(ValueError, match=message):
        attend(**arguments)
