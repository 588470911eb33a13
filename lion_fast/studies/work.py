"""One run of an experiment: train a configuration, judge it, and what a row says about it."""

import contextlib
import gc
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lion_fast.backbones import Backbone, load_backbone
from lion_fast.data import ImageSet, Splits, load_data, transforms
from lion_fast.errors import CheckpointError
from lion_fast.methods import TunedModel, create
from lion_fast.options import RECORD
from lion_fast.pruning import count_parameters
from lion_fast.studies.environment import context
from lion_fast.studies.grid import Grid, Item, digest
from lion_fast.studies.rows import pack_bits, pack_integers
from lion_fast.studies.runner import tell
from lion_fast.training import FeatureStore, Metrics, TrainConfig, TrainingError, fit, predict
from lion_fast.training.checkpoints import list_checkpoints
from lion_fast.training.features import FeaturesTooLarge
from lion_fast.training.metrics import NotFinite

RANDOM_SEED = 0
# What a row says of its backbone
BACKBONE = (
    "name", "weights_source", "weights_sha256", "img_size", "mean", "std", "interpolation", "precision",
)  # fmt: skip
FITTED = ("peak_memory_bytes", "memory_measured", "epochs", "steps", "cached_features")
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
    """What a worker keeps between runs: backbones, the last draws of images, and where it runs.

    folder: of a run's curves and checkpoints, for studies that keep them; a run that was interrupted then
    goes on from its checkpoint. adapter: where a final run's is saved. progress: show bars on stderr.
    """

    grid: Grid
    backbones: dict[str, Backbone] = field(default_factory=dict)
    folder: Callable[[Item], Path] | None = None
    adapter: Callable[[Item], Path] | None = None
    progress: bool = False
    draws: dict[str, Splits] = field(default_factory=dict)
    store: FeatureStore = field(default_factory=FeatureStore)
    where: dict[str, dict[str, Any]] = field(default_factory=dict)
    made: dict[tuple[str, str, str], dict[str, Any]] = field(default_factory=dict)
    drawn: dict[str, str] = field(default_factory=dict)

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

    def splits(self, stage: str, label: str, seed: int) -> Splits:
        """The images of a set as the runs of a stage with a seed see them."""
        named = json.dumps(self.grid.draw(stage, label, seed), sort_keys=True)
        if named not in self.draws:
            while len(self.draws) >= KEPT_DRAWS:
                del self.draws[next(iter(self.draws))]
            self.draws[named] = load_data(**self.grid.draw(stage, label, seed))
        return self.draws[named]

    def fingerprint(self, stage: str, label: str, seed: int) -> str:
        """That of a draw of images, which need not be kept for it."""
        named = json.dumps(self.grid.draw(stage, label, seed), sort_keys=True)
        if named not in self.drawn:
            self.drawn[named] = self.splits(stage, label, seed).description["fingerprint"]
        return self.drawn[named]

    def circumstances(self, device: str | None) -> dict[str, Any]:
        """Versions, device, revision; asked once, when the work begins."""
        device = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
        if device not in self.where:
            self.where[device] = context(torch.device(device))
        return self.where[device]

    def key(self, item: Item) -> str:
        """Everything that determines a run: its settings and the backbone's weights."""
        return digest([item.run, self.backbone(item.backbone).weights_sha256])

    def draw_row(self, item: Item) -> dict:
        """What a draw of images is: description, and a number for each image, to see which draws share some.

        Of a tuning seed the images seen in tuning, of a final seed the test images.
        """
        splits = self.splits(item.stage, item.set, item.seed)
        parts = (splits.train, splits.val) if item.stage == "tune" else (splits.test,)
        names = [name for part in parts if part is not None for name in part.names]
        digests = [hashlib.sha256(n.encode(errors="surrogateescape")).digest() for n in names]
        numbers = [int.from_bytes(digest[:4], "big") for digest in digests]
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
        config = self.grid.config(item.set, item.label, item.index, item.seed)
        backbone, splits = self.backbone(item.backbone), self.splits(item.stage, item.set, item.seed)
        model = self.model(item)
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
                "classes": len(splits.classes),
                "skipped": splits.description.get("skipped", {}).get("count", 0),
                "settings": dict(self.grid.sets[item.set].data),
            },
            "backbone_settings": {name: getattr(backbone, name) for name in BACKBONE},
            **self.grid.about(item),
        }
        try:
            with self._work_folder(item) as folder:
                model, found = self._train_and_judge(item, model, splits, config, folder)
            row |= found
        except TrainingError as error:
            # the message may name a folder that is gone
            row["failed"] = str(error).split(";")[0]
        counts = count_parameters(model, model.head)
        row["parameters"] = {"method": counts["dense"]} | {
            name: counts[name] for name in ("with_head", "kept", "kept_with_head")
        }
        del model
        gc.collect()
        return row | {"seconds": round(time.perf_counter() - started, 3)} | self.circumstances(config.device)

    def model(self, item: Item) -> TunedModel:
        """The model of a run before training."""
        options, _ = self.grid.settings(item.set, item.label, item.index)
        return create(
            self.backbone(item.backbone),
            self.grid.methods[item.label].method,
            num_classes=len(self.splits(item.stage, item.set, item.seed).classes),
            seed=item.seed,
            **options,
        )

    @contextlib.contextmanager
    def _work_folder(self, item: Item) -> Iterator[Path]:
        if self.folder is not None:
            yield self.folder(item)
            return
        with tempfile.TemporaryDirectory(prefix="lion-fast-", ignore_cleanup_errors=True) as folder:
            yield Path(folder)

    def done(self, item: Item) -> None:
        """The run has its row: its checkpoints are not needed any more."""
        if self.folder is not None:
            shutil.rmtree(self.folder(item) / "checkpoints", ignore_errors=True)

    def _train_and_judge(
        self, item: Item, model: TunedModel, splits: Splits, config: TrainConfig, folder: Path
    ) -> tuple[TunedModel, dict[str, Any]]:
        test = splits.test if item.stage == "final" else None
        # Only a choice among epochs needs the validation images in every epoch
        needed = config.keep == "best" or config.early_stop
        # nothing in training can read the test images by mistake
        chosen = replace(splits, test=None, val=splits.val if needed else None)
        more = {"progress": self.progress, "store": self.store}
        if self.folder is None:
            config = replace(config, checkpoint_epochs=0)  # an interrupted run is run again
        resume = bool(list_checkpoints(folder / "checkpoints"))
        try:
            fitted = fit(model, chosen, config, folder, resume=resume, **more)
        except CheckpointError as error:
            if not resume:
                raise
            tell(f"{item}: begun again, its checkpoint cannot be used ({error})")
            model = self.model(item)
            fitted = fit(model, chosen, config, folder, overwrite=True, **more)
        kept = self.store if fitted.cached_features else None
        row: dict[str, Any] = {"val": None, "test": None}
        if splits.val is not None:
            row["val"] = judge(model, splits.val, config, kept)[0]
        if test is not None:
            row["test"], correct = judge(model, test, config, kept)
            row |= {"correct": pack_bits(correct), "labels": pack_integers(test.labels.numpy())}
            if self.adapter is not None:
                model.save_adapter(self.adapter(item))
                splits.save(folder / RECORD)
        return model, row | {
            "training_seconds": fitted.seconds,
            **{name: getattr(fitted, name) for name in FITTED},
            "epoch_kept": fitted.best_epoch,
            "last_epoch": fitted.history[-1],
            "pruning": asdict(fitted)["pruning"],
        }


def judge(
    model: TunedModel, images: ImageSet, config: TrainConfig, store: FeatureStore | None
) -> tuple[dict, np.ndarray]:
    """Metrics of one pass over the images, and which are right; `store` keeps constant features."""
    batch = config.eval_batch_size or config.batch_size
    reading = {"num_workers": config.num_workers, "mixed_precision": config.mixed_precision}
    started = time.perf_counter()
    try:
        probabilities = _probabilities(model, images, batch, reading, store)
    except NotFinite as error:
        raise TrainingError("the trained model's outputs are not finite") from error
    classes, labels = model.num_classes, images.labels
    predicted = probabilities.argmax(1)
    confusion = torch.bincount(labels * classes + predicted, minlength=classes * classes)
    loss = -probabilities[torch.arange(len(labels)), labels].clamp_min(1e-30).log().double().sum().item()
    found = Metrics.from_confusion(confusion.view(classes, classes), loss, time.perf_counter() - started)
    names = ("accuracy", "balanced_accuracy", "loss", "n")
    return {name: getattr(found, name) for name in names}, (predicted == labels).numpy()


def _probabilities(model, images: ImageSet, batch: int, reading, store: FeatureStore | None) -> torch.Tensor:
    if store is not None:
        view = images.with_transform(transforms(model.backbone))
        with contextlib.suppress(FeaturesTooLarge):  # there may be more of these images than of training ones
            features, _ = store.features(model, images, view, batch, **reading)
            return predict(model.behind(), features, 1024)
    return predict(model, images, batch, **reading)


def draw_key(stage: str, fingerprint: str) -> str:
    """Names a draw of images in the rows."""
    return f"draw/{stage}/{fingerprint}"
