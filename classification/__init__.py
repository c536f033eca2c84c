"""DeiT with iRPE: models, trainer, evaluation and prediction.

`import classification.models` registers the models in timm.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from engine.optional import require_own

if TYPE_CHECKING:
    from classification.config import ClassificationConfig, parse_args
    from classification.evaluation import evaluate
    from classification.models import PUBLISHED, build_model
    from classification.predictor import Classification, Classifier, load

_MODULES = {
    "PUBLISHED": "models",
    "build_model": "models",
    "load": "predictor",
    "Classifier": "predictor",
    "Classification": "predictor",
    "ClassificationConfig": "config",
    "parse_args": "config",
    "evaluate": "evaluation",
}

__all__ = [*_MODULES]

require_own("datasets", __name__)


def __getattr__(name: str) -> Any:
    """Import a public name at its first use, so that `--help` does not wait for torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    """Return all names, also those that are not imported yet."""
    return sorted({*globals(), *_MODULES})
