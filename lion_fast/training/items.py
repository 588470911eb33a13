"""What is read of a data set: its items as the model takes them, in batches that are checked."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset, default_collate

from lion_fast.errors import DataError


def leaves(dataset: Any) -> list:
    """The data sets inside of torch's `Subset` and `ConcatDataset`."""
    if type(dataset) is Subset:
        return leaves(dataset.dataset)
    if type(dataset) is ConcatDataset:
        return [leaf for part in dataset.datasets for leaf in leaves(part)]
    return [dataset]


def is_bare(dataset: Dataset) -> bool:
    """Whether it gives PIL images that are still to be transformed, as an `ImageSet` without a transform."""
    return all(
        hasattr(leaf, "with_transform") and getattr(leaf, "transform", None) is None
        for leaf in leaves(dataset)
    )


def is_constant(dataset: Dataset) -> bool:
    """Whether it is known to give the same items each time, but for what transforms a bare one.

    Known are `TensorDataset`, an `ImageSet` without a transform, and what says `constant = True`.
    """
    from lion_fast.data import ImageSet

    return all(
        type(leaf) is TensorDataset
        or (type(leaf) is ImageSet and leaf.transform is None)
        or getattr(leaf, "constant", None) is True
        for leaf in leaves(dataset)
    )


def with_transform(model: nn.Module, dataset: Dataset, train: bool = False, augment: str = "none") -> Dataset:
    """`dataset`; image sets that would give PIL images give what the model's backbone takes."""
    if type(dataset) is Subset:
        return Subset(with_transform(model, dataset.dataset, train, augment), dataset.indices)
    if type(dataset) is ConcatDataset:
        return ConcatDataset([with_transform(model, part, train, augment) for part in dataset.datasets])
    if not is_bare(dataset):
        return dataset
    from lion_fast.data import transforms

    return dataset.with_transform(transforms(model.backbone, train, augment))


def check_dataset(what: str, dataset: object) -> None:
    """Raise `DataError` unless it has a length and items by number."""
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise DataError(
            f"{what} must be a data set with a length and items by number; got a {type(dataset).__name__}"
        )


def collate(items: Sequence) -> tuple[Tensor, Tensor]:
    """(tensors (B, ...), labels int64 (B,)) of items (tensor, whole number).

    Raises `DataError` for items of another form, for images that differ in shape, and for other labels.
    """
    for item in items:
        if not isinstance(item, (tuple, list)) or len(item) != 2 or not isinstance(item[0], Tensor):
            inside = [type(x).__name__ for x in item] if isinstance(item, (tuple, list)) else ""
            raise DataError(
                f"an item of the data must be (image tensor, label); got {type(item).__name__} {inside}"
            )
    if len(shapes := {tuple(image.shape) for image, _ in items}) > 1:
        raise DataError(f"images of one data set must have one shape; got {', '.join(map(str, shapes))}")
    try:
        images, labels = default_collate([tuple(item) for item in items])
    except (TypeError, RuntimeError) as error:
        raise DataError(f"items of the data cannot be put into a batch: {error}") from error
    return images, whole_labels(labels)


def read(loader: DataLoader) -> Iterator:
    """The batches of a loader; an error in a reading process comes in its own words."""
    try:
        yield from loader
    except DataError as error:
        raise DataError(str(error).rpartition("DataError: ")[2].strip()) from error
    except IndexError as error:
        told = str(error).strip().rpartition("\n")[2]
        raise DataError(f"the data has fewer items than its length says ({told})") from error
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError(f"a reading process ended ({error}); try fewer num_workers") from error


def whole_labels(labels: Any) -> Tensor:
    """Labels as int64 (N,); `DataError` where they are no whole numbers, or not one an image."""
    try:
        found = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"labels must be whole numbers, class indices; got {labels!r:.80}") from error
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool or found.ndim != 1:
        raise DataError(
            f"labels must be whole numbers, one an image; got {found.dtype} of shape {tuple(found.shape)}"
        )
    return found.long()


def check_same_classes(names: Sequence[str], known: Sequence[str] | None, outputs: int) -> None:
    """`DataError` unless data with these class names is for a model with these names and so many outputs."""
    if len(names) != outputs:
        raise DataError(
            f"the data has {len(names)} classes and the model {outputs} outputs; create the model with "
            f"num_classes={len(names)}, or give load_images the model's classes"
        )
    if known is not None and list(known) != list(names):
        raise DataError(
            f"the model's classes are {', '.join(known[:6])}, the data's {', '.join(names[:6])}; give "
            "load_images classes=model.classes, make a new model, or set model.classes where both mean one"
        )


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Raise `DataError` naming a label outside [0, num_classes)."""
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if len(wrong):
        raise DataError(
            f"label {wrong[0].item()} is out of range: the model has {num_classes} classes, "
            f"0 to {num_classes - 1}"
        )
