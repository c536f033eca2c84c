"""Count the operators of a piece of training, and how often the host waits for the device.

Each operator costs time on the host. A wait empties the queue of the GPU, which is then idle until
the host has launched the next kernels. Both are counted without a GPU: on a CPU, every tensor
counts as one of the device.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from engine import LoopOptions, RunLog, StopRequest, TrainState, make_scaler, train_epoch

__all__ = ["HostWork", "OperatorCounter", "profile_step"]

# The host waits for the values or for the number of elements of the result.
_WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "bincount", "equal"}
_WAITING |= {"_unique2", "unique_dim", "unique_consecutive"}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


@dataclass(frozen=True)
class HostWork:
    """Numbers of operators and waits."""

    operators: int
    """Operators, views included. The operators of the backward pass count, too."""
    syncs: int
    """Waits of the host for the device."""

    def __sub__(self, other: "HostWork") -> "HostWork":
        """Return the work after that of `other`."""
        return HostWork(self.operators - other.operators, self.syncs - other.syncs)


class OperatorCounter(TorchDispatchMode):
    """Context manager that counts operators and host syncs.

    A sync is `item`, an index of bools, an operator with a result of unknown size, or a copy
    between host and device that is not `non_blocking`. On a CPU, `Tensor.to` is not counted: most
    calls are for tensors that are already on the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators = 0
        self.syncs: Counter[str] = Counter()
        self._copies = _CopyCounter(self.syncs)

    def done(self) -> HostWork:
        """Return the numbers since the start."""
        return HostWork(self.operators, self.syncs.total())

    def __enter__(self) -> "OperatorCounter":
        self._copies.__enter__()
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._copies.__exit__(*exception)

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        self.operators += 1
        name = operator.overloadpacket.__name__
        by_bools = name in _INDEXING and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in _WAITING or by_bools:
            self.syncs[name] += 1
        return operator(*args, **(kwargs or {}))


class _CopyCounter(TorchFunctionMode):
    """Context manager that counts copies between host and device, which do nothing on a CPU."""

    def __init__(self, syncs: Counter[str]) -> None:
        super().__init__()
        self._syncs = syncs

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if _is_copy(function, args, kwargs, result) and not kwargs.get("non_blocking"):
            self._syncs[function.__name__] += 1
        return result


def _is_copy(function: Callable, args: tuple, kwargs: dict, result: Any) -> bool:
    """Return whether a call copies between host and device, or would if the device were a GPU."""
    if function in (torch.tensor, torch.as_tensor):
        return kwargs.get("device") is not None
    if function is Tensor.to:
        return result.device != args[0].device
    if function is Tensor.tolist:
        return args[0].ndim > 0  # That of a scalar is an operator.
    return function in (Tensor.cpu, Tensor.cuda, Tensor.new_tensor)


def profile_step(recipe: str, size: str, batch_size: int, device: torch.device) -> HostWork:
    """Return the work of the host for one step of a trainer, from batch to EMA.

    Args:
        recipe: `deit` or `detr`.
        size: Size of DeiT.
        batch_size: Number of images, even for `deit`, because of mixup.
        device: Device of the model.
    """
    model, step, optimizer, clip_grad, batch = (
        _deit(size, batch_size, device) if recipe == "deit" else _detr(batch_size, device)
    )
    ema = ModelEmaV3(model, decay=0.9997)
    counter, totals = OperatorCounter(), []

    def batches() -> Iterator[Any]:
        for _ in range(4):
            totals.append(counter.done())
            yield batch

    with counter:
        train_epoch(
            partial(step, model),
            batches(),
            TrainState(model, optimizer, make_scaler(device, torch.float32)),
            LoopOptions(device, 4, batch_size, clip_grad=clip_grad, print_freq=4),
            stop=StopRequest(),
            log=RunLog(None),
            on_step=lambda: ema.update(model),
        )
    # The first steps create the state of the optimizer and the bucket ids, the last one prints.
    return totals[3] - totals[2]


def _deit(size: str, batch_size: int, device: torch.device) -> tuple:
    """Return model, step, optimizer, clipping and a batch of DeiT's recipe with iRPE on keys."""
    from classification import build
    from classification.config import parse_args

    config = parse_args(["--model", f"deit_{size}_patch16_224_ctx_product_50_shared_k"])
    model = build.create_model(config, 1000).to(device)
    optimizer = build.create_optimizer(config, model, batch_size)
    # One image in four is erased, as with the default probability.
    erasings = [[(8, 8, 64, 96, number)] if number % 4 == 0 else [] for number in range(batch_size)]
    batch = _pixels(batch_size, 224, 224), torch.arange(batch_size), erasings, [[]] * batch_size
    step = build.create_step(config, 1000, device)
    return model, step, optimizer, config.clip_grad, batch


def _detr(batch_size: int, device: torch.device) -> tuple:
    """Return model, step, optimizer, clipping and a batch of DETR's recipe with iRPE on keys."""
    from detection import build
    from detection.config import parse_args

    config = parse_args(["--enc_rpe2d", "rpe-2.0-product-ctx-1-k", "--backbone_weights", "none"])
    model, criterion, _ = build.create_detector(config, build.COCO_CLASSES, None, device)
    objects = {"labels": torch.arange(1, 11), "boxes": torch.linspace(0.2, 0.5, 40).view(10, 4)}
    mask = torch.zeros(batch_size, 608, 800, dtype=torch.bool)
    batch = _pixels(batch_size, 608, 800), mask, [objects] * batch_size
    optimizer = build.create_optimizer(config, model)
    return model, build.create_step(criterion), optimizer, config.clip_max_norm, batch


def _pixels(batch_size: int, height: int, width: int) -> Tensor:
    """Return images of noise as workers deliver them: uint8 `(B, 3, H, W)`."""
    shape = (batch_size, height, width, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8).permute(0, 3, 1, 2)
