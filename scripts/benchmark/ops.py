"""Measure time and memory of attention with iRPE, for every implementation that runs here.

    OMP_NUM_THREADS=2 python -m scripts.benchmark ops --output benchmarks/ops_cpu.json
    python -m scripts.benchmark ops --dtype bfloat16 --output benchmarks/ops_gpu.json

Compared attentions:

    sdpa               torch's attention without encodings, the baseline
    fused              `rpe_ops.attention`
    composed           encodings written out by `rpe_ops.gather`, then torch's attention with them
                       as a bias, or on values a softmax and `rpe_ops.bucket_sum`
    torch.gather       the same with torch's own gather, whose backward scatters (with atomics on
                       CUDA) as that of the original operator does
    flattened index    the original without its operator: lookups read through one flat index, and
                       on values a tensor of (L, L, d)
    flex_attention     FlexAttention of torch, compiled; its score function reads the lookup

All attentions run alternately in one process. Times are medians, and ratios are to `sdpa` of the
same round. Memory is the peak of forward and backward above what was allocated before. Batch sizes
are those of the recipes on a GPU, and smaller on a CPU.
"""

import argparse
import copy
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rpe_ops
from irpe_core import bucket_ids, build_rpe, parse_rpe_spec, rpe_attention, set_implementation
from irpe_core.composed import attention_weights, logit_bias
from scripts.benchmark.peak_memory import peak_memory
from scripts.benchmark.timing import clock, median_ratio, positive_int

__all__ = ["main"]


@dataclass(frozen=True)
class Shape:
    """Sizes of one attention.

    Attributes:
        batch: Batch size on a GPU.
        cpu_batch: Batch size on a CPU.
        heads: Number of heads H.
        dim: Head dim d.
        grid: Height and width in tokens.
        skip: Number of tokens before the grid.
        ratio: Ratio of the product method.
    """

    batch: int
    cpu_batch: int
    heads: int
    dim: int
    grid: tuple[int, int]
    skip: int
    ratio: float


SHAPES = {
    "DeiT-S": Shape(64, 8, 6, 64, (14, 14), 1, 1.9),
    "DeiT-B": Shape(64, 8, 12, 64, (14, 14), 1, 1.9),
    "DETR 25x42": Shape(2, 2, 8, 32, (25, 42), 0, 2.0),
    "DETR 50x84": Shape(2, 1, 8, 32, (50, 84), 0, 2.0),
}
Attention = Callable[..., Tensor]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.benchmark ops",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="Device, such as cpu or cuda:0 (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="Data type of all tensors (default: %(default)s)",
    )
    parser.add_argument(
        "--rounds",
        type=positive_int,
        default=9,
        metavar="N",
        help="Number of timed rounds, after two warm-up rounds (default: %(default)s)",
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        choices=SHAPES,
        default=list(SHAPES),
        help="Attention sizes to measure (default: all)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="JSON file to write, and a chart of the same name as .png (default: none)",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print tables, and write JSON and a chart."""
    # `engine` needs pydantic, which the GPU benchmark does without.
    from engine.provenance import machine

    args = parse_args(argv)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    report = {"machine": machine(device), "dtype": args.dtype, "rounds": args.rounds}
    report["not_run"] = {
        f"{operator} {name}": reason
        for operator in ("gather", "attention")
        for name, reason in rpe_ops.available_implementations(device, operator).items()
        if reason
    }
    report["backward_of_gather"] = measure_gather(device, dtype, args.rounds)
    report["results"] = {}
    for name in args.shapes:
        for letters in ("k", "qkv"):
            rows = measure(SHAPES[name], letters, device, dtype, args.rounds, report["not_run"])
            report["results"][f"{name} {letters}"] = rows
            print_table(f"{name}, iRPE on {letters}", rows)
    for what, reason in report["not_run"].items():
        print(f"not run: {what}: {reason}")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=2) + "\n")
        draw(report, args.output.with_suffix(".png"))


def measure_gather(device: torch.device, dtype: torch.dtype, rounds: int) -> dict[str, float]:
    """Return milliseconds of the backward of a gather by implementation, B 2 H 8 L 950 K 81."""
    index = bucket_ids("product", 25, 38, 2.0, device=device)
    lookup = torch.randn(2, 8, 950, 81, device=device, dtype=dtype, requires_grad=True)
    grad = torch.randn(2, 8, 950, 950, device=device, dtype=dtype)
    wide = index.expand(2, 8, -1, -1)
    outputs = {"torch.gather": lookup.gather(-1, wide)}
    for name, reason in rpe_ops.available_implementations(device).items():
        if not reason and name != "reference":
            outputs[name] = rpe_ops.gather(lookup, index, implementation=name)
    times: dict[str, list[float]] = {name: [] for name in outputs}
    for number in range(4 * rounds + 2):
        for name, out in outputs.items():
            start = clock(device)
            torch.autograd.grad(out, lookup, grad, retain_graph=True)
            if number >= 2:
                times[name].append(clock(device) - start)
    medians = {name: 1e3 * statistics.median(seconds) for name, seconds in times.items()}
    print("\nbackward of gather, B 2 H 8 L 950 K 81")
    for name, ms in medians.items():
        print(f"{name:<28} {ms:>9.2f} ms {ms / medians['torch.gather']:>5.2f}")
    return medians


def measure(
    shape: Shape,
    letters: str,
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
    not_run: dict[str, str],
) -> dict[str, dict[str, float]]:
    """Return milliseconds, ratios to `sdpa` and peak memory of every attention."""
    torch.manual_seed(0)
    batch = shape.batch if device.type == "cuda" else shape.cpu_batch
    length = shape.skip + shape.grid[0] * shape.grid[1]
    joint = torch.randn(batch, length, 3, shape.heads, shape.dim, device=device, dtype=dtype)
    inputs = [x.detach().requires_grad_() for x in joint.permute(2, 0, 3, 1, 4).unbind(0)]
    grad = torch.randn(batch, shape.heads, length, shape.dim, device=device, dtype=dtype)
    tasks, peaks = {}, {}
    for name, attention in attentions(shape, letters, device, dtype, not_run).items():

        def forward(attention: Attention = attention) -> None:
            with torch.no_grad():
                attention(*inputs)

        def both(attention: Attention = attention) -> None:
            torch.autograd.backward(attention(*inputs), grad)
            for x in inputs:
                x.grad = None

        tasks[name, "forward"], tasks[name, "forward + backward"] = forward, both
        both()
        peaks[name] = peak_memory(both, device)
    times: dict = {task: [] for task in tasks}
    for number in range(rounds + 2):
        for task, run in tasks.items():
            start = clock(device)
            run()
            if number >= 2:
                times[task].append(clock(device) - start)
    return {
        name: {
            kind: {
                "median_ms": 1e3 * statistics.median(times[name, kind]),
                "ratio": median_ratio(times[name, kind], times["sdpa", kind]),
            }
            for kind in ("forward", "forward + backward")
        }
        | {"peak_mb": peaks[name] / 1e6}
        for name in peaks
    }


def attentions(
    shape: Shape,
    letters: str,
    device: torch.device,
    dtype: torch.dtype,
    not_run: dict[str, str],
    *,
    interpreted: bool = False,
) -> dict[str, Attention]:
    """Return the attentions to measure by name, each a function of q, k and v.

    The reasons why others are not measured are added to `not_run`. Triton's interpreter, which runs
    on a CPU, is made for tests and not for speed, so it is left out unless `interpreted` is set.
    """
    spec = f"rpe-{shape.ratio}-product-ctx-1-{letters}"
    config = parse_rpe_spec(spec, skip=shape.skip)
    modules = nn.ModuleDict()
    for letter, module in zip("qkv", build_rpe(config, shape.dim, shape.heads), strict=True):
        if module is not None:
            modules[letter] = module.to(device, dtype)
            nn.init.normal_(module.lookup_table_weight, std=0.02)
    rpe = [getattr(modules, letter, None) for letter in "qkv"]

    def ours(implementation: str) -> Attention:
        encodings = encodings_of(modules, implementation, device)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            height, width = shape.grid
            return rpe_attention(q, k, v, *encodings, height=height, width=width)

        return attend

    found: dict[str, Attention] = {"sdpa": F.scaled_dot_product_attention}
    for name, reason in rpe_ops.available_implementations(device, "attention").items():
        left_out = name == "triton" and device.type == "cpu" and not interpreted
        if not reason and name != "reference" and not left_out:
            found[f"fused, {name}"] = ours(name)
    if device.type == "cuda" and rpe_ops.can_run("cuda", device):
        found["composed, cuda"] = ours("cuda")
    if "fused, triton" in found:
        found["composed, triton"] = composed(modules, "triton", shape.grid, device)
    if "fused, triton" in found and device.type == "cuda":
        found["auto"] = ours("auto")
    found["torch.gather"] = ours("reference")
    index = bucket_ids("product", *shape.grid, shape.ratio, shape.skip, device=device)
    # The (L, L, d) tensor of the values and its gradients must fit into memory.
    dense = 3 * index.numel() * shape.dim * dtype.itemsize
    if "v" not in letters or dense < 2e9:
        found["flattened index"] = flattened_index(rpe, index, config.num_buckets)
    else:
        not_run[f"flattened index, L {len(index)}"] = f"it needs {dense / 1e9:.1f} GB"
    if device.type == "cpu":
        not_run["flex_attention"] = "it has no backward on the CPU"
    elif letters == "k":
        found["flex_attention"] = flex(modules["k"], index)
    else:
        not_run["flex_attention qkv"] = "it cannot encode values"
    return found


def encodings_of(
    modules: nn.ModuleDict, implementation: str, device: torch.device
) -> list[nn.Module | None]:
    """Return copies of the encodings on q, k and v, with this implementation."""
    # The implementation is set once, because that would add to the time of every call.
    copies = copy.deepcopy(modules)
    set_implementation(copies, implementation, device)
    return [getattr(copies, letter, None) for letter in "qkv"]


def composed(
    modules: nn.ModuleDict, implementation: str, grid: tuple[int, int], device: torch.device
) -> Attention:
    """Return attention that is composed although the implementation has a fused one."""
    rpe_q, rpe_k, rpe_v = encodings_of(modules, implementation, device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scale = q.shape[-1] ** -0.5
        bias = logit_bias(q, k, rpe_q, rpe_k, grid, scale)
        if rpe_v is None:
            return F.scaled_dot_product_attention(q, k, v, bias)
        weights = attention_weights(q * scale, k, bias, has_mask=False)
        return weights @ v + rpe_v(weights, *grid)

    return attend


def flattened_index(rpe: list[nn.Module | None], index: Tensor, buckets: int) -> Attention:
    """Return attention that flattens the lookups of all queries and reads `i·K + bucket(i, j)`."""
    flat = (index + buckets * torch.arange(len(index), device=index.device)[:, None]).flatten()
    rpe_q, rpe_k, rpe_v = rpe

    def encode(x: Tensor, table: Tensor) -> Tensor:
        return (x @ table[0]).flatten(2)[:, :, flat].unflatten(-1, index.shape)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = q * q.shape[-1] ** -0.5
        logits = q @ k.transpose(-2, -1) + encode(q, rpe_k.lookup_table_weight)
        if rpe_q is not None:
            scaled = k * k.shape[-1] ** -0.5
            logits = logits + encode(scaled, rpe_q.lookup_table_weight).transpose(-2, -1)
        weights = logits.softmax(-1)
        out = weights @ v
        if rpe_v is not None:
            encodings = rpe_v.lookup_table_weight[0][index.flatten()].unflatten(0, index.shape)
            out = out + torch.einsum("bhij,ijd->bhid", weights, encodings)
        return out

    return attend


def flex(rpe_k: nn.Module, index: Tensor) -> Attention:
    """Return compiled FlexAttention whose score function reads the lookup."""
    from torch.nn.attention.flex_attention import flex_attention

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        lookup = q @ (rpe_k.table()[0] * q.shape[-1] ** -0.5)
        return flex_attention(q, k, v, lambda s, b, h, i, j: s + lookup[b, h, i, index[i, j]])

    return torch.compile(attend)


def print_table(title: str, rows: dict) -> None:
    """Print times, ratios and peak memory of every attention."""
    print(f"\n{title:<28} {'forward':>16} {'+ backward':>18} {'peak':>10}")
    for name, row in rows.items():
        cells = [row["forward"], row["forward + backward"]]
        times = "  ".join(f"{cell['median_ms']:>9.2f} ms {cell['ratio']:>5.2f}" for cell in cells)
        print(f"{name:<28} {times} {row['peak_mb']:>7.1f} MB")


def draw(report: dict, path: Path) -> None:
    """Draw forward + backward over `sdpa` as bars, with a panel per attention."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = report["results"]
    figure, panels = pyplot.subplots(
        1, len(results), figsize=(2.6 * len(results), 3.6), layout="constrained", sharey=True
    )
    names = list(dict.fromkeys(name for rows in results.values() for name in rows))
    colors = dict(zip(names, pyplot.get_cmap("tab10").colors, strict=False))
    for panel, (title, rows) in zip(figure.axes, results.items(), strict=True):
        for place, (name, row) in enumerate(rows.items()):
            ratio = row["forward + backward"]["ratio"]
            panel.bar(place, ratio, color=colors[name], label=name)
            panel.text(place, ratio, f"{ratio:.2f}", ha="center", va="bottom", fontsize=7)
        panel.set_title(title, fontsize=9)
        panel.set_xticks([])
        panel.set_yscale("log")
    panels[0].set_ylabel("forward + backward, times sdpa")
    bars = [bar for panel in figure.axes for bar in panel.containers]
    unique = {bar.get_label(): bar for bar in bars}
    figure.legend(unique.values(), unique, loc="outside lower center", ncols=7, fontsize=8)
    figure.suptitle(f"{report['machine']['device']}, {report['dtype']}", fontsize=10)
    figure.savefig(path, dpi=130)
