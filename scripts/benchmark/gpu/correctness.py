"""Section `correctness`: attention, gather and bucket sum of every implementation against float64.

Attention is compared with the equations of tests/rpe_ops/attention_oracle.py, which are independent
of the operators, by the tolerances of tests/rpe_ops/attention_cases.py. Larger grids are compared
with the reference in float64. The order is that of importance: chosen cases, special conditions,
then all combinations of methods, grids, data types and settings in a random order.
"""

import itertools
import random
from contextlib import nullcontext
from functools import partial

import torch

from rpe_ops import reference
from scripts.benchmark.gpu import conditions, operators
from scripts.benchmark.gpu.choices import families, family
from scripts.benchmark.gpu.comparison import roundings, short
from scripts.benchmark.gpu.setup import Check, Setup, import_tests, poisoned_memory

__all__ = ["checks"]

# The oracle holds (L, L, terms·K) in float64 and finds the buckets in Python loops.
_ORACLE_TOKENS = 300
FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16


def checks(setup: Setup) -> dict[str, Check]:
    """Return the checks of this section by name."""
    if setup.dry_run:
        # Fixes of Triton's interpreter; the module reads TRITON_INTERPRET when it is imported.
        import_tests("rpe_ops.interpreter")
    cases = import_tests("rpe_ops.attention_cases")
    found: dict[str, Check] = {"an injected error is found": partial(_injected_error, setup)}
    selected = _tiny_cases(cases) if setup.dry_run else _selected_cases(cases)
    kernels = "triton"
    others = [name for name in ("cpp", "reference") if setup.dry_run or name == "reference"]
    found |= _of_cases(setup, kernels, selected)
    for name in families():
        found |= _of_cases(setup, kernels, selected, name)
    found |= operators.checks(setup, kernels)
    found |= conditions.checks(setup, kernels, "attention")
    found |= conditions.checks(setup, kernels, "gather")
    for name in others:
        found |= _of_cases(setup, name, selected[:3] if setup.dry_run else selected)
        found |= operators.checks(setup, name, large=False)
    return found | _of_cases(setup, kernels, _all_cases(cases, setup.dry_run))


def _of_cases(
    setup: Setup, implementation: str, cases: list, kernels: str = ""
) -> dict[str, Check]:
    """Return one check per case, of the chosen kernels or of one family."""
    title = f"attention, {implementation}{f' {kernels}' if kernels else ''}"
    return {
        f"{title}: {_describe(case)}": partial(_check_case, setup, implementation, case, kernels)
        for case in cases
    }


def _describe(case) -> str:
    """Describe a case by its settings."""
    height, width = case.grid
    words = [case.method, case.rpe_on or "none", f"{height}x{width}", short(case.dtype)]
    words += [f"B{case.batch}", f"H{case.heads}", f"d{case.dim}", f"skip{case.skip}"]
    words += ["padding"] * case.padding + ["bias"] * case.bias + ["of heads"] * (not case.shared)
    return " ".join(words + [f"dropout {case.dropout_p}"] * (case.dropout_p > 0))


def _tiny_cases(cases) -> list:
    """Return a few small cases, which Triton's interpreter computes in a second each."""
    case = cases.Case
    return [
        case(rpe_on="qkv", grid=(2, 3), skip=1),
        case("cross", "k", (2, 2), dtype=BFLOAT16, padding=True, dropout_p=0.1, batch=2),
        case("euc", "v", (1, 3), dtype=FLOAT16),
    ]


def _selected_cases(cases) -> list:
    """Return the shapes of the recipes and the extremes."""
    case = cases.Case
    deit = case(grid=(14, 14), skip=1, batch=2, heads=6, dim=64)
    detr = case(grid=(25, 42), batch=1, heads=2, dim=32, padding=True, dropout_p=0.1)
    letters = ("k", "qkv", "q", "v")
    found = [deit._replace(rpe_on=x, dtype=d) for x in letters for d in (BFLOAT16, FLOAT16)]
    found += [deit._replace(rpe_on=x, dtype=FLOAT32) for x in ("k", "qkv")]
    found += [detr._replace(rpe_on=x, dtype=d) for x in ("k", "qkv") for d in (BFLOAT16, FLOAT32)]
    found += [detr._replace(rpe_on=x, grid=(50, 84), dtype=BFLOAT16) for x in ("k", "qkv")]
    found += [
        deit._replace(method=m, rpe_on="qkv", dtype=BFLOAT16, padding=True, dropout_p=0.1)
        for m in ("euc", "quant", "cross")
    ]
    found += [case(rpe_on="qkv", grid=(7, 9), skip=1, dim=d) for d in (8, 16, 24, 32, 80, 128)]
    found += [
        case(rpe_on="qkv", grid=(7, 9), skip=1, dim=d, dtype=BFLOAT16)
        for d in (16, 24, 64, 80, 96, 128)
    ]
    found += [
        case(rpe_on="qkv", grid=(1, 1)),
        case("cross", "qkv", (1, 1), 2),
        case(rpe_on="qkv", grid=(1, 17), skip=1, dropout_p=0.1),
        case(rpe_on="k", grid=(17, 1)),
        case("cross", "kv", (2, 33), dtype=FLOAT16, padding=True),
        case(rpe_on="qkv", grid=(2, 2), skip=19),
        case(rpe_on="", skip=1, padding=True, batch=2),
        case("euc", "k", (13, 21), 1, BFLOAT16, heads=3),
        case("quant", "qk", (3, 90), 1, BFLOAT16, padding=True, dropout_p=0.5, batch=2),
    ]
    return found


def _all_cases(cases, dry_run: bool) -> list:
    """Return all combinations of methods, grids, data types and settings, in a random order."""
    methods, dtypes = ("product", "euc", "quant", "cross"), (BFLOAT16, FLOAT16, FLOAT32)
    found = [
        setting._replace(method=method, grid=grid, dtype=dtype)
        for method, grid, dtype, setting in itertools.product(
            methods, cases.GRIDS, dtypes, cases.SETTINGS
        )
    ]
    random.Random(0).shuffle(found)
    small = [case for case in found if case.grid == (1, 1) and case.batch * case.heads < 5]
    return small[:2] if dry_run else found


def _check_case(setup: Setup, implementation: str, case, kernels: str = "") -> dict:
    """Compare all outputs and gradients of a case."""
    problem = conditions.problem(setup, implementation, case)
    tests = import_tests("rpe_ops.attention_cases")
    with poisoned_memory(), family(kernels) if kernels else nullcontext():
        actual = problem.by_kernels()
    if problem.buckets.num_tokens <= _ORACLE_TOKENS:
        expected = problem.by_oracle()
    else:
        expected = problem.widened(reference).by_kernels()
    # The reference computes in float32, the others round lookups to the data type of the inputs.
    tests.check(actual, expected, case.dtype, rounds_lookups=implementation == "triton")
    return _deviation(actual, expected, case.dtype, implementation == "triton")


def _deviation(actual, expected, dtype: torch.dtype, rounds_lookups: bool) -> dict:
    """Return the deviation that is nearest to the allowed one, in roundings, and its name."""
    found = {}
    for name, x, y in zip(actual._fields, actual, expected, strict=True):
        if x is not None and y is not None:
            is_wide = name == "lse" and not rounds_lookups
            precision = torch.promote_types(dtype, FLOAT32) if is_wide else dtype
            allowed = 32 if precision.itemsize > 2 else 8 if rounds_lookups else 4
            found[name] = {"roundings": roundings(x, y, precision), "allowed": allowed}
    name = max(found, key=lambda name: found[name]["roundings"] / found[name]["allowed"])
    return {"dtype": short(dtype), "of": name, **found[name]}


def _injected_error(setup: Setup) -> dict:
    """Check that the comparison finds an error of one element by 1 %."""
    tests = import_tests("rpe_ops.attention_cases")
    case = tests.Case(rpe_on="qkv", grid=(2, 3), skip=1)
    problem = conditions.problem(setup, "reference", case)
    expected = problem.by_oracle()
    for name in expected._fields:
        wrong = getattr(expected, name).clone()
        wrong.view(-1)[wrong.abs().argmax()] *= 1.01
        actual = expected._replace(**{name: wrong})
        try:
            tests.check(type(actual)(*(x.float() for x in actual)), expected, FLOAT32)
        except AssertionError as error:
            if name in str(error):
                continue
        raise RuntimeError(f"an error of 1 % in {name} was not found")
    return {}
