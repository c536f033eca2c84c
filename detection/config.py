"""The options of the detection trainer. Each is a YAML key, a flag and an attribute.

Names and defaults are those of DETR, so commands for DETR keep working; `enc_rpe2d` is from iRPE.
One default differs: `device` is a GPU only if there is one.

torch is imported only to check values, so that `--help` does not wait for it.
"""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from engine import Config, RunConfig, parse_config
from engine.flags import COMMON, HIDDEN

__all__ = ["DetectionConfig", "parse_args"]


class BackboneConfig(Config):
    """Backbone."""

    backbone: Literal["resnet18", "resnet34", "resnet50", "resnet101", "small"] = "resnet50"
    """Backbone: a ResNet of torchvision, or a small network for small images."""
    backbone_norm: Literal["frozen", "batch"] = "frozen"
    """Batch norm of the backbone: frozen, or trained (batch) for training from scratch."""
    backbone_stride: int = 32
    """Stride of the backbone in pixels: 32, or 16 without the last stage."""
    dilation: bool = False
    """Replace stride by dilation in the last stage (DC5)."""
    position_embedding: Literal["sine", "learned", "none"] = "sine"
    """Type of absolute position encoding of the feature map, in the encoder and the decoder."""

    @field_validator("backbone_stride")
    @classmethod
    def _check_stride(cls, stride: int) -> int:
        """Refuse a stride other than 16 and 32."""
        if stride not in (16, 32):
            raise ValueError("must be 16 or 32")
        return stride


class TransformerConfig(Config):
    """Transformer."""

    enc_rpe2d: str = ""
    """iRPE to add to every encoder layer, such as rpe-2.0-product-ctx-1-k; empty adds none (see
    docs/equip.md)."""
    rpe_implementation: Literal["auto", "cuda", "triton", "cpp", "reference"] = "auto"
    """Implementation of iRPE's operators; auto is the fastest that runs (see python -m rpe_ops)."""
    enc_layers: int = Field(6, ge=1, le=1000)
    """Number of encoder layers."""
    dec_layers: int = Field(6, ge=1, le=1000)
    """Number of decoder layers."""
    dim_feedforward: int = Field(2048, ge=1)
    """Number of hidden channels of the feed-forward blocks."""
    hidden_dim: int = Field(256, ge=2)
    """Number of channels of a token."""
    nheads: int = Field(8, ge=1)
    """Number of attention heads."""
    num_queries: int = Field(100, ge=1)
    """Number of object queries, the maximum number of detections per image."""
    pre_norm: bool = False
    """Normalize before each block instead of after it."""
    num_classes: int | None = Field(None, ge=1)
    """Number of classes without no-object; none uses that of the data (91 for COCO)."""
    masks: bool = False
    """Add a mask head, and train and evaluate instance masks."""

    @field_validator("enc_rpe2d")
    @classmethod
    def _check_spec(cls, spec: str) -> str:
        """Refuse a malformed spec."""
        from irpe_core import parse_rpe_spec

        parse_rpe_spec(spec)
        return spec


class StartConfig(Config):
    """Initial weights and dropout."""

    backbone_weights: str = "imagenet"
    """Initial weights of the backbone: imagenet (torchvision's), none, or a path or URL."""
    finetune: str = ""
    """Path or URL of a checkpoint to fine-tune, also with other classes or without iRPE."""
    frozen_weights: str | None = None
    """Path or URL of the checkpoint of a detector to freeze, so that only the masks are trained."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Dropout probability of the transformer."""


class LossConfig(Config):
    """Matching and losses."""

    aux_loss: bool = True
    """Apply the losses to every decoder layer, not only to the last."""
    set_cost_class: float = Field(1, ge=0, le=1e6)
    """Weight of the class probability in the matching cost."""
    set_cost_bbox: float = Field(5, ge=0, le=1e6)
    """Weight of the L1 distance of the boxes in the matching cost."""
    set_cost_giou: float = Field(2, ge=0, le=1e6)
    """Weight of the generalized IoU of the boxes in the matching cost."""
    cls_loss_coef: float = Field(1, ge=0, le=1e6)
    """Weight of the classification loss."""
    mask_loss_coef: float = Field(1, ge=0, le=1e6)
    """Weight of the focal loss of the masks."""
    dice_loss_coef: float = Field(1, ge=0, le=1e6)
    """Weight of the Dice loss of the masks."""
    bbox_loss_coef: float = Field(5, ge=0, le=1e6)
    """Weight of the L1 loss of the boxes."""
    giou_loss_coef: float = Field(2, ge=0, le=1e6)
    """Weight of the generalized IoU loss of the boxes."""
    eos_coef: float = Field(0.1, ge=0, le=1e6)
    """Weight of the no-object class in the classification loss."""


class DataConfig(Config):
    """Data."""

    dataset_file: Literal["coco", "scenes"] = "coco"
    """Data set: COCO's layout, or built-in scenes of digits, written to coco_path at first use."""
    coco_path: Annotated[str | None, COMMON] = None
    """Folder of the data: COCO's layout, with annotations/, and train2017 and val2017 as folders or
    .zip files, or an export in COCO's format (see docs/data.md)."""
    coco_panoptic_path: Annotated[None, HIDDEN] = None
    """Accepted for compatibility with DETR; must be none, panoptic data is not supported."""
    train_images: str | None = None
    """Folder or .zip file of training images, for a data set without COCO's layout."""
    train_annotations: str | None = None
    """Annotations of the training images, a JSON file in COCO's format."""
    val_images: str | None = None
    """Folder or .zip file of validation images, for a data set without COCO's layout."""
    val_annotations: str | None = None
    """Annotations of the validation images, a JSON file in COCO's format."""
    train_val_split: float | None = Field(None, gt=0, lt=1)
    """Fraction of the training images to use for validation if the data has no validation split;
    the chosen images are saved with the data."""
    split_seed: int = Field(0, ge=0)
    """Random seed of train_val_split."""
    remove_difficult: Annotated[bool, HIDDEN] = False
    """Accepted for compatibility with DETR, which ignores it; must be false."""
    augment: Literal["recipe", "none"] = "recipe"
    """Augmentation of training images: the recipe of DETR (flips, scales, crops), or none."""
    image_size: int | None = Field(None, ge=1)
    """Short side of evaluated images in pixels; training sizes scale with it; none uses 800."""
    eval_padding: bool = False
    """Evaluate batches padded to their largest image, as published; else without padding."""
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    """Maximum fraction of unreadable images; above it the run stops (checked from 10 unreadable
    images on, with 0 from the first)."""
    decoder: Literal["auto", "pillow", "simplejpeg"] = "auto"
    """Decoder of JPEG files for training; auto is simplejpeg if it is installed, else Pillow."""

    @field_validator("remove_difficult")
    @classmethod
    def _check_remove_difficult(cls, remove: bool) -> bool:
        """Refuse true, instead of ignoring it as DETR does."""
        if remove:
            raise ValueError("must be false (COCO marks no object as difficult)")
        return remove

    @property
    def own_data(self) -> tuple[str | None, ...]:
        """Images and annotations of the two splits of a data set without COCO's layout."""
        return (
            self.train_images,
            self.train_annotations,
            self.val_images,
            self.val_annotations,
        )


class OptimConfig(Config):
    """Optimizer and schedule."""

    lr: float = Field(1e-4, gt=0, le=1000)
    """Learning rate, except for the backbone."""
    lr_backbone: float = Field(1e-5, ge=0, le=1000)
    """Learning rate of the backbone; 0 freezes it."""
    weight_decay: float = Field(1e-4, ge=0, le=1000)
    """Weight decay of all parameters."""
    clip_max_norm: float = Field(0.1, ge=0)
    """Maximum norm of the gradient; 0 disables clipping."""
    lr_drop: int = Field(200, ge=1)
    """Number of epochs between drops of the learning rate to a tenth in the step schedule."""
    sched: Literal["step", "cosine"] = "step"
    """Learning rate schedule: drops by lr_drop, or a cosine to a hundredth at the end."""
    warmup_steps: int = Field(0, ge=0)
    """Number of optimizer steps of linear warm-up."""
    model_ema: bool = False
    """Keep an EMA (exponential moving average) of the weights, and evaluate it too."""
    model_ema_decay: float = Field(0.9997, ge=0, lt=1)
    """Decay of the EMA per optimizer step."""
    model_ema_warmup: bool = False
    """Start the EMA with a small decay that rises to model_ema_decay, for short runs."""


class DetectionConfig(
    BackboneConfig, TransformerConfig, StartConfig, LossConfig, DataConfig, OptimConfig, RunConfig
):
    """Training and evaluation of DETR with iRPE."""

    batch_size: int = Field(2, ge=1)
    """Input batch size per process."""
    seed: int = Field(42, ge=0, lt=2**64)
    """Random seed."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of automatic mixed precision; auto is float32, as in DETR."""
    grad_checkpointing: bool = False
    """Recompute the transformer and the backbone, if its norms are frozen, in the backward pass
    instead of storing their activations: less memory, more time, the same gradients."""

    @model_validator(mode="after")
    def _check_combination(self) -> "DetectionConfig":
        """Refuse options that contradict each other."""
        if self.hidden_dim % self.nheads:
            raise ValueError(
                f"--nheads must divide --hidden-dim, got {self.nheads} and {self.hidden_dim}"
            )
        if self.set_cost_class == self.set_cost_bbox == self.set_cost_giou == 0:
            raise ValueError(
                "--set-cost-class, --set-cost-bbox and --set-cost-giou must not all be 0"
            )
        if self.finetune and self.resume:
            raise ValueError("--finetune and --resume exclude each other: both set the weights")
        if self.frozen_weights and not self.masks:
            raise ValueError("--frozen-weights needs --masks: only the mask head would be trained")
        if self.dataset_file == "scenes" and not self.coco_path:
            raise ValueError(
                "--dataset-file scenes needs --coco-path, where the scenes are written"
            )
        if self.train_val_split and (self.val_images or self.val_annotations):
            raise ValueError(
                "--train-val-split must be none with --val-images and --val-annotations"
            )
        options = ("--train-images", "--train-annotations", "--val-images", "--val-annotations")
        given = [option for option, path in zip(options, self.own_data, strict=True) if path]
        if self.coco_path and given:
            raise ValueError(f"--coco-path must be none with {' and '.join(given)}")
        return self


def parse_args(argv: list[str] | None = None) -> DetectionConfig:
    """Parse flags, and the YAML file of `--config` if it is given.

    An error ends the program with one line on stderr and exit code 2.

    Args:
        argv: Flags; None for those of the process.
    """
    return parse_config(
        DetectionConfig, argv, prog="detection.main", description=DetectionConfig.__doc__
    )
