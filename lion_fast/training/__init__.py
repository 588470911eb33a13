"""Training on Accelerate, evaluation, and checkpoints that resume."""

from lion_fast.training.checkpoints import prepare_output
from lion_fast.training.config import TrainConfig
from lion_fast.training.features import FeatureStore
from lion_fast.training.memory import PeakMemory
from lion_fast.training.metrics import Metrics, evaluate, predict, predict_files
from lion_fast.training.order import Plan
from lion_fast.training.run import FitResult, fit
from lion_fast.training.stop import Interrupted, TrainingError

__all__ = [
    "FeatureStore",
    "FitResult",
    "Interrupted",
    "Metrics",
    "PeakMemory",
    "Plan",
    "TrainConfig",
    "TrainingError",
    "evaluate",
    "fit",
    "predict",
    "predict_files",
    "prepare_output",
]
