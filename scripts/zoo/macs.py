"""Parameters and multiply-accumulates of a row, counted on the model itself without any memory.

The model runs once, on the meta device, for one image. Torch's counter sees every product of
matrices and every convolution; the published figures also count one for each element of

- a bias that is added: patch embedding, qkv, proj, both layers of the MLP, head;
- the output of a LayerNorm or a GELU;
- the scaled queries, the scaled keys where iRPE is on the queries, and the addition of iRPE's
  encoding of the values.

The original multiplies the encoding of the values by the dense `(L, L, d)` tensor, and is counted
so; here the attention is summed over buckets first, and the product has K in the place of one L.

Source: the convention that gives all six figures of the model zoo, rounded up to the next million.
A detector has no published figure, and only its products and convolutions are counted.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from classification.build import create_model
from detection.detr import DETR, build_network
from irpe_core import RPEAttention, ValueRPE
from scripts.zoo.rows import Row

__all__ = ["DETECTION_SIZE", "Cost", "cost_of"]

IMAGENET_CLASSES = 1000
# What the validation transform makes of 480 x 640, the size of many of COCO's images.
DETECTION_SIZE = (800, 1066)


class Cost(NamedTuple):
    """Of one image.

    Attributes:
        params: Parameters, frozen ones included.
        macs: By the published convention; None for detectors.
        macs_run: What is computed here: the same, but for the encoding of the values.
    """

    params: int
    macs: int | None
    macs_run: int


def cost_of(row: Row) -> Cost:
    """Count a row's parameters and multiply-accumulates."""
    config = row.config
    with torch.device("meta"):
        if row.task == "classification":
            model = create_model(config, IMAGENET_CLASSES)
            image = torch.empty(1, 3, *config.image_size)
        else:
            model = build_network(config, load=False)
            image = torch.empty(1, 3, *DETECTION_SIZE)
    # The counter follows gradients, which the models' own inference does not need.
    model.eval().requires_grad_(False)
    params = sum(parameter.numel() for parameter in model.parameters())
    elements = _Elements(model)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        if isinstance(model, DETR):
            # Not `forward`: its heads turn autocast off, which the meta device does not know.
            objects = model.encode(image).objects
            model.class_embed(objects)
            model.bbox_embed(objects)
        else:
            model(image)
    products = counter.get_total_flops() // 2
    if row.task == "detection":
        return Cost(params, None, products)
    run = products + elements.count
    return Cost(params, run + elements.denser_values, run)


class _Elements:
    """Counts what is no product while the model runs."""

    def __init__(self, model: nn.Module) -> None:
        self.count = 0
        self.denser_values = 0
        for module in model.modules():
            if isinstance(module, (nn.LayerNorm, nn.GELU)) or (
                isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None
            ):
                module.register_forward_hook(self._add_output)
            elif isinstance(module, RPEAttention):
                module.register_forward_hook(self._add_attention)

    def _add_output(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        self.count += output.numel()

    def _add_attention(self, module: RPEAttention, inputs: tuple[Any, ...], out: Tensor) -> None:
        on = [rpe is not None for rpe in (module.rpe_q, module.rpe_v)]
        # Queries, keys and values have as many elements as the tokens.
        self.count += inputs[0].numel() * (1 + sum(on))
        if module.rpe_v is None:
            return
        length = inputs[0].shape[1]
        for table in module.rpe_v.modules():
            if isinstance(table, ValueRPE):
                self.denser_values += inputs[0].numel() * (length - table.config.num_buckets)
