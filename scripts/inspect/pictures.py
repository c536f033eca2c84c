"""The pictures of `scripts.inspect`, which imports this after its flags."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from datasets.image_files import read_image
from engine import UsageError, UserError, replacing, require
from engine.pictures import to_pixels
from engine.prediction import check_outputs
from scripts.inspect.attention import attention_figure
from scripts.inspect.buckets import bucket_figure
from scripts.inspect.layers import encodings_of, record_attention, rpe_layers
from scripts.inspect.source import Source, is_published, open_source
from scripts.inspect.tables import table_figure

if TYPE_CHECKING:
    from scripts.inspect.__main__ import InspectConfig

__all__ = ["draw"]

_FOLDER = "inspect"
_DPI = 110


def draw(config: "InspectConfig") -> None:
    """Draw the pictures and print their paths."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    require("matplotlib", "scripts.inspect")
    folder = _output_folder(config)
    picture = read_image(config.image) if config.image else None
    source = open_source(
        config.checkpoint,
        model=config.model,
        enc_rpe2d=config.enc_rpe2d,
        use_ema=config.use_ema,
    )
    figures = _figures(config, source, picture)
    paths = {folder / f"{name}.png": figure for name, figure in figures.items()}
    check_outputs(paths, force=config.force)
    for path, figure in paths.items():
        with replacing(path, suffix=".png") as temporary:
            figure.savefig(temporary, dpi=_DPI)
        print(path)


def _output_folder(config: "InspectConfig") -> Path:
    """Return the folder for the pictures.

    Raises:
        UsageError: The checkpoint is downloaded, so it has no folder.
    """
    if config.output_dir:
        return Path(config.output_dir)
    if "://" in config.checkpoint or is_published(config.checkpoint):
        raise UsageError(f"--output-dir must be given for {config.checkpoint}, got none")
    return Path(config.checkpoint).parent / _FOLDER


def _figures(
    config: "InspectConfig", source: Source, picture: Image.Image | None
) -> dict[str, Any]:
    """Draw all pictures; their names are those of the files.

    Raises:
        UsageError: The query is outside the grid.
        UserError: The model has no iRPE.
    """
    layers = rpe_layers(source.model)
    if not layers:
        raise UserError(f"{config.checkpoint} must be a model with iRPE, got one without")
    image = source.transform(picture or source.blank())
    attentions = record_attention(source.model, image[None])
    encodings = encodings_of(layers[0])
    rpe = next(iter(encodings.values())).config
    grid = attentions[0].grid
    query = _query(config, grid)
    figures = {"buckets": bucket_figure(rpe, grid, query)}
    for letter in encodings:
        figures[f"table_{letter}"] = table_figure(
            layers, letter, grid, reads_class_token=source.reads_class_token
        )
    if picture is None:
        return figures
    options = {"letters": "".join(encodings), "skip": rpe.skip}
    statistics = {name: source.metadata["transform"][name] for name in ("mean", "std")}
    pixels = to_pixels(image, **statistics).permute(1, 2, 0) / 255
    note = ""
    if source.reads_class_token:
        note = (
            f"Layer {len(layers)}: only the class token's row reaches the loss. The table is not "
            "trained for this query."
        )
    figures["attention"] = attention_figure(attentions, pixels, query, note=note, **options)
    if rpe.skip:
        figures["attention_class_token"] = attention_figure(attentions, pixels, None, **options)
    return figures


def _query(config: "InspectConfig", grid: tuple[int, int]) -> tuple[int, int]:
    """Return row and column of the query, by default the center.

    Raises:
        UsageError: The query is outside the grid.
    """
    query = config.query or (grid[0] // 2, grid[1] // 2)
    if not all(0 <= place < length for place, length in zip(query, grid, strict=True)):
        raise UsageError(
            f"--query must be a row from 0 to {grid[0] - 1} and a column from 0 to {grid[1] - 1}, "
            f"got {query[0]} {query[1]}"
        )
    return query
