"""Parameters and multiply-accumulate operations (MACs) of a row, counted on the meta device.

The model runs once, for one image. Torch's counter counts all matrix products and convolutions.
The published MACs also count one for each element of

- the sum with a bias: patch embedding, qkv, proj, both layers of the MLP, head;
- the output of a LayerNorm or a GELU;
- the scaled queries, the scaled keys if iRPE is on the queries, and the sum with the output of
  iRPE on the values.

For iRPE on the values, the published MACs count the product of the attention with a dense
`(L, L, d)` tensor, as the original computes it: L·L·d per head. This implementation first sums the
attention over buckets, and the product costs L·K·d.

Source: the convention that gives all six published MACs exactly, rounded up to the next million.
No MACs are published for detectors; only their products and convolutions are counted.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from classification.build import create_model
from classification.config import ClassificationConfig
from detection.build import build_network
from detection.config import DetectionConfig
from detection.detr import DETR
from irpe_core import RPEAttention, ValueRPE
from scripts.zoo.rows import Row

__all__ = ["DETECTION_SIZE", "Cost", "cost_of", "cost_of_model"]

IMAGENET_CLASSES = 1000
# Size after the validation transform of a 480 x 640 image, a frequent size in COCO.
DETECTION_SIZE = (800, 1066)


class Cost(NamedTuple):
    """Parameters of a model and its MACs for one image.

    Attributes:
        params: Number of parameters, with the frozen ones.
        macs: MACs by the published convention; None for detectors.
        macs_run: MACs of this implementation, which computes less for iRPE on the values.
    """

    params: int
    macs: int | None
    macs_run: int


def cost_of(row: Row) -> Cost:
    """Count the parameters and MACs of a row's model."""
    return cost_of_model(row.config)


def cost_of_model(
    config: ClassificationConfig | DetectionConfig, num_classes: int = IMAGENET_CLASSES
) -> Cost:
    """Count the parameters and MACs of the model that the options of a trainer describe.

    Args:
        config: Options of the trainer.
        num_classes: Number of classes of a classifier. A detector has those of its options.
    """
    is_classifier = isinstance(config, ClassificationConfig)
    with torch.device("meta"):
        if is_classifier:
            model = create_model(config, num_classes)
            image = torch.empty(1, 3, *config.image_size)
        else:
            model = build_network(config, load=False)
            height, width = DETECTION_SIZE
            if config.image_size is not None:
                height, width = config.image_size, config.image_size * width // height
            image = torch.empty(1, 3, height, width)
    # FlopCounterMode would otherwise trace gradients, which inference does not need.
    model.eval().requires_grad_(False)
    params = sum(parameter.numel() for parameter in model.parameters())
    elements = _Elements(model)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        if isinstance(model, DETR):
            # `forward` sets autocast for its heads, which the meta device does not support.
            objects = model.encode(image).objects
            model.class_embed(objects)
            model.bbox_embed(objects)
        else:
            model(image)
    products = counter.get_total_flops() // 2
    if not is_classifier:
        return Cost(params, None, products)
    run = products + elements.count
    return Cost(params, run + elements.dense_value_macs, run)


class _Elements:
    """Counter of the MACs that are not matrix products, by forward hooks."""

    def __init__(self, model: nn.Module) -> None:
        self.count = 0
        self.dense_value_macs = 0
        for module in model.modules():
            if isinstance(module, (nn.LayerNorm, nn.GELU)) or (
                isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None
            ):
                module.register_forward_hook(self._add_output)
            elif isinstance(module, RPEAttention):
                module.register_forward_hook(self._add_attention)

    def _add_output(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        """Count one MAC per element of an output."""
        self.count += output.numel()

    def _add_attention(self, module: RPEAttention, inputs: tuple[Any, ...], out: Tensor) -> None:
        """Count the scaled inputs of an attention and the dense product of its values."""
        on = [rpe is not None for rpe in (module.rpe_q, module.rpe_v)]
        # Queries, keys and values each have as many elements as the input.
        self.count += inputs[0].numel() * (1 + sum(on))
        if module.rpe_v is None:
            return
        length = inputs[0].shape[1]
        for table in module.rpe_v.modules():
            if isinstance(table, ValueRPE):
                self.dense_value_macs += inputs[0].numel() * (length - table.config.num_buckets)
