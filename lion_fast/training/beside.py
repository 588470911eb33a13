"""The linear probe on the same images, so that no result of a method stands alone."""

import math
import tempfile
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch.utils.data import TensorDataset

from lion_fast.methods import Probe
from lion_fast.methods.reading import Reading, ReadingModel, encoding_of
from lion_fast.training.config import TrainConfig
from lion_fast.training.features import FeatureStore
from lion_fast.training.items import with_transform
from lion_fast.training.presets import preset, size_of
from lion_fast.training.result import FitResult
from lion_fast.training.run import fit

if TYPE_CHECKING:
    from lion_fast.backbones import Backbone
    from lion_fast.data import Splits
    from lion_fast.methods import TunedModel


def probe_beside(
    model: "TunedModel",
    backbone: "Backbone",
    fitted: FitResult,
    splits: "Splits",
    config: TrainConfig,
    store: FeatureStore,
) -> dict[str, Any] | None:
    """What a linear probe on the pooled features reaches on the validation images, beside a trained model.

    backbone: The model's as it was loaded, where the model has changed its own. store: That of the run.
    Where the model reads a map, its features hold what the probe reads, and it costs a second; else the
    backbone runs once more over the images. The probe has the training settings of LION's preset for so many
    images, and keeps its best or last epoch as `config` says.

    Returns "val_accuracy" and "val_balanced_accuracy" of the probe, "gain" of the model's accuracy over it,
    and "as_good": the gain is no more than a standard error of an accuracy on so many images. None without
    validation images, and for the probe itself.
    """
    is_probe = isinstance(model, Probe) and not model.reading.at
    if splits.val is None or is_probe:
        return None
    probe = Probe(backbone, model.num_classes, pool=model.pool)
    if isinstance(model, ReadingModel) and model.reading.at and fitted.cached_features:
        batch, precision = config.eval_batch_size or config.batch_size, config.mixed_precision
        for images in (splits.train, splits.val):
            given = (model, images, with_transform(model, images), batch)
            made, seconds = store.features(*given, mixed_precision=precision)
            features = made.tensors[0][:, : backbone.pooled_width(model.pool)].contiguous()
            given = (probe, images, batch, precision, encoding_of(model.pool, Reading(())))
            store.put(given, TensorDataset(features, made.tensors[1]), seconds)
    settings = preset("lion", size_of(len(splits.train), model.num_classes)).train
    settings = {name: settings[name] for name in ("lr", "weight_decay", "epochs", "warmup_epochs")}
    more = {"augment": "none", "cache_features": True, "prune": None, "early_stop": 0, "lr_head": None}
    with tempfile.TemporaryDirectory(prefix="lion-fast-") as folder:
        one = replace(config, **settings, **more, optimizer="adamw", tensorboard=False, checkpoint_epochs=0)
        found = fit(probe, splits, one, folder, progress=False, store=store)
    best, own = (result.history[result.best_epoch - 1] for result in (found, fitted))
    gain, share = own["val_accuracy"] - best["val_accuracy"], best["val_accuracy"]
    return {
        "val_accuracy": share,
        "val_balanced_accuracy": best["val_balanced_accuracy"],
        "gain": gain,
        "as_good": gain <= math.sqrt(share * (1 - share) / len(splits.val)),
    }
