"""Draw the buckets of the four methods, and the tables that a classifier has learned.

    python -m examples.draw_buckets
    python -m examples.draw_buckets --checkpoint outputs/quickstart/irpe/checkpoint.pth

`buckets.png` shows the bucket of every key around one query on a grid of 14 x 14 tokens, at the
ratios of the paper's ablation. With `--checkpoint`, `learned_table.png` shows what a trained table
of the product method on k adds to the logits of an average query: `mean(q)·d^-0.5·T[:, bucket]` for
every head and layer, laid out as the square of all buckets.
"""

import argparse
import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib import pyplot as plt
from PIL import Image
from torch import Tensor, nn

from classification.build import create_model
from classification.config import ClassificationConfig
from classification.data import build_split
from datasets import normalize_pixels
from irpe_core import (
    CheckpointError,
    ContextualRPE,
    RPEConfig,
    load_checkpoint,
    piecewise_index,
)
from scripts.inspect.buckets import draw_buckets

__all__ = ["draw_learned_table", "draw_methods", "mean_encodings"]

GRID = 14
QUERY = (6, 6)
# Method → ratio, as in the paper's ablation.
RATIOS = {"euc": 20.0, "quant": 33.0, "cross": 20.0, "product": 1.9}
IMAGES = 64


def draw_methods(path: Path) -> None:
    """Draw the four methods as panels of one picture."""
    figure, panels = plt.subplots(2, 2, figsize=(10, 10.6), layout="constrained")
    for panel, method in zip(panels.flat, RATIOS, strict=True):
        draw_buckets(panel, RPEConfig(RATIOS[method], method), (GRID, GRID), QUERY)
    figure.suptitle(
        f"Buckets of all keys for the query in row {QUERY[0]}, column {QUERY[1]} of a "
        f"{GRID} × {GRID} grid\n"
        "lines: borders of buckets; color: distance of the bucket; ★: the query",
        fontsize=13,
    )
    content = io.BytesIO()
    figure.savefig(content, dpi=120)
    plt.close(figure)
    # A palette makes the file a quarter as large.
    Image.open(content).convert("RGB").quantize(128).save(path, optimize=True)


@torch.no_grad()
def mean_encodings(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Compute what each layer's table adds to the logits of an average query.

    Args:
        model: A vision transformer of timm with iRPE on k.
        images: Normalized images `(B, 3, height, width)`.

    Returns:
        For each layer `(H, K)`: the encoding of every bucket for the mean query of each head, over
        images and the tokens of the grid.
    """
    queries: list[Tensor] = []

    def keep_mean_query(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        queries.append(output[:, model.num_prefix_tokens :].mean((0, 1)).chunk(3)[0])  # (C,)

    attentions = [block.attn for block in model.blocks]
    hooks = [attention.qkv.register_forward_hook(keep_mean_query) for attention in attentions]
    model.eval()(images)
    for hook in hooks:
        hook.remove()
    encodings = []
    for attention, query in zip(attentions, queries, strict=True):
        table = attention.rpe_k.lookup_table_weight  # (Hs, d, K)
        q = query.unflatten(0, (attention.num_heads, 1, -1)) * table.shape[1] ** -0.5
        encodings.append((q @ table)[:, 0])
    return encodings


def draw_learned_table(checkpoint: dict, path: Path) -> None:
    """Draw the encodings of every layer and head of a trained classifier.

    Args:
        checkpoint: A checkpoint of `classification.main`, whose `args` name the model and its data.
        path: Picture to write.

    Raises:
        ValueError: The model has no contextual product method on k.
    """
    config = ClassificationConfig.model_validate(checkpoint["args"] | {"eval": True})
    model = create_model(config, len(checkpoint["classes"]), checkpoint)
    rpe = getattr(model.blocks[0].attn, "rpe_k", None)
    if not isinstance(rpe, ContextualRPE) or rpe.config.method != "product":
        raise ValueError(
            f"the model must have iRPE by the product method, contextual, on k, got {config.rpe!r}"
        )
    data = build_split(config, "val", checkpoint["classes"])
    pixels = torch.stack([data[i][0] for i in range(min(IMAGES, len(data)))])
    encodings = mean_encodings(model, normalize_pixels(pixels))
    if model.global_pool == "token":
        # The class token alone is read after the last layer, so the table of this layer gets no
        # gradient.
        encodings.pop()

    side = rpe.config.side
    labels = _distances(rpe.config, max(model.patch_embed.grid_size))
    heads, layers = len(encodings[0]), len(encodings)
    figure, panels = plt.subplots(
        heads,
        layers,
        figsize=(2.6 * layers + 1.4, 2.7 * heads + 0.9),
        layout="constrained",
        squeeze=False,
        sharex=True,
        sharey=True,
    )
    limit = max(x[:, : side**2].abs().max() for x in encodings).item()
    for layer, encoding in enumerate(encodings):
        for head in range(heads):
            # Buckets count query minus key; turned, a key above the query is drawn above it.
            square = encoding[head, : side**2].view(side, side).flip(0, 1)
            axes = panels[head, layer]
            shown = axes.imshow(square.numpy(), cmap="PuOr_r", vmin=-limit, vmax=limit)
            axes.plot(side // 2, side // 2, marker="*", markersize=9, color="black")
            axes.set_title(f"layer {layer + 1}, head {head + 1}", fontsize=11)
            axes.set_xticks(range(side), ["\n".join(ends) for ends in labels], fontsize=9)
            axes.set_yticks(range(side), [", ".join(ends) for ends in labels], fontsize=9)
    figure.supxlabel("columns from the query (★) to the key, right is positive", fontsize=11)
    figure.supylabel("rows, down is positive", fontsize=11)
    figure.colorbar(shown, ax=panels, label="added to the logit of an average query", shrink=0.85)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _distances(config: RPEConfig, length: int) -> list[list[str]]:
    """Return the first and the last distance of each bucket along one axis, in rising order."""
    offsets = torch.arange(1 - length, length)
    index = piecewise_index(offsets, config.ratio, 2 * config.ratio, 8 * config.ratio)
    ends = []
    for bucket in range(-(config.side // 2), config.side // 2 + 1):
        members = offsets[index == bucket].tolist()
        ends.append([str(end).replace("-", "−") for end in sorted({*members[:1], *members[-1:]})])
    return ends


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the methods and, with `--checkpoint`, the tables of a classifier."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.draw_buckets",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", help="Checkpoint of a classifier; also draw its tables")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("docs/images"),
        metavar="FOLDER",
        help="Output folder (default: docs/images)",
    )
    args = parser.parse_args(argv)
    mpl.use("Agg")
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        draw_methods(args.output / "buckets.png")
        if args.checkpoint:
            draw_learned_table(load_checkpoint(args.checkpoint), args.output / "learned_table.png")
    except (CheckpointError, OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
