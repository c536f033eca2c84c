"""The valid small inputs that the campaign mutates: data sets, options and trained checkpoints."""

import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

import classification.training  # noqa: F401  (the forked children have it imported)
import detection.training  # noqa: F401
from classification.main import main as classify
from datasets.scenes import SceneOptions, write_scenes
from detection.main import main as detect
from tests.campaign.oracle import run_forked
from tests.rpe_ops.extension import provide_library

__all__ = ["CLASSIFIER", "DETECTOR", "Base", "make_base"]

_CLASSIFIER = (
    "--model deit_tiny_patch16_224 --rpe rpe-1.9-product-ctx-1-qkv --input_size 16 --patch_size 4 "
    "--embed_dim 32 --depth 1 --num_heads 2 --mlp_ratio 2 --batch_size 4 --num_workers 0 "
    "--no-scale_lr --warmup_epochs 0 --device cpu --logger none --epochs 2"
)
_DETECTOR = (
    "--backbone small --backbone_weights none --backbone_norm batch --backbone_stride 16 "
    "--hidden_dim 16 --nheads 2 --dim_feedforward 32 --enc_layers 1 --dec_layers 1 "
    "--num_queries 8 --enc_rpe2d rpe-2.0-product-ctx-1-qkv --batch_size 2 --num_workers 0 "
    "--image_size 64 --device cpu --logger none --epochs 2"
)
CLASSIFIER, DETECTOR = _CLASSIFIER.split(), _DETECTOR.split()


@dataclass(frozen=True)
class Base:
    """Folders and checkpoints, which no case changes.

    Attributes:
        images: Three classes in folders and tars.
        scenes: Scenes in COCO's format, images in folders.
        zipped: The same in zips.
        classifier: Output folder of a classifier after one epoch.
        detector: Output folder of a detector after one epoch.
    """

    images: Path
    scenes: Path
    zipped: Path
    classifier: Path
    detector: Path

    @property
    def folders(self) -> tuple[Path, ...]:
        """All folders."""
        return self.images, self.scenes, self.zipped, self.classifier, self.detector


def make_base(root: Path) -> Base:
    """Load the C++ operators, write the data and train the two models.

    Raises:
        RuntimeError: A training failed, so no case would mean anything.
    """
    provide_library()
    names = ("images", "scenes", "zipped", "classifier", "detector")
    base = Base(*(root / name for name in names))
    _write_images(base.images)
    write_scenes(base.scenes, SceneOptions(train=4, val=2, folders=True))
    write_scenes(base.zipped, SceneOptions(train=4, val=2))
    for command, flags, folder in (
        (classify, [*CLASSIFIER, "--data_path", str(base.images)], base.classifier),
        (detect, [*DETECTOR, "--coco_path", str(base.scenes)], base.detector),
    ):
        argv = [*flags, "--max_steps", "1", "--output_dir", str(folder)]
        end = run_forked(command, argv, root / f"log_{folder.name}")
        if end.code != 0:
            raise RuntimeError(f"the valid run failed: {end.output}")
    return base


def _write_images(root: Path) -> None:
    """Write random images of three classes as folders and as tars."""
    generator = np.random.default_rng(0)
    for split, number in (("train", 3), ("val", 2)):
        for label in "abc":
            folder = root / split / label
            folder.mkdir(parents=True)
            for index in range(number):
                pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
        with tarfile.open(root / f"{split}.tar", "w") as tar:
            tar.add(root / split, ".")
