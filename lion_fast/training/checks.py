"""What the images of a run must be, before any of it trains."""

from typing import TYPE_CHECKING

import torch

from lion_fast.errors import DataError, OptionError
from lion_fast.training.config import TrainConfig
from lion_fast.training.metrics import check_labels

if TYPE_CHECKING:
    from lion_fast.data import Splits
    from lion_fast.methods import TunedModel


def check_splits(splits: "Splits", num_classes: int, config: TrainConfig) -> None:
    """Refuse images that nothing can be learnt from, or that do not go with the options."""
    if not splits.train:
        raise DataError("there are no training images")
    for name in ("train", "val"):
        labels = getattr(getattr(splits, name), "labels", None)
        if labels is not None and len(labels):
            labels = torch.as_tensor(labels)
            check_labels(labels, num_classes)
            if name == "train" and len(labels.unique()) < 2:
                raise DataError(
                    "all training images are of one class; at least two are needed to learn anything"
                )
    if config.augment != "none" and getattr(splits.train, "transform", None) is not None:
        raise OptionError(
            f'augment="{config.augment}" goes with images that fit transforms itself; the training '
            'images have a transform of their own. Put the augmentation there, or leave augment "none"'
        )
    if config.early_stop and not splits.val:
        raise OptionError("early_stop needs validation images; this split has none (val=0)")


def name_classes(model: "TunedModel", splits: "Splits") -> None:
    """Give a model the data's class names; `DataError` where it has others already."""
    names = getattr(splits, "classes", None)
    if names is None:
        return
    if len(names) != model.num_classes:
        raise DataError(
            f"the data has {len(names)} classes and the model {model.num_classes} outputs; "
            f"create the model with num_classes={len(names)}"
        )
    if model.classes is not None and list(model.classes) != list(names):
        raise DataError(
            f"the model's classes are {', '.join(model.classes[:6])}, the data's {', '.join(names[:6])}; "
            "make a new model, or set model.classes where they mean the same"
        )
    model.classes = list(names)
