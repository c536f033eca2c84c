"""Checks of the operators under special conditions: streams, devices, graphs, strides, sizes."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from rpe_ops import implementations
from scripts.benchmark.gpu import modules
from scripts.benchmark.gpu.comparison import (
    Workload,
    attention_workload,
    close,
    gather_workload,
    short,
)
from scripts.benchmark.gpu.setup import (
    Check,
    Setup,
    SkipError,
    import_tests,
    poisoned_memory,
    require_implementation,
)

__all__ = ["checks", "problem"]

_WORKLOADS = {"attention": attention_workload, "gather": gather_workload}
_DTYPES = (torch.bfloat16, torch.float32)
# Sizes of a dry run, because Triton's interpreter is slow.
_TINY = {
    "attention": {"grid": (1, 2), "dim": 16, "batch": 1, "heads": 1},
    "gather": {"tokens": 5},
}


def problem(setup: Setup, implementation: str, case):
    """Return the random inputs of a case with the kernels of an implementation."""
    require_implementation(implementation, setup, "attention")
    tests = import_tests("rpe_ops.attention_cases")
    kernels = implementations.load(implementation)
    return tests.Problem(case, kernels, str(setup.device))


def checks(setup: Setup, implementation: str, operator: str) -> dict[str, Check]:
    """Return the checks of an operator of an implementation by name."""
    found: dict[str, Check] = {}
    for dtype in _DTYPES[: 1 if setup.dry_run else None]:
        for name, check in {
            "two runs are equal": _two_runs,
            "another stream": _another_stream,
            "CUDA graph": _cuda_graph,
            "another device": _another_device,
        }.items():
            found[f"{name}, {short(dtype)}"] = partial(_run, check, setup, operator, dtype)
    if operator == "gather":
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            found[f"composed attention, {short(dtype)}"] = partial(modules.composed, setup, dtype)
    if operator == "attention":
        found["CUDA graph with dropout"] = partial(_graph_with_dropout, setup)
        for axis in ("batch", "head", "token"):
            found[f"strides above 2^31 elements, {axis}"] = partial(
                setup.alone, 10, partial(_large_strides, setup, axis)
            )
        found["any strides"] = partial(_any_strides, setup)
        found["more than 2^31 elements"] = partial(setup.alone, 50, partial(_large_output, setup))
        for mode in ("default", "reduce-overhead"):
            found[f"torch.compile, {mode}"] = partial(modules.compiled, setup, mode)
    return {
        f"{operator}, {implementation}: {name}": partial(check, implementation)
        for name, check in found.items()
    }


def _run(check, setup: Setup, operator: str, dtype: torch.dtype, implementation: str) -> dict:
    """Run a check of a workload."""
    require_implementation(implementation, setup, operator)
    sizes = _TINY[operator] if setup.dry_run else {}
    workload = _WORKLOADS[operator](implementation, dtype, setup.device, **sizes)
    return check(setup, workload)


def _two_runs(setup: Setup, workload: Workload) -> dict:
    """Check that two runs are equal in every bit."""
    with poisoned_memory():
        first, second = (workload.run(*workload.inputs) for _ in range(2))
    for i, (x, y) in enumerate(zip(first, second, strict=True)):
        assert torch.equal(x, y), f"result {i} differs between two runs"
    return {}


def _another_stream(setup: Setup, workload: Workload) -> dict:
    """Check that the kernels run on the current stream, after what was queued there."""
    setup.require_gpu("another stream")
    expected = workload.run(*workload.inputs)
    late = [torch.full_like(x, float("nan")) for x in workload.inputs]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # The inputs are ready about 50 ms later; kernels on another stream would read NaN.
        getattr(torch.cuda, "_sleep", lambda cycles: None)(100_000_000)
        for x, y in zip(late, workload.inputs, strict=True):
            x.copy_(y)
        actual = workload.run(*late)
    torch.cuda.synchronize()
    return close(actual, expected, 2)


def _another_device(setup: Setup, workload: Workload) -> dict:
    """Check that tensors of a device that is not the current one give the same results."""
    setup.require_gpu("another device")
    if torch.cuda.device_count() < 2:
        raise SkipError("needs two GPUs, there is one")
    with torch.cuda.device(0):
        actual = workload.run(*(x.to("cuda:1") for x in workload.inputs))
    return close(actual, workload.run(*workload.inputs), 2)


def _captured(workload: Workload, static: Sequence[Tensor]):
    """Capture a workload; return the graph and its outputs."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            workload.run(*static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = workload.run(*static)
    return graph, outputs


def _cuda_graph(setup: Setup, workload: Workload) -> dict:
    """Check that a captured graph computes the results of new inputs."""
    setup.require_gpu("a CUDA graph")
    static = [x.clone() for x in workload.inputs]
    graph, outputs = _captured(workload, static)
    result: dict = {}
    for _ in range(2):
        for x in static:
            x.copy_(torch.randn_like(x) / 2)
        graph.replay()
        torch.cuda.synchronize()
        result = close(outputs, workload.run(*static), 8)
    return result


def _graph_with_dropout(setup: Setup, implementation: str) -> dict:
    """Check that every replay of a captured graph draws another dropout mask."""
    require_implementation(implementation, setup, "attention")
    setup.require_gpu("a CUDA graph")
    workload = attention_workload(implementation, torch.float32, setup.device, dropout_p=0.5)
    graph, outputs = _captured(workload, workload.inputs)
    found = []
    for _ in range(2):
        graph.replay()
        torch.cuda.synchronize()
        found.append([x.clone() for x in outputs])
        assert all(torch.isfinite(x).all() for x in outputs), "a result is not finite"
    assert not torch.equal(found[0][0], found[1][0]), "two replays have the same dropout mask"
    return {}


def _case(setup: Setup, **settings):
    """Return a case with encodings on queries, keys and values."""
    tests = import_tests("rpe_ops.attention_cases")
    sizes = {"grid": (1, 2)} if setup.dry_run else {"grid": (5, 5), "dim": 32}
    return tests.Case(rpe_on="qkv", skip=1, batch=2, heads=2, **sizes, **settings)


def _checked(setup: Setup, implementation: str, given) -> dict:
    """Compare a problem with the oracle."""
    tests = import_tests("rpe_ops.attention_cases")
    with poisoned_memory():
        actual = given.by_kernels()
    tests.check(actual, given.by_oracle(), given.case.dtype, rounds_lookups=True)
    return {}


def _large_strides(setup: Setup, axis: str, implementation: str) -> dict:
    """Check queries, keys, values and gradients whose elements are far apart in memory."""
    given = problem(setup, implementation, _case(setup, dtype=torch.bfloat16))
    shape = _, heads, length, dim = given.q.shape
    size = given.q.numel()
    far = 2 ** (31 if setup.on_gpu else 12)
    # Every step along the axis skips all other elements of the four tensors.
    place, strides = {
        "batch": (0, [0, length * dim, dim, 1]),
        "head": (1, [length * dim, 0, dim, 1]),
        "token": (2, [heads * dim, dim, 0, 1]),
    }[axis]
    strides[place] = 4 * size + far // (shape[place] - 1)
    memory = torch.empty(
        strides[place] * (shape[place] - 1) + 4 * size, dtype=given.q.dtype, device=setup.device
    )
    for i, name in enumerate(("q", "k", "v", "grad_out")):
        view = memory.as_strided(shape, strides, i * size)
        view.copy_(getattr(given, name))
        setattr(given, name, view)
    return _checked(setup, implementation, given)


def _any_strides(setup: Setup, implementation: str) -> dict:
    """Check inputs that are transposed, have gaps or strides of 0."""
    given = problem(setup, implementation, _case(setup))
    for name in ("q", "v", "table_k", "table_v"):
        x = getattr(given, name)
        setattr(given, name, x.transpose(-1, -2).contiguous().transpose(-1, -2))
    given.k = given.k.repeat_interleave(2, -1)[..., ::2]
    given.grad_out = torch.ones((), device=setup.device).expand(given.q.shape)
    return _checked(setup, implementation, given)


def _large_output(setup: Setup, implementation: str) -> dict:
    """Check outputs and gradients with more than 2³¹ elements, by a batch of equal images."""
    require_implementation(implementation, setup, "attention")
    sizes = _TINY["attention"] if setup.dry_run else {"grid": (13, 15), "dim": 64}
    workload = attention_workload(implementation, torch.bfloat16, setup.device, **sizes)
    q, k, v, *tables, grad = workload.inputs
    small = [x[:1] for x in (q, k, v)]
    expected = workload.run(*small, *tables, grad[:1])
    batch = 2**31 // small[0].numel() + 1 if setup.on_gpu else 3
    wide = [x.expand(batch, -1, -1, -1) for x in (*small, grad[:1])]
    actual = workload.run(*wide[:3], *tables, wide[3])
    worst = {"roundings": 0.0, "allowed": 8.0}
    for x, y in zip(actual[:4], expected[:4], strict=True):
        for part in x.split(1024):
            found = close([part], [y.expand_as(part)], 8)
            worst["roundings"] = max(worst["roundings"], found["roundings"])
    return worst
