"""Lowered programs: the same values and bucket ids on any grid, with standard operators only."""

import functools

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import rpe_ops
from irpe_core import METHODS, RPEConfig, bucket_ids, build_rpe, rpe_attention, set_implementation
from irpe_core.lowering import lower
from tests.recipes import fill

RATIOS = {"euc": 2.0, "quant": 3.0, "cross": 1.9, "product": 2.0}
# Mode, shared head, rpe_on, skipped tokens.
VARIANTS = [
    ("ctx", True, "k", 0),
    ("ctx", True, "v", 0),
    ("ctx", False, "qkv", 2),
    ("bias", False, "qk", 0),
]
GRIDS = [(2, 2), (3, 5), (8, 2), (7, 9)]


class Attentions(nn.Module):
    """All variants of a method on the same tokens; the grid is that of the feature map."""

    def __init__(self, method: str) -> None:
        super().__init__()
        self.names = []
        for mode, shared, on, skip in VARIANTS:
            config = RPEConfig(RATIOS[method], method, mode, shared, skip, on)
            self.names.append(f"{method}_{mode}_{shared:d}_{on}_{skip}")
            self.add_module(self.names[-1], nn.ModuleList(build_rpe(config, 4, 2)))

    def forward(self, x: Tensor, padding: Tensor) -> dict[str, Tensor]:
        """Map features `(B, 8, h, w)` and padding `(B, h, w)` to `(B, 2, skip + h·w, 4)`."""
        height, width = x.shape[-2:]
        results = {}
        for name in self.names:
            encodings = getattr(self, name)
            skip = next(e for e in encodings if e is not None).config.skip
            q = nn.functional.pad(x.flatten(2), (skip, 0), value=0.5)
            q = q.unflatten(1, (2, 4)).transpose(-2, -1)
            allowed = nn.functional.pad(~padding.flatten(1), (skip, 0), value=True)
            k, v, mask = q.flip(-1), q.sin(), allowed[:, None, None]
            results[name] = rpe_attention(
                q, k, v, *encodings, height=height, width=width, attn_mask=mask
            )
        return results


class Buckets(nn.Module):
    """The bucket ids of all methods for the grid of a feature map."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        height, width = x.shape[-2:]
        results = {}
        for method, ratio in RATIOS.items():
            ids = bucket_ids(method, height, width, ratio, skip=1)
            results |= dict(zip((method, f"{method}_columns"), as_tuple(ids), strict=False))
        return results


def as_tuple(ids: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return ids if isinstance(ids, tuple) else (ids,)


def sample(batch: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Make features and their padding: the last row and column, except of the first image."""
    padding = torch.zeros(batch, height, width, dtype=torch.bool)
    padding[1:, -1], padding[1:, :, -1] = True, True
    return torch.randn(batch, 8, height, width), padding


def export(module: nn.Module, inputs: tuple[Tensor, ...]) -> ExportedProgram:
    """Export a module with dynamic batch, height and width."""
    axes = [range(x.dim()) if x.dim() == 3 else (0, 2, 3) for x in inputs]
    dynamic = tuple(dict.fromkeys(dims, Dim.DYNAMIC) for dims in axes)
    with torch.no_grad():
        return torch.export.export(module, inputs, dynamic_shapes=dynamic)


def run_onnx(program: ExportedProgram, names: list[str]):
    """Return a function of the inputs that runs the program in onnxruntime."""
    reason = "a package of requirements-export.txt is missing"
    onnxruntime = pytest.importorskip("onnxruntime", reason=reason)
    pytest.importorskip("onnxscript", reason=reason)
    exported = torch.onnx.export(program, output_names=names, verbose=False)
    session = onnxruntime.InferenceSession(exported.model_proto.SerializeToString())
    inputs = [node.name for node in session.get_inputs()]

    def predict(*tensors: Tensor) -> dict[str, Tensor]:
        feeds = {name: x.numpy() for name, x in zip(inputs, tensors, strict=True)}
        return dict(zip(names, map(torch.from_numpy, session.run(names, feeds)), strict=True))

    return predict


@functools.cache
def attentions(method: str) -> tuple[nn.Module, ExportedProgram]:
    module = fill(Attentions(method).eval().requires_grad_(False))
    set_implementation(module, "reference", "cpu")
    program = lower(export(module, sample(2, 4, 6)))
    # The lowered program is compared with the default implementation.
    set_implementation(module, "auto", "cpu")
    return module, program


@functools.cache
def lowered_bucket_ids() -> ExportedProgram:
    return lower(export(Buckets(), (torch.randn(2, 8, 4, 6),)))


def assert_same_attention(method: str, predict) -> None:
    module, _ = attentions(method)
    for batch, (height, width) in enumerate(GRIDS, 1):
        inputs = sample(batch, height, width)
        found, expected = predict(*inputs), module(*inputs)
        for name in module.names:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)


def assert_same_bucket_ids(predict) -> None:
    for height, width in [(2, 2), (2, 17), (5, 3), (31, 12)]:
        found = predict(torch.randn(1, 8, height, width))
        for method, ratio in RATIOS.items():
            expected = as_tuple(bucket_ids(method, height, width, ratio, skip=1))
            for name, ids in zip((method, f"{method}_columns"), expected, strict=False):
                assert torch.equal(found[name], ids), (name, height, width)


@pytest.mark.parametrize("method", METHODS)
def test_attention_of_every_kind_is_the_same_on_any_grid(method):
    assert_same_attention(method, attentions(method)[1].module())


@pytest.mark.parametrize(
    "method",
    [
        "cross",
        "product",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("euc", "quant")),
    ],
)
def test_attention_of_every_kind_is_the_same_in_onnxruntime(method):
    module, program = attentions(method)
    assert_same_attention(method, run_onnx(program, module.names))


def test_bucket_ids_are_exact_on_any_grid():
    assert_same_bucket_ids(lowered_bucket_ids().module())


def test_bucket_ids_are_exact_in_onnxruntime():
    names = ["euc", "quant", "cross", "cross_columns", "product"]
    assert_same_bucket_ids(run_onnx(lowered_bucket_ids(), names))


def test_layers_share_the_bucket_ids_of_a_grid():
    targets = [str(node.target) for node in attentions("product")[1].graph.nodes]
    # Bucket ids have one `sign` for rows and one for columns, and depend on the skipped tokens.
    assert targets.count("aten.sign.default") == 2 * len({skip for *_, skip in VARIANTS})


def test_the_error_for_fused_attention_says_what_to_do():
    class Fused(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            grid = rpe_ops.GridBuckets(*[torch.zeros(1, 1, dtype=torch.int32)] * 2, 1, 1, 0, 1, 1)
            return rpe_ops.attention(x, x, x, grid._replace(local=grid.local[None]))[0]

    program = torch.export.export(Fused(), (torch.randn(1, 1, 1, 4),))
    with pytest.raises(ValueError, match=r"rpe_ops\.attention.*set_implementation"):
        lower(program)
