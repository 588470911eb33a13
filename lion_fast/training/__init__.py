"""Training on Accelerate, evaluation, and checkpoints that resume."""

from importlib import import_module
from typing import TYPE_CHECKING

from lion_fast.training.config import TrainConfig
from lion_fast.training.settings import Settings

if TYPE_CHECKING:
    from lion_fast.training.checkpoints import prepare_output
    from lion_fast.training.features import FeatureStore
    from lion_fast.training.memory import PeakMemory
    from lion_fast.training.metrics import Metrics, evaluate, predict, predict_files
    from lion_fast.training.order import Plan
    from lion_fast.training.result import FitResult
    from lion_fast.training.run import fit
    from lion_fast.training.stop import Interrupted, TrainingError

__all__ = [
    "FeatureStore",
    "FitResult",
    "Interrupted",
    "Metrics",
    "PeakMemory",
    "Plan",
    "Settings",
    "TrainConfig",
    "TrainingError",
    "evaluate",
    "fit",
    "predict",
    "predict_files",
    "prepare_output",
]
_MODULES = ("checkpoints", "features", "memory", "metrics", "order", "run", "stop")


def __getattr__(name: str):
    # settings are read without loading torch
    if name in __all__:
        for module in _MODULES:
            found = getattr(import_module(f"{__name__}.{module}"), name, None)
            if found is not None:
                return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
