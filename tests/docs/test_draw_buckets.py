"""The pictures of the README show what their axes say."""

from pathlib import Path

import pytest
import timm
import torch

from classification.build import create_model
from classification.config import parse_args
from engine import dump
from examples import draw_buckets
from irpe_core import add_irpe, bucket_ids

DIGITS = Path(__file__).parents[2] / "configs" / "classification" / "digits.yaml"
SIZES = {"img_size": 24, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}


def vit(spec: str) -> torch.nn.Module:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, **SIZES)
    return add_irpe(model, spec)


def test_encodings_are_products_of_the_mean_query_and_the_table():
    model = vit("rpe-1.9-product-ctx-1-k")
    query = torch.randn(2, 8)
    for block in model.blocks:
        torch.nn.init.zeros_(block.attn.qkv.weight)
        torch.nn.init.normal_(block.attn.rpe_k.lookup_table_weight)
        with torch.no_grad():
            block.attn.qkv.bias[:16] = query.flatten()
    encodings = draw_buckets.mean_encodings(model, torch.randn(3, 3, 24, 24))
    for block, encoding in zip(model.blocks, encodings, strict=True):
        expected = query @ block.attn.rpe_k.lookup_table_weight[0] / 8**0.5
        torch.testing.assert_close(encoding, expected)


def test_turned_squares_have_a_key_where_it_is_seen_from_the_query():
    ids = bucket_ids("product", 3, 3, 1.9)[4].view(3, 3)
    square = torch.arange(49).view(7, 7).flip(0, 1)
    assert torch.equal(square[2:5, 2:5], ids)


def write_checkpoint(folder: Path, **options: object) -> Path:
    """Write a checkpoint of the classifier of the quickstart, untrained."""
    config = parse_args(["--config", str(DIGITS), "--data-path", str(folder / "digits")])
    config = config.model_copy(update=options)
    file = folder / "checkpoint.pth"
    content = {"model": create_model(config, 10).state_dict(), "args": dump(config)}
    torch.save(content | {"classes": [str(i) for i in range(10)]}, file)
    return file


def test_both_pictures_are_drawn(tmp_path):
    file = write_checkpoint(tmp_path)
    draw_buckets.main(["--checkpoint", str(file), "--output", str(tmp_path)])
    for name in ("buckets.png", "learned_table.png"):
        assert 5_000 < (tmp_path / name).stat().st_size < 200_000


@pytest.mark.parametrize("rpe", ["", "rpe-1.9-cross-ctx-1-k", "rpe-1.9-product-ctx-1-q"])
def test_a_model_without_the_table_is_refused_in_one_line(rpe, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(draw_buckets, "draw_methods", lambda path: None)
    file = write_checkpoint(tmp_path, rpe=rpe)
    with pytest.raises(SystemExit):
        draw_buckets.main(["--checkpoint", str(file), "--output", str(tmp_path)])
    assert "iRPE by the product method, contextual, on k" in capsys.readouterr().err
