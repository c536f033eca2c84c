"""The options of the classification trainer. Each is a YAML key, a flag and an attribute.

Names and defaults are those of DeiT, so commands for DeiT keep working. Two defaults differ:
`data_path` is empty, and `device` is a GPU only if there is one.

torch and timm are imported only to check values, so that `--help` does not wait for them.
"""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from datasets.names import DataSetName, InatCategory
from engine import Config, RunConfig, parse_config
from engine.flags import COMMON, HIDDEN

__all__ = ["ClassificationConfig", "parse_args"]


class ModelConfig(Config):
    """Model."""

    model: str = "deit_base_patch16_224"
    """Model name in timm's registry, which includes the DeiT-iRPE models."""
    rpe: str = ""
    """iRPE to add to every block, such as rpe-1.9-product-ctx-1-k, or rope, timm's rotary position
    embedding; empty adds none (see docs/equip.md)."""
    rpe_implementation: Literal["auto", "cuda", "triton", "cpp", "reference"] = "auto"
    """Implementation of iRPE's operators; auto is the fastest that runs (see python -m rpe_ops)."""
    abs_pos_embed: bool | Literal["sine"] = True
    """Absolute position embedding: learned (true), none (false), or fixed sines and cosines
    (sine)."""
    distillation_token: bool = False
    """Add the distillation token and head of DeiT."""
    input_size: int | tuple[int, int] = 224
    """Image size in pixels: one side, or height and width."""
    patch_size: int | None = Field(None, ge=1)
    """Side of a patch in pixels; none uses that of the model."""
    embed_dim: int | None = Field(None, ge=1)
    """Number of channels of a token; none uses that of the model."""
    depth: int | None = Field(None, ge=1, le=1000)
    """Number of blocks; none uses that of the model."""
    num_heads: int | None = Field(None, ge=1)
    """Number of attention heads; none uses that of the model."""
    mlp_ratio: float | None = Field(None, gt=0)
    """Ratio of the hidden channels of the MLP to embed_dim; none uses that of the model."""

    @field_validator("model")
    @classmethod
    def _check_model(cls, name: str) -> str:
        """Refuse a name that is not in timm's registry."""
        import timm

        import classification.models  # noqa: F401  (registers the published models)

        if not timm.is_model(name):
            raise ValueError("must be a model name of timm.list_models()")
        return name

    @field_validator("rpe")
    @classmethod
    def _check_spec(cls, spec: str) -> str:
        """Refuse a malformed spec."""
        from irpe_core import parse_rpe_spec

        if spec != "rope":
            parse_rpe_spec(spec)
        return spec

    @field_validator("input_size")
    @classmethod
    def _check_size(cls, size: int | tuple[int, int]) -> int | tuple[int, int]:
        """Refuse sides below 1."""
        if min((size,) if isinstance(size, int) else size) < 1:
            raise ValueError("must be at least 1 pixel per side")
        return size

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images in pixels."""
        size = self.input_size
        return (size, size) if isinstance(size, int) else size


class StartConfig(Config):
    """Initial weights and dropout."""

    pretrained: bool = False
    """Start from the published weights, or evaluate them with --eval."""
    finetune: str = ""
    """Path or URL of a checkpoint to fine-tune, also of another image size, with other classes or
    without iRPE."""
    drop: float = Field(0.0, ge=0, lt=1)
    """Dropout probability of the projections and the head."""
    drop_path: float = Field(0.1, ge=0, lt=1)
    """Stochastic depth probability of the last block; it rises linearly from 0 in the first."""


class DataConfig(Config):
    """Data."""

    data_path: Annotated[str, COMMON] = ""
    """Folder of the data, with train/ and val/ or valid/, or with train.tar and val.tar."""
    data_set: DataSetName = "IMNET"
    """Data set: ImageNet's layout, CIFAR-100, iNaturalist 2018 or 2019, or built-in digits or
    directions between digits."""
    inat_category: InatCategory = "name"
    """Taxonomic rank of the classes of iNaturalist."""
    load_tar: bool = False
    """Read the images from train.tar and val.tar without unpacking them."""
    train_val_split: float | None = Field(None, gt=0, lt=1)
    """Fraction of the training images to use for validation if the data has no validation split;
    the chosen images are saved with the data."""
    split_seed: int = Field(0, ge=0)
    """Random seed of train_val_split and max_train_samples."""
    max_train_samples: int | None = Field(None, ge=1)
    """Number of training images to use, the same number of each class; a smaller number is a subset
    of a larger one. None uses all."""
    pin_mem: bool = True
    """Pin the memory of loaded batches for faster transfer to a GPU."""
    repeated_aug: bool = True
    """Repeated augmentation: three copies of an image per step, a third of the images per epoch."""
    dist_eval: bool = True
    """Divide the validation set among the processes; the metrics do not change."""
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    """Maximum fraction of unreadable images; above it the run stops (checked from 10 unreadable
    images on, with 0 from the first)."""
    decoder: Literal["auto", "pillow", "simplejpeg"] = "auto"
    """Decoder of JPEG files for training; auto is simplejpeg if it is installed, else Pillow."""


class AugmentConfig(Config):
    """Augmentation."""

    augment: Literal["recipe", "affine", "none"] = "recipe"
    """Augmentation of training images: the recipe of DeiT, affine transforms only, or none."""
    color_jitter: float | None = Field(0.4, ge=0)
    """Strength of color jitter; used only if aa is none."""
    aa: str | None = "rand-m9-mstd0.5-inc1"
    """AutoAugment or RandAugment policy in timm's notation; none disables it."""
    augment_on: Literal["cpu", "device"] = "cpu"
    """Device of RandAugment's operations: the workers, or the device of the model."""
    train_interpolation: Literal["random", "bilinear", "bicubic"] = "bicubic"
    """Interpolation for resizing training images."""
    smoothing: float = Field(0.1, ge=0, lt=1)
    """Label smoothing."""
    reprob: float = Field(0.25, ge=0, le=1)
    """Probability of random erasing."""
    remode: Literal["const", "rand", "pixel"] = "pixel"
    """Fill of erased regions: the mean color, one random color or random pixels."""
    recount: int = Field(1, ge=1)
    """Maximum number of erased regions per image."""
    resplit: Annotated[bool, HIDDEN] = False
    """Accepted for compatibility with DeiT, which ignores it; must be false."""
    mixup: float = Field(0.8, ge=0)
    """Alpha of mixup; 0 disables it."""
    cutmix: float = Field(1.0, ge=0)
    """Alpha of cutmix; 0 disables it."""
    cutmix_minmax: tuple[float, float] | None = None
    """Minimum and maximum relative side of the cutmix region; enables cutmix without alpha."""
    mixup_prob: float = Field(1.0, ge=0, le=1)
    """Probability of applying mixup or cutmix."""
    mixup_switch_prob: float = Field(0.5, ge=0, le=1)
    """Probability of cutmix instead of mixup if both are enabled."""
    mixup_mode: Literal["batch", "pair", "elem"] = "batch"
    """Scope of the random mixing parameters: the batch, a pair of images or one image."""

    @field_validator("resplit")
    @classmethod
    def _check_resplit(cls, resplit: bool) -> bool:
        """Refuse true, instead of ignoring it as DeiT does."""
        if resplit:
            raise ValueError("must be false (there are no augmentation splits)")
        return resplit

    @field_validator("cutmix_minmax")
    @classmethod
    def _check_cutmix(cls, sides: tuple[float, float] | None) -> tuple[float, float] | None:
        """Refuse sides that are reversed or outside of the image."""
        if sides is not None and not 0 <= sides[0] < sides[1] <= 1:
            raise ValueError("must be a minimum and a larger maximum, both in [0, 1]")
        return sides

    @property
    def mixes(self) -> bool:
        """True if mixup or cutmix is enabled."""
        return self.mixup > 0 or self.cutmix > 0 or self.cutmix_minmax is not None


class OptimConfig(Config):
    """Optimizer and schedule."""

    opt: str = "adamw"
    """Optimizer name in timm's registry."""
    opt_eps: float = Field(1e-8, gt=0)
    """Epsilon of the optimizer."""
    opt_betas: tuple[float, float] | None = None
    """Betas of the optimizer; none uses its default."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of the optimizer, if it has one."""
    weight_decay: float = Field(0.05, ge=0, le=1000)
    """Weight decay, except for biases, norms, position embedding and tokens."""
    clip_grad: float | None = Field(None, gt=0)
    """Maximum norm of the gradient; none disables clipping."""
    lr: float = Field(5e-4, gt=0, le=1000)
    """Learning rate for a total batch size of 512, or for any with --no-scale-lr."""
    scale_lr: bool = True
    """Scale lr in proportion to the total batch size; warmup_lr and min_lr are not scaled."""
    layer_decay: float | None = Field(None, gt=0, le=1)
    """Factor of the learning rate from each block to the block before it, for fine-tuning; none
    trains all blocks with the same."""
    sched: Literal["cosine", "tanh", "step", "multistep", "poly", "plateau"] = "cosine"
    """Learning rate schedule, one of timm's."""
    warmup_lr: float = Field(1e-6, ge=0, le=1000)
    """Learning rate at the start of the warm-up."""
    min_lr: float = Field(1e-5, ge=0, le=1000)
    """Minimum learning rate of the cosine, tanh, poly and plateau schedules."""
    warmup_epochs: int = Field(5, ge=0)
    """Number of epochs of linear warm-up."""
    cooldown_epochs: Annotated[int, HIDDEN] = Field(10, ge=0)
    """Accepted for compatibility with DeiT; no effect, because training ends after epochs."""
    decay_epochs: float = Field(30, gt=0)
    """Number of epochs between drops of the learning rate in the step schedule."""
    decay_rate: float = Field(0.1, gt=0)
    """Factor of each drop in the step, multistep and plateau schedules; power of the poly
    schedule."""
    patience_epochs: int = Field(10, ge=0)
    """Number of epochs without improvement before a drop in the plateau schedule."""
    lr_noise: tuple[float, ...] | None = None
    """Start, or start and end, of learning rate noise, as fractions of epochs; none disables it."""
    lr_noise_pct: float = Field(0.67, gt=0)
    """Maximum learning rate noise, relative to the learning rate."""
    lr_noise_std: float = Field(1.0, ge=0)
    """Standard deviation of the learning rate noise."""
    model_ema: bool = True
    """Keep an EMA (exponential moving average) of the weights, and evaluate it too."""
    model_ema_decay: float = Field(0.99996, ge=0, lt=1)
    """Decay of the EMA per optimizer step."""
    model_ema_warmup: bool = False
    """Start the EMA with a small decay that rises to model_ema_decay, for short runs."""
    model_ema_force_cpu: bool = False
    """Keep the EMA on the CPU."""

    @field_validator("opt_betas")
    @classmethod
    def _check_betas(cls, betas: tuple[float, float] | None) -> tuple[float, float] | None:
        """Refuse betas that no optimizer accepts."""
        if betas is not None and not all(0 <= beta < 1 for beta in betas):
            raise ValueError("must be two values in [0, 1)")
        return betas

    @field_validator("opt")
    @classmethod
    def _check_optimizer(cls, name: str) -> str:
        """Refuse a name that is not in timm's registry."""
        from timm.optim import list_optimizers

        if name not in list_optimizers():
            raise ValueError("must be an optimizer name of timm.optim.list_optimizers()")
        return name

    @model_validator(mode="after")
    def _check_noise(self) -> "OptimConfig":
        """Refuse noise that timm would draw again without end: it draws until one is small."""
        if self.lr_noise is not None and self.lr_noise_pct < self.lr_noise_std / 1000:
            raise ValueError(
                "--lr-noise-pct must be at least a thousandth of --lr-noise-std, "
                f"got {self.lr_noise_pct} and {self.lr_noise_std}"
            )
        return self


class DistillConfig(Config):
    """Distillation."""

    distillation_type: Literal["none", "soft", "hard"] = "none"
    """Distillation from a teacher: none, its probabilities (soft) or its labels (hard)."""
    teacher_model: str = "regnety_160"
    """Model name of the teacher in timm's registry."""
    teacher_path: str = ""
    """Path or URL of the checkpoint of the teacher."""
    distillation_alpha: float = Field(0.5, ge=0, le=1)
    """Weight alpha of the distillation loss; the loss on the labels has the weight 1 - alpha."""
    distillation_tau: float = Field(1.0, gt=0)
    """Temperature of soft distillation."""


class ClassificationConfig(
    ModelConfig, StartConfig, DataConfig, AugmentConfig, OptimConfig, DistillConfig, RunConfig
):
    """Training and evaluation of DeiT with iRPE."""

    batch_size: int = Field(64, ge=1)
    """Input batch size per process."""
    num_workers: int = Field(10, ge=0, le=1024)
    """Number of data loading processes per training process."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of automatic mixed precision; auto is float16 on a GPU as in DeiT, else float32."""
    grad_checkpointing: bool = False
    """Recompute the blocks in the backward pass instead of storing their activations: less memory,
    more time, the same gradients."""

    @model_validator(mode="after")
    def _check_combination(self) -> "ClassificationConfig":
        """Refuse options that contradict each other."""
        if self.resume and self.pretrained:
            raise ValueError("--resume and --pretrained exclude each other: both set the weights")
        if self.finetune and self.pretrained:
            raise ValueError("--finetune and --pretrained exclude each other: both set the weights")
        if self.distillation_type != "none":
            if not self.teacher_path:
                raise ValueError(
                    "--distillation-type needs --teacher-path, the teacher's checkpoint"
                )
            if not self.distillation_token and "_distilled_" not in self.model:
                raise ValueError(
                    "--distillation-type needs --distillation-token: its head learns from the "
                    "teacher"
                )
        if self.patch_size is not None and self.patch_size > min(self.image_size):
            raise ValueError(
                f"--patch-size must be at most the smaller side of the images, "
                f"{min(self.image_size)}, got {self.patch_size}"
            )
        if self.cutmix_minmax is not None:
            least, most = self.cutmix_minmax
            side = min(self.image_size)
            if int(side * least) == int(side * most):
                raise ValueError(
                    "--cutmix-minmax must have at least one pixel between its values for images "
                    f"of {side} pixels, got {least} and {most}"
                )
        if self.mixes and self.batch_size % 2 and not self.eval:
            raise ValueError(
                f"--batch-size must be even with mixup or cutmix, got {self.batch_size}"
            )
        return self


def parse_args(argv: list[str] | None = None) -> ClassificationConfig:
    """Parse flags, and the YAML file of `--config` if it is given.

    An error ends the program with one line on stderr and exit code 2.

    Args:
        argv: Flags; None for those of the process.
    """
    return parse_config(
        ClassificationConfig,
        argv,
        prog="classification.main",
        description=ClassificationConfig.__doc__,
    )
