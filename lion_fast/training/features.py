"""What the frozen part makes of images, computed once where nothing in front of it is trained."""

import contextlib
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset
from tqdm import tqdm

from lion_fast.errors import LionError
from lion_fast.methods.reading import ReadingModel, encoded_for
from lion_fast.training.config import TrainConfig
from lion_fast.training.items import collate, read
from lion_fast.training.metrics import autocast, evaluating

if TYPE_CHECKING:
    from lion_fast.methods import TunedModel

# Of so many images, everything that a head may read is kept: what is read otherwise needs no further pass.
MOST_IMAGES = 500
# Bytes of features that a run keeps; with more, the frozen part computes in every epoch.
MEMORY_LIMIT = 4 * 2**30


class FeatureStore:
    """Keeps the features of `TunedModel.encode` between runs on the same images and the same backbone.

    Give one to several calls of `fit`: models that read the backbone alike, such as a linear probe with other
    learning rates, then share one pass over the images. Entries belong to a data set, a backbone and what
    the method reads (`TunedModel.encoding`), told apart by identity and not by content, to the backbone's
    weights as they are now, and to a precision and a batch size, which move the last bits; the `limit` most
    recently used ones stay.

    >>> FeatureStore(limit=4)
    FeatureStore(0 of 4)
    """

    def __init__(self, limit: int = 16) -> None:
        self.limit = limit
        self._found: OrderedDict[tuple, tuple[object, object, TensorDataset, float]] = OrderedDict()

    def features(
        self, model: "TunedModel", dataset: Dataset, view: Dataset, batch_size: int, **reading
    ) -> tuple[TensorDataset, float]:
        """Those of a data set, encoded where they are not there yet, and the seconds that took.

        view: `dataset` as the model reads it, (image tensor, label). reading: options of `encode`. Of up to
        `MOST_IMAGES` images they are cut from `everything`, which models that read other maps share.
        """
        if isinstance(model, ReadingModel) and model.reads_backbone() and len(dataset) <= MOST_IMAGES:
            with contextlib.suppress(FeaturesTooLarge):
                whole, seconds = self.everything(model, dataset, view, batch_size, **reading)
                encoded, labels = whole.tensors
                parts = model.everything().split(encoded)
                return TensorDataset(encoded_for(*parts, model.reading), labels), seconds
        return self._features(model, dataset, view, batch_size, **reading)

    def everything(
        self, model: ReadingModel, dataset: Dataset, view: Dataset, batch_size: int, **reading
    ) -> tuple[TensorDataset, float]:
        """As `features`, of `ReadingModel.everything`."""
        return self._features(model.everything(), dataset, view, batch_size, **reading)

    def _features(
        self, model, dataset: Dataset, view: Dataset, batch_size: int, **reading
    ) -> tuple[TensorDataset, float]:
        given = (model, dataset, batch_size, reading.get("mixed_precision", "no"), model.encoding())
        key = self._key(*given)
        # an id may be that of an object that is gone: what is kept keeps its objects, so these are the same
        if key not in self._found:
            started = time.perf_counter()
            made = encode(model, view, batch_size, **reading)
            self._found[key] = (dataset, model.backbone, made, time.perf_counter() - started)
        self._keep(key)
        return self._found[key][2:]

    def put(self, given: tuple, made: TensorDataset, seconds: float) -> None:
        """Keep features that were made elsewhere, in so many seconds.

        given: model, data set, batch size, precision, and the `encoding` that the model will have.
        """
        key = self._key(*given)
        self._found[key] = (given[1], given[0].backbone, made, seconds)
        self._keep(key)

    @staticmethod
    def _key(
        model: "TunedModel", dataset: Dataset, batch_size: int, precision: str, encoding: tuple
    ) -> tuple:
        backbone = model.backbone
        return id(dataset), id(backbone), backbone.weights_sha256, precision, batch_size, *encoding

    def _keep(self, key: tuple) -> None:
        self._found.move_to_end(key)
        while len(self._found) > self.limit or (len(self._found) > 1 and self._bytes() > MEMORY_LIMIT):
            self._found.popitem(last=False)

    def _bytes(self) -> int:
        return sum(t.nbytes for _, _, features, _ in self._found.values() for t in features.tensors)

    def __repr__(self) -> str:
        return f"FeatureStore({len(self._found)} of {self.limit})"


class FeaturesTooLarge(LionError, MemoryError):
    """The features of a data set would take more than `MEMORY_LIMIT`."""


def features_are_constant(model: "TunedModel", config: TrainConfig) -> bool:
    """In front of `behind` is the frozen backbone alone, and the images do not change from epoch to epoch."""
    known = {id(p) for p in model.behind().parameters()}
    known |= {id(p) for p in model.backbone.parameters() if not p.requires_grad}
    alone = all(id(p) in known for p in model.parameters())
    # what a method overrides without `encode` is not in the features: prompts that are frozen by now, say
    place = {name: i for i, kind in reversed([*enumerate(type(model).__mro__)]) for name in vars(kind)}
    overridden = any(place[name] < place["encode"] for name in ("features", "forward", "loss_terms"))
    return config.cache_features and config.augment == "none" and alone and not overridden


def encode(
    model: "TunedModel",
    dataset: Dataset,
    batch_size: int = 64,
    *,
    num_workers: int = 0,
    mixed_precision: str = "no",
    progress: bool = False,
    check: Callable[[], None] | None = None,
    worker_init_fn: Callable[[int], None] | None = None,
) -> TensorDataset:
    """What `model.behind()` reads of every image: (features float32 (n, E) in main memory, labels).

    dataset: items (image tensor, label). check: called after each batch; may raise to leave. Raises
    `FeaturesTooLarge` at the first batch where they are.
    """
    device = next(model.parameters()).device
    loader = DataLoader(
        dataset, batch_size, num_workers=num_workers, worker_init_fn=worker_init_fn, collate_fn=collate
    )
    features, labels = [], []
    with evaluating(model), autocast(device, mixed_precision), model.backbone.autocast(device):
        for images, targets in read(tqdm(loader, desc="features", leave=False, disable=not progress)):
            features.append(model.encode(images.to(device)).float().cpu())
            width = features[0].shape[1]
            if 4 * width * len(dataset) > MEMORY_LIMIT:
                raise FeaturesTooLarge(f"features of {len(dataset)} x {width} are above MEMORY_LIMIT")
            labels.append(targets)
            if check is not None:
                check()
    return TensorDataset(torch.cat(features), torch.cat(labels))
