"""DETR with iRPE: model, losses, trainer, evaluation."""

__all__: list[str] = []
