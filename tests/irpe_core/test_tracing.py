"""torch.compile in one graph, torch.export, torch.fx and torch.jit.trace."""

import warnings

import pytest
import timm
import torch

from irpe_core import RPEAttention, RPEConfig, RPEMultiheadAttention, add_irpe
from irpe_core.buckets import BUCKET_CACHE
from tests.recipes import fill


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


def check_compiled(module, inputs: list[torch.Tensor], **options) -> None:
    """Compare compiled with eager values and gradients, for one input after the other."""
    compiled = torch.compile(module, fullgraph=True, **options)
    for x in inputs:
        results = []
        for run in (module, compiled):
            leaf = x.clone().requires_grad_()
            out = run(leaf)
            gradients = torch.autograd.grad(out.square().sum(), [leaf, *module.parameters()])
            results.append((out, *gradients))
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("method", "dynamic"),
    [("product", False), ("product", True), ("product", None), ("cross", None)],
)
def test_attention_compiles_into_one_graph_for_any_square(method, dynamic):
    config = RPEConfig(method=method, skip=1, rpe_on="qkv")
    module = fill(RPEAttention(12, 2, config))
    inputs = [torch.randn(2, side * side + 1, 12) for side in (3, 5)]
    check_compiled(module, inputs, backend="aot_eager", dynamic=dynamic)


@pytest.mark.parametrize(("mode", "shared"), [("bias", True), ("ctx", False)])
def test_attention_compiles_into_one_graph_on_a_rectangle(mode, shared):
    config = RPEConfig(mode=mode, shared_head=shared, rpe_on="qk")
    module = fill(RPEAttention(12, 2, config, (3, 5)))
    check_compiled(module, [torch.randn(n, 15, 12) for n in (1, 3)], backend="aot_eager")


def test_a_model_compiles_into_one_graph_and_follows_its_images():
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        depth=2,
        embed_dim=12,
        num_heads=2,
        dynamic_img_size=True,
    )
    fill(add_irpe(model, "rpe-1.9-product-ctx-1-k"))
    inputs = [torch.randn(2, 3, height, width) for height, width in ((32, 48), (48, 32))]
    check_compiled(model, inputs, backend="aot_eager")
    assert [block.attn.grid for block in model.blocks] == [(3, 2), (3, 2)]


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_attention_exports(strict):
    module = fill(RPEAttention(12, 2, RPEConfig(method="cross", skip=1, rpe_on="qkv"), (3, 5)))
    x = torch.randn(2, 16, 12)
    batch = torch.export.Dim("batch", min=1, max=8)
    exported = torch.export.export(module.eval(), (x,), dynamic_shapes=({0: batch},), strict=strict)
    for n in (2, 5):
        x = torch.randn(n, 16, 12)
        torch.testing.assert_close(exported.module()(x), module(x))


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_attention_compiles_with_inductor(dynamic):
    module = fill(RPEAttention(12, 2, RPEConfig(skip=1, rpe_on="qkv")))
    inputs = [torch.randn(2, side * side + 1, 12) for side in (3, 5)]
    check_compiled(module, inputs, dynamic=dynamic)


def traced(module: torch.nn.Module, *inputs: torch.Tensor) -> torch.nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(module, inputs)


@pytest.mark.parametrize("method", ["product", "cross"])
@pytest.mark.parametrize("grid", [None, (2, 8)], ids=["square", "rectangle"])
def test_torch_jit_trace_records_standard_operators_and_constant_buckets(method, grid):
    module = fill(RPEAttention(12, 2, RPEConfig(method=method, skip=1, rpe_on="qkv"), grid))
    x = torch.randn(2, 17, 12)
    BUCKET_CACHE.clear()
    trace = traced(module, x)
    kinds = [node.kind() for node in trace.inlined_graph.nodes()]
    assert not any(kind.startswith(("rpe_ops", "irpe_core")) for kind in kinds)
    assert "aten::arange" not in kinds
    for batch in (2, 3):
        x = torch.randn(batch, 17, 12)
        torch.testing.assert_close(trace(x), module(x), rtol=1e-5, atol=1e-5)


def test_torch_jit_trace_works_for_padded_multihead_attention():
    module = RPEMultiheadAttention(
        12, 2, batch_first=True, rpe=RPEConfig(rpe_on="qkv"), grid=(2, 4)
    )
    fill(module.eval())
    x, padding = torch.randn(2, 8, 12), torch.arange(8).repeat(2, 1) > 5
    trace = traced(module, x, x, x, padding)
    for out, expected in zip(trace(x, x, x, padding), module(x, x, x, padding), strict=True):
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_torch_fx_records_attention_as_one_node_with_its_tables():
    module = fill(RPEAttention(12, 2, RPEConfig(skip=1, rpe_on="qkv"), (2, 4)))
    graph = torch.fx.symbolic_trace(module)
    names = [getattr(node.target, "__name__", "") for node in graph.graph.nodes]
    assert names.count("_attend") == 1
    assert dict(graph.named_parameters()).keys() == dict(module.named_parameters()).keys()
    x = torch.randn(3, 9, 12)
    assert torch.equal(graph(x), module(x))
    with pytest.raises(ValueError, match="is_causal must be False"):
        graph(x, is_causal=True)
