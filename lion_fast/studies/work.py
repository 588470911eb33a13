"""One run of an experiment: train a configuration, judge it, and what a row says about it."""

import contextlib
import gc
import hashlib
import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch

from lion_fast.backbones import Backbone, load_backbone
from lion_fast.data import ImageSet, Splits, load_data, transforms
from lion_fast.methods import TunedModel, create
from lion_fast.studies.environment import context
from lion_fast.studies.grid import Grid, Item, digest
from lion_fast.studies.rows import pack_bits, pack_integers
from lion_fast.training import FeatureStore, Metrics, TrainConfig, TrainingError, fit, predict
from lion_fast.training.features import RowsTooLarge, encode

RANDOM_SEED = 0
# Draws of images kept in memory by a worker
KEPT_DRAWS = 4


def open_backbone(settings: Mapping[str, Any]) -> Backbone:
    """A grid's backbone: the arguments of `load_backbone`; `random` draws its weights from a fixed seed."""
    settings = dict(settings)
    if not settings.pop("random", False):
        return load_backbone(**settings)
    with torch.random.fork_rng():
        torch.manual_seed(RANDOM_SEED)
        return load_backbone(**settings, pretrained=False)


@dataclass
class Workshop:
    """What a worker keeps between runs: backbones, the last draws of images, and where it runs."""

    grid: Grid
    backbones: dict[str, Backbone] = field(default_factory=dict)
    draws: dict[tuple[str, int], Splits] = field(default_factory=dict)
    store: FeatureStore = field(default_factory=FeatureStore)
    where: dict[str, Any] | None = None
    made: dict[tuple[str, str, str], dict[str, Any]] = field(default_factory=dict)
    drawn: dict[tuple[str, int], str] = field(default_factory=dict)

    def __reduce__(self):
        return Workshop, (self.grid,)  # another process loads its own

    def backbone(self, label: str) -> Backbone:
        """The backbone of that label, loaded once."""
        if label not in self.backbones:
            self.backbones[label] = open_backbone(self.grid.backbones[label])
        return self.backbones[label]

    def resolved(self, backbone: str, method: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options of a model as it records them: those left to the method have their values."""
        named = (backbone, method, json.dumps(options, sort_keys=True))
        if named not in self.made:
            model = create(self.backbone(backbone), method, num_classes=2, seed=0, **options)
            self.made[named] = json.loads(json.dumps(model.options))
        return self.made[named]

    def splits(self, label: str, seed: int) -> Splits:
        """The images of a set as drawn by a seed."""
        if (label, seed) not in self.draws:
            while len(self.draws) >= KEPT_DRAWS:
                del self.draws[next(iter(self.draws))]
            self.draws[label, seed] = load_data(**self.grid.sets[label].data, seed=seed)
        return self.draws[label, seed]

    def fingerprint(self, label: str, seed: int) -> str:
        """That of a draw of images, which need not be kept for it."""
        if (label, seed) not in self.drawn:
            self.drawn[label, seed] = self.splits(label, seed).description["fingerprint"]
        return self.drawn[label, seed]

    def circumstances(self) -> dict[str, Any]:
        """Versions, device, revision; asked once, when the work begins."""
        if self.where is None:
            self.where = context(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        return self.where

    def key(self, item: Item) -> str:
        """Everything that determines a run: its settings and the backbone's weights."""
        return digest([item.run, self.backbone(item.backbone).weights_sha256])

    def draw_row(self, item: Item) -> dict:
        """What a draw of images is: description, and a number for each image, to see which draws share some.

        Of a tuning seed the images seen in tuning, of a final seed the test images.
        """
        splits = self.splits(item.set, item.seed)
        parts = (splits.train, splits.val) if item.stage == "tune" else (splits.test,)
        names = [name for part in parts if part is not None for name in part.names]
        numbers = [int.from_bytes(hashlib.sha256(n.encode()).digest()[:4], "big") for n in names]
        return {
            "stage": "draw",
            "key": draw_key(item.stage, splits.description["fingerprint"]),
            "for": item.stage,
            "set": item.set,
            "seed": item.seed,
            "description": splits.description,
            "images": pack_integers(sorted(numbers)),
        }

    def run(self, item: Item) -> dict:
        """Train and judge; the row. A run that diverged gives a row with the reason as "failed"."""
        started = time.perf_counter()
        options, _ = self.grid.settings(item.set, item.label, item.index)
        config = self.grid.config(item.set, item.label, item.index, item.seed)
        config = replace(config, checkpoint_epochs=0)  # an interrupted run is run again
        backbone, splits = self.backbone(item.backbone), self.splits(item.set, item.seed)
        test = splits.test if item.stage == "final" else None
        splits = replace(splits, test=None)  # nothing below can read it by mistake
        model = create(
            backbone,
            self.grid.methods[item.label].method,
            num_classes=len(splits.classes),
            seed=item.seed,
            **options,
        )
        row = {
            "stage": item.stage,
            "key": self.key(item),
            "run": item.run,
            "backbone": item.backbone,
            "set": item.set,
            "label": item.label,
            "configuration": dict(self.grid.methods[item.label].configurations[item.index]),
            "method": model.method,
            "options": model.options,
            "train": config.to_dict(),
            "monitor": config.monitor,
            "seed": item.seed,
            "failed": None,
            "data": {
                "fingerprint": splits.description["fingerprint"],
                "sizes": splits.description["sizes"],
                "settings": dict(self.grid.sets[item.set].data),
            },
            "backbone_settings": {
                "name": backbone.name,
                "weights_source": backbone.weights_source,
                "weights_sha256": backbone.weights_sha256,
                "img_size": backbone.img_size,
                "mean": list(backbone.mean),
                "std": list(backbone.std),
                "interpolation": backbone.interpolation,
                "precision": backbone.precision,
            },
        }
        try:
            row |= _train_and_judge(model, splits, test, config, self.store)
        except TrainingError as error:
            # the message may name a folder that is gone
            row["failed"] = str(error).split(";")[0]
        row["parameters"] = {
            "method": model.num_trainable(),
            "with_head": model.num_trainable(head=True),
            "kept": model.num_trainable(kept=True),
            "kept_with_head": model.num_trainable(head=True, kept=True),
        }
        del model
        gc.collect()
        return row | {"seconds": round(time.perf_counter() - started, 3)} | self.circumstances()


def _train_and_judge(
    model: TunedModel, splits: Splits, test: ImageSet | None, config: TrainConfig, store: FeatureStore
) -> dict[str, Any]:
    # Only a choice among epochs needs the validation images in every epoch
    needed = config.keep == "best" or config.early_stop
    with tempfile.TemporaryDirectory(prefix="lion-fast-", ignore_cleanup_errors=True) as folder:
        chosen = splits if needed else replace(splits, val=None)
        fitted = fit(model, chosen, config, folder, progress=False, store=store)
    kept = store if fitted.cached_features else None
    row: dict[str, Any] = {"val": None, "test": None}
    if splits.val is not None:
        row["val"] = _judge(model, splits.val, config, kept)[0]
    if test is not None:
        row["test"], correct = _judge(model, test, config, kept)
        row |= {"correct": pack_bits(correct), "labels": pack_integers(test.labels.numpy())}
    return row | {
        "training_seconds": fitted.seconds,
        "peak_memory_bytes": fitted.peak_memory_bytes,
        "memory_measured": fitted.memory_measured,
        "epochs": fitted.epochs,
        "epoch_kept": fitted.best_epoch,
        "steps": fitted.steps,
        "cached_features": fitted.cached_features,
        "last_epoch": fitted.history[-1],
        "pruning": asdict(fitted)["pruning"],
    }


def _judge(
    model: TunedModel, images: ImageSet, config: TrainConfig, store: FeatureStore | None
) -> tuple[dict, np.ndarray]:
    """Metrics of one pass over the images, and which are right; `store` has rows where those are constant."""
    batch = config.eval_batch_size or config.batch_size
    reading = {"num_workers": config.num_workers, "mixed_precision": config.mixed_precision}
    started = time.perf_counter()
    rows = None
    if store is not None:
        view = images.with_transform(transforms(model.backbone))
        with contextlib.suppress(RowsTooLarge):  # there may be more of these images than of training ones
            rows, _ = store.rows(
                model, images, config.mixed_precision, batch, lambda: encode(model, view, batch, **reading)
            )
    if rows is None:
        probabilities = predict(model, images, batch, **reading)
    else:
        probabilities = predict(model.behind(), rows, 1024)
    if not torch.isfinite(probabilities).all():
        raise TrainingError("the trained model's outputs are not finite")
    classes, labels = model.num_classes, images.labels
    predicted = probabilities.argmax(1)
    confusion = torch.bincount(labels * classes + predicted, minlength=classes * classes)
    loss = -probabilities[torch.arange(len(labels)), labels].clamp_min(1e-30).log().double().sum().item()
    found = Metrics.from_confusion(confusion.view(classes, classes), loss, time.perf_counter() - started)
    names = ("accuracy", "balanced_accuracy", "loss", "n")
    return {name: getattr(found, name) for name in names}, (predicted == labels).numpy()


def draw_key(stage: str, fingerprint: str) -> str:
    """Names a draw of images in the rows."""
    return f"draw/{stage}/{fingerprint}"
