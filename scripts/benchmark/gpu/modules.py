"""Checks of whole attentions: composed attention against float64, and compiled modules."""

import torch
from torch import Tensor, nn

from irpe_core import RPEAttention, RPEConfig, build_rpe, rpe_attention, set_implementation
from scripts.benchmark.gpu.comparison import close
from scripts.benchmark.gpu.setup import Setup, require_implementation

__all__ = ["compiled", "composed"]


def composed(setup: Setup, dtype: torch.dtype, implementation: str) -> dict:
    """Compare attention that is composed of gather, bucket sum and torch with float64.

    The logits of composed attention have the precision of `dtype`, so more is allowed.
    """
    require_implementation(implementation, setup, "gather")
    worst: dict = {}
    for letters in ("k", "qkv"):
        config = RPEConfig(ratio=1.9, method="product", skip=1, rpe_on=letters)
        heads, grid = (1, (1, 2)) if setup.dry_run else (3, (7, 9))
        encodings = nn.ModuleList(x for x in build_rpe(config, 32, heads) if x is not None)
        for parameter in encodings.parameters():
            nn.init.normal_(parameter, std=0.25)
        encodings.to(setup.device, dtype)
        shape = (2, heads, grid[0] * grid[1] + 1, 32)
        inputs = [torch.randn(shape).to(setup.device, dtype) for _ in range(4)]
        actual = _composed_results(encodings, letters, implementation, grid, inputs)
        wide = [x.double() for x in inputs]
        expected = _composed_results(encodings.double(), letters, "reference", grid, wide)
        found = close(actual, expected, 8 if dtype.itemsize == 2 else 32)
        worst = found if found["roundings"] >= worst.get("roundings", 0.0) else worst
    return worst


def _composed_results(
    encodings: nn.ModuleList,
    letters: str,
    implementation: str,
    grid: tuple[int, int],
    inputs: list[Tensor],
) -> list[Tensor]:
    """Return the output and all gradients of composed attention."""
    set_implementation(encodings, implementation, inputs[0].device)
    given = iter(encodings)
    rpe = [next(given) if letter in letters else None for letter in "qkv"]
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    height, width = grid
    # A mask of single pairs prevents the fused operator.
    mask = inputs[0].new_ones(1, 1, *inputs[0].shape[2:3] * 2, dtype=torch.bool)
    out = rpe_attention(*leaves, *rpe, height=height, width=width, attn_mask=mask)
    return [out.detach(), *torch.autograd.grad(out, [*leaves, *encodings.parameters()], inputs[3])]


def compiled(setup: Setup, mode: str, implementation: str) -> dict:
    """Compare a compiled attention module with the same module that is not compiled."""
    require_implementation(implementation, setup, "attention")
    options: dict = {"mode": mode}
    if not setup.on_gpu:
        if mode != "default":
            setup.require_gpu(f"the mode {mode}")
        options = {"backend": "aot_eager"}
    config = RPEConfig(ratio=1.9, method="product", skip=1, rpe_on="qkv")
    heads, grid = (1, (1, 2)) if setup.dry_run else (3, (7, 9))
    module = RPEAttention(16 * heads, heads, config, grid).to(setup.device)
    for name, parameter in module.named_parameters():
        if "lookup_table" in name:
            nn.init.normal_(parameter, std=0.25)
    set_implementation(module, implementation, setup.device)
    torch.compiler.reset()
    traced = torch.compile(module, fullgraph=True, **options)
    result: dict = {}
    # A mode with CUDA graphs records in the first calls and replays in later ones.
    for _ in range(4 if setup.on_gpu else 1):
        x = torch.randn(2, grid[0] * grid[1] + 1, 16 * heads, device=setup.device)
        expected = _module_results(module, module, x)
        result = close(_module_results(traced, module, x), expected, 2000)
    return result


def _module_results(call, module: nn.Module, x: Tensor) -> list[Tensor]:
    """Return copies of the output and of all gradients."""
    x = x.clone().requires_grad_()
    out = call(x)
    grads = torch.autograd.grad(out.square().sum(), [x, *module.parameters()])
    return [y.detach().clone() for y in (out, *grads)]
