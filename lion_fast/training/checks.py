"""What the model, the images and the options of a run must be, before any of it trains."""

from typing import TYPE_CHECKING

from lion_fast.errors import DataError, OptionError
from lion_fast.pruning.masks import check_target, find_layers, find_matrices
from lion_fast.training.config import TrainConfig
from lion_fast.training.items import (
    check_dataset,
    check_labels,
    check_same_classes,
    is_bare,
    whole_labels,
)

if TYPE_CHECKING:
    from lion_fast.data import Splits
    from lion_fast.methods import TunedModel


def check_run(model: "TunedModel", splits: "Splits", config: TrainConfig) -> None:
    """Refuse what is no model, data or options to train with, before any of it is touched."""
    from lion_fast.methods import TunedModel

    for name, value, kind in (("model", model, TunedModel), ("config", config, TrainConfig)):
        if not isinstance(value, kind):
            raise OptionError(f"{name} must be a {kind.__name__}; got a {type(value).__name__}")
    if not any(p.requires_grad for p in model.parameters()):
        raise OptionError(
            f"a model of method {model.method} has nothing left to train: train it before it is merged"
        )
    for name in ("train", "val"):
        _check_items(name, getattr(splits, name, None), model.num_classes)
    if config.augment != "none" and not is_bare(splits.train):
        raise OptionError(
            f'augment="{config.augment}" goes with images that fit transforms itself; the training '
            'images have a transform of their own. Put the augmentation there, or leave augment "none"'
        )
    if config.early_stop and not splits.val:
        raise OptionError("early_stop needs validation images; this split has none (val=0)")
    if config.prune is not None:
        matrices = find_matrices(find_layers(model))
        check_target(matrices, config.prune, config.prune_granularity, config.prune_block, config.prune_scope)


def _check_items(name: str, items: object, num_classes: int) -> None:
    if items is not None:
        check_dataset(f"the {name} images", items)
    if not items:
        if name == "train":
            raise DataError("there are no training images")
        return
    labels = getattr(items, "labels", None)
    if labels is not None and len(labels):
        labels = whole_labels(labels)
        check_labels(labels, num_classes)
        if name == "train" and len(labels.unique()) < 2:
            raise DataError("all training images are of one class; at least two are needed to learn anything")


def name_classes(model: "TunedModel", splits: "Splits") -> None:
    """Give a model the data's class names; `DataError` where it has others already."""
    names = getattr(splits, "classes", None)
    if names is None:
        return
    check_same_classes(names, model.classes, model.num_classes)
    model.classes = list(names)
