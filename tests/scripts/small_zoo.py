"""A zoo of a tiny classifier and a tiny detector."""

from pathlib import Path

import yaml

from scripts.zoo.rows import Zoo, load_zoo

__all__ = ["make_zoo"]

CLASSIFIER = {
    "model": "deit_tiny_patch16_224",
    "rpe": "rpe-1.9-product-ctx-1-qkv",
    "input_size": 16,
    "patch_size": 4,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "num_workers": 0,
}
DETECTOR = {
    "enc_rpe2d": "rpe-2.0-product-ctx-1-k",
    "backbone": "small",
    "backbone_weights": "none",
    "backbone_norm": "batch",
    "backbone_stride": 16,
    "hidden_dim": 16,
    "nheads": 2,
    "dim_feedforward": 32,
    "enc_layers": 1,
    "dec_layers": 1,
    "num_queries": 8,
    "num_classes": 11,
    "image_size": 64,
    "num_workers": 0,
}


def make_zoo(folder: Path, url: str, **classifiers: dict) -> Zoo:
    """Write and load a zoo of `digits`, further classifiers of its configuration, and `scenes`.

    Args:
        folder: Folder of the files.
        url: URL of the folder of the checkpoints.
        classifiers: Entries of classifiers in zoo.yaml, which may replace `digits`.
    """
    for name, config in (("digits", CLASSIFIER), ("scenes", DETECTOR)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    rows = {"digits": {"checkpoint": f"{url}/digits.pth"}} | classifiers
    content = {
        "source": "a test",
        "classification": {name: {"config": "digits.yaml"} | row for name, row in rows.items()},
        "detection": {
            "scenes": {
                "config": "scenes.yaml",
                "checkpoint": f"{url}/scenes.pth",
                "published": {"AP": 0.5},
            }
        },
    }
    (folder / "zoo.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return load_zoo(folder / "zoo.yaml")
