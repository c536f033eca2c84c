"""Every option of the detection trainer: one name for YAML key, flag and attribute.

Names and defaults are DETR's, so commands for it keep working, and `enc_rpe2d` is iRPE's. What
differs: `device` is found by looking, because the default must also run without a GPU.
"""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from engine import Config, RunConfig, parse_config
from irpe_core import parse_rpe_spec

__all__ = ["DetectionConfig", "parse_args"]


class BackboneConfig(Config):
    """Backbone."""

    backbone: Literal["resnet18", "resnet34", "resnet50", "resnet101", "small"] = "resnet50"
    """torchvision's ResNet, or small: a stem and three basic blocks for small images."""
    backbone_weights: str = "imagenet"
    """imagenet (torchvision's), none, or the path of a state dict."""
    backbone_norm: Literal["frozen", "batch"] = "frozen"
    """Frozen batch norm, or an ordinary one for training from scratch."""
    backbone_stride: int = 32
    """Pixels of a feature, 32 or 16; 16 leaves out the last stage."""
    dilation: bool = False
    """Dilation instead of stride in the last stage (DC5)."""
    position_embedding: Literal["sine", "learned"] = "sine"
    """Absolute encoding of the feature map."""

    @field_validator("backbone_stride")
    @classmethod
    def _known_stride(cls, stride: int) -> int:
        if stride not in (16, 32):
            raise ValueError("should be 16 or 32")
        return stride


class TransformerConfig(Config):
    """Transformer."""

    enc_rpe2d: str = ""
    """iRPE of the encoder, such as rpe-2.0-product-ctx-1-k; empty for plain DETR."""
    rpe_implementation: Literal["auto", "cuda", "triton", "cpp", "reference"] = "auto"
    """Of iRPE's operators: auto takes the fastest that runs; `python -m rpe_ops` lists them."""
    enc_layers: int = Field(6, ge=1)
    """Encoder layers."""
    dec_layers: int = Field(6, ge=1)
    """Decoder layers."""
    dim_feedforward: int = Field(2048, ge=1)
    """Hidden width of the feed-forward blocks."""
    hidden_dim: int = Field(256, ge=2)
    """Channels of the transformer."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Dropout of the transformer."""
    nheads: int = Field(8, ge=1)
    """Attention heads."""
    num_queries: int = Field(100, ge=1)
    """Object queries: the most objects of an image."""
    pre_norm: bool = False
    """Normalise before the blocks instead of behind them."""
    num_classes: int | None = Field(None, ge=1)
    """Width of the class head without no-object; none finds it from the data (COCO: 91)."""
    masks: bool = False
    """Train and evaluate instance masks."""
    frozen_weights: str | None = None
    """Checkpoint of a trained detector whose weights stay frozen under the mask head."""

    @field_validator("enc_rpe2d")
    @classmethod
    def _well_formed_spec(cls, spec: str) -> str:
        parse_rpe_spec(spec)
        return spec


class LossConfig(Config):
    """Matching and losses."""

    aux_loss: bool = True
    """Losses at every decoder layer."""
    set_cost_class: float = Field(1, ge=0)
    """Weight of the class in the matching cost."""
    set_cost_bbox: float = Field(5, ge=0)
    """Weight of the L1 distance of boxes in the matching cost."""
    set_cost_giou: float = Field(2, ge=0)
    """Weight of the generalised IoU in the matching cost."""
    cls_loss_coef: float = Field(1, ge=0)
    """Weight of the classification loss."""
    mask_loss_coef: float = Field(1, ge=0)
    """Weight of the focal loss of masks."""
    dice_loss_coef: float = Field(1, ge=0)
    """Weight of the dice loss of masks."""
    bbox_loss_coef: float = Field(5, ge=0)
    """Weight of the L1 loss of boxes."""
    giou_loss_coef: float = Field(2, ge=0)
    """Weight of the generalised IoU loss."""
    eos_coef: float = Field(0.1, ge=0)
    """Weight of the no-object class."""


class DataConfig(Config):
    """Data."""

    dataset_file: Literal["coco", "scenes"] = "coco"
    """COCO's layout, or the embedded scenes of digits, written to coco_path at first use."""
    coco_path: str | None = None
    """Folder with annotations/ and train2017, val2017 as folders or .zip files."""
    coco_panoptic_path: None = None
    """Kept for DETR's sake; panoptic data is not supported."""
    train_images: str | None = None
    """Folder or zip of a data set of your own; with the next three, instead of coco_path."""
    train_annotations: str | None = None
    """COCO-format JSON of the training images."""
    val_images: str | None = None
    """Folder or zip of validation images."""
    val_annotations: str | None = None
    """COCO-format JSON of the validation images."""
    remove_difficult: bool = False
    """Kept for DETR's sake, whose trainer never reads it; only false is possible."""
    augment: Literal["recipe", "none"] = "recipe"
    """DETR's flips, scales and crops, or nothing."""
    image_size: int | None = Field(None, ge=1)
    """Short side of every image in pixels, for small data; none follows the recipe."""
    eval_padding: bool = False
    """Evaluate batches padded to their largest image, as was published; else one size at a time."""
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    """Share of unreadable training images above which the run stops."""

    @field_validator("remove_difficult")
    @classmethod
    def _no_remove_difficult(cls, remove: bool) -> bool:
        if remove:
            raise ValueError("only false is possible: COCO marks no object as difficult")
        return remove

    @property
    def own_data(self) -> tuple[str | None, ...]:
        """The four options of a data set that is not laid out like COCO."""
        return (
            self.train_images,
            self.train_annotations,
            self.val_images,
            self.val_annotations,
        )


class OptimConfig(Config):
    """Optimizer and schedule."""

    lr: float = Field(1e-4, gt=0)
    """Learning rate."""
    lr_backbone: float = Field(1e-5, ge=0)
    """Learning rate of the backbone; 0 freezes it."""
    weight_decay: float = Field(1e-4, ge=0)
    """Weight decay, of everything."""
    clip_max_norm: float = Field(0.1, ge=0)
    """Largest norm of the gradient; 0 does not clip."""
    lr_drop: int = Field(200, ge=1)
    """Epoch after which the learning rates fall to a tenth."""
    sched: Literal["step", "cosine"] = "step"
    """Drop at lr_drop, or a cosine over all steps to a hundredth."""
    warmup_steps: int = Field(0, ge=0)
    """Optimizer steps of linear warm-up."""
    model_ema: bool = False
    """Keep an exponential moving average of the weights, and evaluate it too."""
    model_ema_decay: float = Field(0.9997, ge=0, lt=1)
    """Decay of the average per optimizer step."""
    finetune: str = ""
    """Checkpoint to start from, also of plain DETR; its class head is replaced where it differs."""


class DetectionConfig(
    BackboneConfig, TransformerConfig, LossConfig, DataConfig, OptimConfig, RunConfig
):
    """DETR with iRPE: training and evaluation."""

    batch_size: int = Field(2, ge=1)
    """Images per process and step."""
    seed: int = Field(42, ge=0)
    """Everything random follows from it."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of autocast; auto is float32, as DETR was trained."""

    @model_validator(mode="after")
    def _fits_together(self) -> "DetectionConfig":
        if self.hidden_dim % self.nheads:
            raise ValueError(
                f"nheads must divide hidden_dim, got {self.nheads} and {self.hidden_dim}"
            )
        if self.set_cost_class == self.set_cost_bbox == self.set_cost_giou == 0:
            raise ValueError("set_cost_class, set_cost_bbox and set_cost_giou must not all be 0")
        if self.finetune and self.resume:
            raise ValueError("finetune and resume exclude each other: both give the weights")
        if self.frozen_weights and not self.masks:
            raise ValueError("frozen_weights needs masks: it freezes the detector under them")
        if self.dataset_file == "scenes" and not self.coco_path:
            raise ValueError("dataset_file scenes needs coco_path, where the scenes are written")
        if self.coco_path and any(self.own_data):
            raise ValueError("coco_path excludes train_images, val_images and their annotations")
        return self


def parse_args(argv: list[str] | None = None) -> DetectionConfig:
    """Turn flags, and a YAML file given with `--config`, into the configuration.

    A mistake ends the program with one line on stderr and exit code 2.

    Args:
        argv: Flags; None for those of the program.
    """
    return parse_config(
        DetectionConfig, argv, prog="detection.main", description=DetectionConfig.__doc__
    )
