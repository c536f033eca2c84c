"""Read the weights of a published model for timm, and adapt them to the options of the model.

timm finds the weights by a `PretrainedCfg`: a state dict, a file, a URL, a folder, or a model of
the Hugging Face hub. Files and URLs are read here by `irpe_core.load_checkpoint`: timm refuses
checkpoints of the original trainer that have an `argparse.Namespace`, and does not continue an
interrupted download. Missing weights are errors, also where timm ignores them.
"""

import re
from pathlib import Path

from timm.layers import resample_patch_embed
from timm.models import PretrainedCfg, get_pretrained_cfg_value
from torch import Tensor, nn

from classification.finetune import KERNEL, adapt_weights, recorded_image_size
from irpe_core import load_checkpoint, load_weights
from irpe_core.download import download

__all__ = ["adapt_pretrained", "read_source"]

_HEADS = ("head.", "head_dist.")


def read_source(
    source: PretrainedCfg, cache_dir: str | Path | None = None
) -> tuple[dict[str, Tensor] | None, tuple[int, int] | None]:
    """Read the file or URL of the weights.

    Args:
        source: Where the weights are.
        cache_dir: Folder of downloads; None for the torch hub cache.

    Returns:
        The weights, or None if timm reads them: a state dict, a folder, or a model of the hub. And
        height and width in pixels of their training images; None if they are not known.

    Raises:
        ValueError: The model has no published checkpoint.
        CheckpointError: The checkpoint cannot be downloaded or read.
    """
    if source.source in ("hf-hub", "local-dir") or source.state_dict:
        return None, None
    if source.file:
        # As in timm, the EMA of a file comes first, and a URL gives the weights themselves.
        checkpoint = load_checkpoint(source.file)
        weights = checkpoint.get("model_ema") or checkpoint["model"]
        return weights, recorded_image_size(checkpoint, source.file)
    if source.hf_hub_id:
        return None, None
    if not source.url:
        raise ValueError(f"model {source.architecture!r} has no published checkpoint")
    checkpoint = load_checkpoint(download(source.url, cache_dir))
    if source.url == get_pretrained_cfg_value(source.architecture, "url"):
        return checkpoint["model"], source.input_size[1:]
    return checkpoint["model"], recorded_image_size(checkpoint, source.url)


def adapt_pretrained(
    weights: dict[str, Tensor], model: nn.Module, image_size: tuple[int, int] | None = None
) -> dict[str, Tensor]:
    """Adapt a state dict before timm loads it; timm itself adapts the head and input channels.

    In addition to `adapt_weights`, the patch embedding is resampled to another patch size, and the
    final norm gets the name that it has in the model: `norm` before and `fc_norm` after pooling.

    Args:
        weights: The state dict.
        model: A vision transformer of timm, with iRPE or without.
        image_size: As in `adapt_weights`.

    Returns:
        A new state dict.

    Raises:
        CheckpointError: The weights do not fit the model, apart from the head and the number of
            input channels.
    """
    own, weights = model.state_dict(), dict(weights)
    for old, new in (("norm.", "fc_norm."), ("fc_norm.", "norm.")):
        if f"{old}weight" in weights and f"{old}weight" not in own and f"{new}weight" in own:
            weights = {re.sub(f"^{re.escape(old)}", new, key): x for key, x in weights.items()}
    kernel, patch = weights.get(KERNEL), tuple(own[KERNEL].shape[2:])
    if kernel is not None and kernel.dim() == 4 and kernel.shape[2:] != patch:
        weights[KERNEL] = resample_patch_embed(kernel, list(patch))
        if image_size is not None:
            # Images of this size have as many patches as before.
            image_size = tuple(
                size * n // o
                for size, n, o in zip(image_size, patch, kernel.shape[2:], strict=True)
            )
    weights = adapt_weights(weights, model, image_size)
    # timm ignores missing weights if the number of classes differs. This reports them.
    exempt = {key for key in own if key.startswith(_HEADS)}
    if kernel is not None and kernel.dim() == 4 and kernel.shape[1] != own[KERNEL].shape[1]:
        exempt.add(KERNEL)
    rest = {key: x for key, x in weights.items() if not key.startswith(_HEADS)}
    load_weights(model, rest | {key: own[key] for key in exempt})
    return weights
