"""Evaluation and prediction: what a model gets right, counted exactly."""

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from lion_fast.errors import DataError, check_kind, check_whole
from lion_fast.training.items import (
    check_dataset,
    check_labels,
    check_same_classes,
    collate,
    leaves,
    read,
    with_transform,
)

_AUTOCAST = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


NOT_FINITE = "the model's outputs are not finite: look at its weights, and for NaN in the images"


class NotFinite(DataError):
    """Outputs of a model that are NaN or infinite, of which no class can be told."""


@dataclass(frozen=True)
class Metrics:
    """What an evaluation found.

    Attributes:
        accuracy: Share of images whose highest logit is their label's.
        balanced_accuracy: Mean over the classes that occur of the share recognised in each.
        loss: Mean cross-entropy in nats, without label smoothing.
        recall: Per class, the share recognised; None for a class that does not occur.
        counts: Images per class.
        confusion: Images by [label][predicted class].
        n: Images.
        seconds: Wall-clock time of the whole evaluation, reading included.
    """

    accuracy: float
    balanced_accuracy: float
    loss: float
    recall: list[float | None]
    counts: list[int]
    confusion: list[list[int]]
    n: int
    seconds: float

    @property
    def images_per_second(self) -> float:
        return self.n / self.seconds if self.seconds > 0 else float("inf")

    @classmethod
    def from_confusion(cls, confusion: torch.Tensor, loss_sum: float, seconds: float) -> "Metrics":
        """From a (classes, classes) integer matrix of [label, predicted] and the sum of the losses."""
        counts, correct = confusion.sum(1).tolist(), confusion.diagonal().tolist()
        recall = [c / n if n else None for c, n in zip(correct, counts, strict=True)]
        present = [r for r in recall if r is not None]
        n = sum(counts)
        return cls(
            accuracy=sum(correct) / n,
            balanced_accuracy=sum(present) / len(present),
            loss=loss_sum / n,
            recall=recall,
            counts=counts,
            confusion=confusion.tolist(),
            n=n,
            seconds=seconds,
        )

    def to_dict(self, classes: Sequence[str] | None = None) -> dict:
        """JSON-able; recall and counts by class name where the names are given."""
        names = list(classes) if classes is not None else [str(i) for i in range(len(self.recall))]
        by_class = {name: dict(zip(names, getattr(self, name), strict=True)) for name in ("recall", "counts")}
        return asdict(self) | by_class | {"images_per_second": self.images_per_second}


def exact_dtype(device: torch.device) -> torch.dtype:
    """What sums of losses and counts are kept in: float64, which MPS does not have."""
    return torch.float32 if device.type == "mps" else torch.float64


def autocast(device: torch.device, mixed_precision: str):
    """The autocast context of a precision ("no", "bf16", "fp16") on a device."""
    dtype = _AUTOCAST[mixed_precision]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; the mode before is restored."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def evaluate(
    model: nn.Module,
    dataset: Dataset,
    batch_size: int = 64,
    *,
    num_classes: int | None = None,
    num_workers: int = 0,
    mixed_precision: str = "no",
    progress: bool = False,
    accelerator=None,
    check: Callable[[], None] | None = None,
) -> Metrics:
    """Accuracy, balanced accuracy and loss of a model on labelled images.

    Args:
        model: Maps images (B, 3, H, W) to logits (B, classes); it runs on the device it is on.
        dataset: Items (image tensor, integer label). An `ImageSet` without a transform gets that of the
            model's backbone.
        batch_size: Images per forward pass.
        num_classes: Number of logits; None: `model.num_classes`.
        num_workers: Processes that read images.
        mixed_precision: "no", "bf16" or "fp16".
        progress: Show a progress bar on stderr.
        accelerator: An `accelerate.Accelerator`: its processes share the work and all get the same answer.
        check: Called after each batch; may raise to leave.

    Raises:
        DataError: No images, a label outside [0, num_classes), an `ImageSet` of other classes than the
            model's, or outputs that are not finite.
        OptionError: `batch_size` or `num_workers` out of range.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2))
        >>> images = torch.utils.data.TensorDataset(torch.rand(5, 3, 2, 2), torch.tensor([0, 1, 0, 1, 1]))
        >>> evaluate(model, images, num_classes=2).n
        5
    """
    _check_loading(batch_size, num_workers)
    check_dataset("what is evaluated", dataset)
    check_kind("model", model, nn.Module)
    dataset = with_transform(model, dataset)
    classes = num_classes if num_classes is not None else model.num_classes
    for leaf in leaves(dataset):
        if hasattr(leaf, "with_transform") and hasattr(leaf, "classes"):  # an ImageSet
            check_same_classes(leaf.classes, getattr(model, "classes", None), classes)
    n = len(dataset)
    if n == 0:
        raise DataError("there are no images to evaluate")
    started = time.perf_counter()
    rank, processes = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    own = dataset if processes == 1 else Subset(dataset, range(rank, n, processes))
    device = next(model.parameters()).device
    confusion = torch.zeros(classes * classes, dtype=torch.int64, device=device)
    loss_sum = torch.zeros((), dtype=exact_dtype(device), device=device)
    loader = DataLoader(
        own, batch_size, num_workers=num_workers, pin_memory=device.type == "cuda", collate_fn=collate
    )
    bar = tqdm(loader, desc="evaluate", unit="batch", leave=False, disable=not progress or rank != 0)
    with evaluating(model), autocast(device, mixed_precision):
        for images, labels in read(bar):
            check_labels(labels, classes)
            labels = labels.to(device, non_blocking=True)
            logits = model(images.to(device, non_blocking=True)).float()
            if logits.shape[1] != classes:
                raise DataError(f"the model gives {logits.shape[1]} logits, num_classes is {classes}")
            loss_sum += nn.functional.cross_entropy(logits, labels, reduction="sum")
            confusion += torch.bincount(labels * classes + logits.argmax(1), minlength=classes * classes)
            if check is not None:
                check()
    if processes > 1:
        confusion, loss_sum = accelerator.reduce(confusion), accelerator.reduce(loss_sum)
    matrix, total = confusion.view(classes, classes).cpu(), loss_sum.item()
    if not math.isfinite(total):
        raise NotFinite(NOT_FINITE)
    return Metrics.from_confusion(matrix, total, time.perf_counter() - started)


def _check_loading(batch_size: int, num_workers: int) -> None:
    check_whole("batch_size", batch_size)
    check_whole("num_workers", num_workers, 0)


def predict(
    model: nn.Module,
    dataset: Dataset,
    batch_size: int = 64,
    *,
    num_workers: int = 0,
    mixed_precision: str = "no",
    progress: bool = False,
) -> torch.Tensor:
    """Class probabilities, float32 (n, classes) on the CPU, in the order of the data set.

    Args:
        model: Maps images (B, 3, H, W) to logits (B, classes).
        dataset: Items are image tensors, or tuples that begin with one. An `ImageSet` without a transform
            gets that of the model's backbone.
        batch_size, num_workers, mixed_precision, progress: As in `evaluate`.

    Raises:
        DataError: Outputs that are not finite.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2))
        >>> predict(model, torch.rand(5, 3, 2, 2)).shape
        torch.Size([5, 2])
    """
    _check_loading(batch_size, num_workers)
    check_dataset("what is predicted", dataset)
    loader = DataLoader(with_transform(model, dataset), batch_size, num_workers=num_workers)
    bar = tqdm(loader, desc="predict", unit="batch", leave=False, disable=not progress)
    images = (batch[0] if isinstance(batch, (tuple, list)) else batch for batch in read(bar))
    return _probabilities(model, images, mixed_precision)


def _probabilities(model: nn.Module, batches: Iterable[torch.Tensor], mixed_precision: str) -> torch.Tensor:
    """float32 (n, classes) on the CPU; raises `NotFinite`."""
    device = next(model.parameters()).device
    with evaluating(model), autocast(device, mixed_precision):
        out = [model(images.to(device)).float().softmax(1).cpu() for images in batches]
    found = torch.cat(out) if out else torch.empty(0, 0)
    if not torch.isfinite(found).all():
        raise NotFinite(NOT_FINITE)
    return found


class _Files(Dataset):
    """(path's place, image tensor or None, what is wrong with it)."""

    def __init__(self, paths: Sequence[str | os.PathLike], transform) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int):
        from lion_fast.data import read_image

        try:
            return i, self.transform(read_image(self.paths[i])), ""
        except DataError as error:
            return i, None, str(error)


def predict_files(
    model: nn.Module,
    paths: Sequence[str | os.PathLike],
    batch_size: int = 64,
    *,
    num_workers: int = 0,
    mixed_precision: str = "no",
    strict: bool = False,
    progress: bool = False,
) -> tuple[list, torch.Tensor, list[tuple]]:
    """Class probabilities of image files: (paths read, float32 (n, classes), [(path, reason)] not read).

    Args:
        model: A `TunedModel`; its backbone says how the images are prepared.
        paths: Image files.
        strict: Raise at the first image that cannot be read.
        batch_size, num_workers, mixed_precision, progress: As in `evaluate`.

    Raises:
        DataError: An image cannot be read and `strict` is set, or outputs are not finite.
    """
    from lion_fast.data import transforms

    _check_loading(batch_size, num_workers)
    files = _Files(paths, transforms(model.backbone))
    loader = DataLoader(files, batch_size, num_workers=num_workers, collate_fn=list)
    read, failed = [], []

    def images() -> Iterator[torch.Tensor]:
        for batch in tqdm(loader, desc="predict", unit="batch", leave=False, disable=not progress):
            for place, image, fault in batch:
                if image is not None:
                    read.append(paths[place])
                elif strict:
                    raise DataError(fault)
                else:
                    failed.append((paths[place], fault))
            found = [image for _, image, _ in batch if image is not None]
            if found:
                yield torch.stack(found)

    return read, _probabilities(model, images(), mixed_precision), failed
