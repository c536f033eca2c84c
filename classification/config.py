"""Every option of the classification trainer: one name for YAML key, flag and attribute.

Names and defaults are DeiT's, so commands for it keep working. What differs: no data path is
built in, and `device` is found by looking, because the default must also run without a GPU.
"""

from typing import Literal

import timm
from pydantic import Field, field_validator, model_validator
from timm.optim import list_optimizers

from engine import Config, RunConfig, parse_config
from irpe_core import parse_rpe_spec

__all__ = ["ClassificationConfig", "parse_args"]


class ModelConfig(Config):
    """Model."""

    model: str = "deit_base_patch16_224"
    """Name in timm's registry; the nine DeiT-iRPE models are in it."""
    rpe: str = ""
    """iRPE to add, such as rpe-1.9-product-ctx-1-k; empty for the model as its name says."""
    rpe_implementation: Literal["auto", "cuda", "triton", "cpp", "reference"] = "auto"
    """Of iRPE's operators: auto takes the fastest that runs; `python -m rpe_ops` lists them."""
    abs_pos_embed: bool = True
    """Keep the learned absolute position embedding."""
    distillation_token: bool = False
    """Add DeiT's distillation token and head."""
    input_size: int | tuple[int, int] = 224
    """Side of the images in pixels, or height and width."""
    drop: float = Field(0.0, ge=0, lt=1)
    """Dropout of the projections and the head."""
    drop_path: float = Field(0.1, ge=0, lt=1)
    """Stochastic depth of the last block; earlier ones have less."""
    patch_size: int | None = Field(None, ge=1)
    """Side of a patch in pixels; none as the model's name says."""
    embed_dim: int | None = Field(None, ge=1)
    """Channels of a token; none as the model's name says."""
    depth: int | None = Field(None, ge=1)
    """Number of blocks; none as the model's name says."""
    num_heads: int | None = Field(None, ge=1)
    """Attention heads; none as the model's name says."""
    mlp_ratio: float | None = Field(None, gt=0)
    """Hidden width of the MLP over embed_dim; none as the model's name says."""
    pretrained: bool = False
    """Start from (with --eval: evaluate) the published weights."""
    finetune: str = ""
    """Checkpoint to start from at another image size or number of classes, or without iRPE."""

    @field_validator("model")
    @classmethod
    def _known_model(cls, name: str) -> str:
        import classification.models  # noqa: F401  (registers the published models)

        if not timm.is_model(name):
            raise ValueError("unknown model; see timm.list_models() and the table in README.md")
        return name

    @field_validator("rpe")
    @classmethod
    def _well_formed_spec(cls, spec: str) -> str:
        parse_rpe_spec(spec)
        return spec

    @field_validator("input_size")
    @classmethod
    def _positive_size(cls, size: int | tuple[int, int]) -> int | tuple[int, int]:
        if min((size,) if isinstance(size, int) else size) < 1:
            raise ValueError("sides must be at least 1 pixel")
        return size

    @property
    def image_size(self) -> tuple[int, int]:
        """`(height, width)` of the images in pixels."""
        size = self.input_size
        return (size, size) if isinstance(size, int) else size


class DataConfig(Config):
    """Data."""

    data_path: str = ""
    """Folder with train/ and val/, or with train.tar and val.tar."""
    data_set: Literal["IMNET", "CIFAR", "INAT", "INAT19", "DIGITS"] = "IMNET"
    """ImageNet's layout, CIFAR-100, iNaturalist 2018 or 2019, or the embedded digits."""
    inat_category: Literal[
        "kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name"
    ] = "name"
    """Level of iNaturalist's labels."""
    load_tar: bool = False
    """Read train.tar and val.tar in place instead of folders."""
    pin_mem: bool = True
    """Pin loaded batches for faster copies to a GPU."""
    repeated_aug: bool = True
    """Show an image three times a step, each augmented anew, and a third of the images an epoch."""
    dist_eval: bool = True
    """Share the validation set among the processes; the figures are the same either way."""
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    """Share of unreadable training images above which the run stops."""


class AugmentConfig(Config):
    """Augmentation."""

    augment: Literal["recipe", "affine", "none"] = "recipe"
    """DeiT's recipe, random affine maps only (for digits), or nothing."""
    color_jitter: float | None = Field(0.4, ge=0)
    """Strength of color jitter; used only where aa is none."""
    aa: str | None = "rand-m9-mstd0.5-inc1"
    """AutoAugment or RandAugment policy in timm's notation."""
    train_interpolation: Literal["random", "bilinear", "bicubic"] = "bicubic"
    """Resampling of training images."""
    smoothing: float = Field(0.1, ge=0, lt=1)
    """Label smoothing."""
    reprob: float = Field(0.25, ge=0, le=1)
    """Probability of random erasing."""
    remode: Literal["const", "rand", "pixel"] = "pixel"
    """What an erased region is filled with."""
    recount: int = Field(1, ge=1)
    """Number of erased regions."""
    resplit: bool = False
    """Kept for DeiT's sake, whose trainer never reads it; only false is possible."""
    mixup: float = Field(0.8, ge=0)
    """Alpha of mixup; 0 is off."""
    cutmix: float = Field(1.0, ge=0)
    """Alpha of cutmix; 0 is off."""
    cutmix_minmax: tuple[float, float] | None = None
    """Smallest and largest side of the cut, relative; replaces cutmix's alpha."""
    mixup_prob: float = Field(1.0, ge=0, le=1)
    """Probability of mixing a batch at all."""
    mixup_switch_prob: float = Field(0.5, ge=0, le=1)
    """Probability of cutmix where both are on."""
    mixup_mode: Literal["batch", "pair", "elem"] = "batch"
    """Mix with one, pairwise, or elementwise parameters."""

    @field_validator("resplit")
    @classmethod
    def _no_resplit(cls, resplit: bool) -> bool:
        if resplit:
            raise ValueError("only false is possible: there are no augmentation splits")
        return resplit

    @property
    def mixes(self) -> bool:
        """Whether mixup or cutmix is on."""
        return self.mixup > 0 or self.cutmix > 0 or self.cutmix_minmax is not None


class OptimConfig(Config):
    """Optimizer and schedule."""

    opt: str = "adamw"
    """Optimizer in timm's notation."""
    opt_eps: float = Field(1e-8, gt=0)
    """Epsilon of the optimizer."""
    opt_betas: tuple[float, float] | None = None
    """Betas of the optimizer; none for its own."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of SGD-like optimizers."""
    weight_decay: float = Field(0.05, ge=0)
    """Weight decay; none on biases, norms, position embedding and class token."""
    clip_grad: float | None = Field(None, gt=0)
    """Largest norm of the gradient; none does not clip."""
    lr: float = Field(5e-4, gt=0)
    """Learning rate for 512 images a step, or for any number with --no-scale-lr."""
    scale_lr: bool = True
    """Scale lr in proportion to the images of a step; warmup_lr and min_lr stay as they are."""
    sched: Literal["cosine", "tanh", "step", "multistep", "poly", "plateau"] = "cosine"
    """Schedule of the learning rate, in timm's notation."""
    warmup_lr: float = Field(1e-6, ge=0)
    """Learning rate of the first epoch of the warm-up."""
    min_lr: float = Field(1e-5, ge=0)
    """Learning rate at the end."""
    warmup_epochs: int = Field(5, ge=0)
    """Epochs of linear warm-up."""
    cooldown_epochs: int = Field(10, ge=0)
    """Part of timm's schedule after the last cycle; DeiT's training ends before it."""
    decay_epochs: float = Field(30, gt=0)
    """Epochs between the steps of the step schedule."""
    decay_rate: float = Field(0.1, gt=0)
    """Factor of the step and plateau schedules."""
    patience_epochs: int = Field(10, ge=0)
    """Epochs without progress before plateau lowers the rate."""
    lr_noise: tuple[float, ...] | None = None
    """Where in the schedule noise is on, as fractions."""
    lr_noise_pct: float = Field(0.67, ge=0)
    """Limit of the noise, relative."""
    lr_noise_std: float = Field(1.0, ge=0)
    """Standard deviation of the noise."""
    model_ema: bool = True
    """Keep an exponential moving average of the weights, and evaluate it too."""
    model_ema_decay: float = Field(0.99996, ge=0, lt=1)
    """Decay of the average per optimizer step."""
    model_ema_force_cpu: bool = False
    """Keep the average on the CPU."""

    @field_validator("opt")
    @classmethod
    def _known_optimizer(cls, name: str) -> str:
        if name not in list_optimizers():
            raise ValueError("unknown optimizer; see timm.optim.list_optimizers()")
        return name


class DistillConfig(Config):
    """Distillation."""

    distillation_type: Literal["none", "soft", "hard"] = "none"
    """How to learn from a teacher."""
    teacher_model: str = "regnety_160"
    """Teacher's name in timm's registry."""
    teacher_path: str = ""
    """Teacher's checkpoint, a path or an address."""
    distillation_alpha: float = Field(0.5, ge=0, le=1)
    """Share of the teacher in the loss."""
    distillation_tau: float = Field(1.0, gt=0)
    """Temperature of soft distillation."""


class ClassificationConfig(
    ModelConfig, DataConfig, AugmentConfig, OptimConfig, DistillConfig, RunConfig
):
    """DeiT with iRPE: training and evaluation."""

    batch_size: int = Field(64, ge=1)
    """Images per process and step."""
    num_workers: int = Field(10, ge=0)
    """Loading processes per training process."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of autocast; auto is float16 with loss scaling on a GPU, as in DeiT, float32 elsewhere."""

    @model_validator(mode="after")
    def _fits_together(self) -> "ClassificationConfig":
        if self.resume and self.pretrained:
            raise ValueError("resume and pretrained exclude each other: both give the weights")
        if self.finetune and self.pretrained:
            raise ValueError("finetune and pretrained exclude each other: both give the weights")
        if self.distillation_type != "none":
            if not self.teacher_path:
                raise ValueError("distillation_type needs teacher_path, the teacher's checkpoint")
            if not self.distillation_token and "_distilled_" not in self.model:
                raise ValueError("distillation_type needs distillation_token, whose head learns it")
        if self.mixes and self.batch_size % 2 and not self.eval:
            raise ValueError(f"batch_size must be even with mixup or cutmix, got {self.batch_size}")
        return self


def parse_args(argv: list[str] | None = None) -> ClassificationConfig:
    """Turn flags, and a YAML file given with `--config`, into the configuration.

    A mistake ends the program with one line on stderr and exit code 2.

    Args:
        argv: Flags; None for those of the program.
    """
    return parse_config(
        ClassificationConfig,
        argv,
        prog="classification.main",
        description=ClassificationConfig.__doc__,
    )
