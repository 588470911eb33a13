"""Accuracy, balanced accuracy, loss and recall of an adapter.

examples:
  lion-fast evaluate runs/photos                  the test split the adapter was trained beside
  lion-fast evaluate runs/photos/adapter more/    every image of another folder
"""

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lion_fast.commands.common import (
    add_adapter,
    add_running,
    add_settings,
    find_record,
    given_settings,
    load_run,
    running,
    tell_trained,
)
from lion_fast.errors import DataError, OptionError
from lion_fast.training.settings import DataSettings

if TYPE_CHECKING:
    from lion_fast.data import ImageSet
    from lion_fast.methods import TunedModel
    from lion_fast.training import Settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is evaluated on what."""
    add_adapter(parser)
    parser.add_argument(
        "data", nargs="?", metavar="DATA", help="other data [the data and split the adapter was trained on]"
    )
    parser.add_argument("--split", choices=("train", "val", "test"), help="which part [test, else val]")
    add_settings(parser, DataSettings, ("check", "strict", "cache"))
    add_running(parser)


def run(args: argparse.Namespace) -> dict:
    """Evaluate an adapter on its own test split or on other data."""
    from lion_fast.data import transforms
    from lion_fast.training import evaluate

    model, settings, folder = load_run(args.adapter, args.device, args.weights)
    if not (args.data or settings.data.data):
        raise OptionError(
            f"{folder} has no config.yaml beside it that names its data: name the DATA to evaluate"
        )
    images, about = _images(args, model, settings, folder.parent)
    metrics = evaluate(model, images.with_transform(transforms(model.backbone)), **running(args))
    result = {"adapter": str(folder), **about} | metrics.to_dict(model.classes)
    where = about["data"]
    if not args.json:
        print(f"{where}: {metrics.n:,} images, {metrics.images_per_second:.1f} a second")
        print(f"accuracy           {metrics.accuracy:.4f}")
        print(f"balanced accuracy  {metrics.balanced_accuracy:.4f}")
        print(f"loss               {metrics.loss:.4f}")
        width = max(len(name) for name in result["recall"])
        for name, recall in result["recall"].items():
            told = "no images" if recall is None else f"{recall:.4f} of {result['counts'][name]:,}"
            print(f"recall of {name:<{width}}  {told}")
    return result


def _images(
    args: argparse.Namespace, model: "TunedModel", settings: "Settings", run: Path
) -> tuple["ImageSet", dict[str, Any]]:
    """The images asked for, and what they are: "data", what has changed, how many were trained on."""
    from lion_fast.data import OFFLINE, load_images
    from lion_fast.data.record import record_of, refuse_other

    own = given_settings(args, DataSettings)
    if data := own.pop("data", None):
        record = find_record(run)
        images = load_images(data, classes=model.classes, split=args.split, **own)
        about: dict[str, Any] = {"data": f"{data} ({args.split})" if args.split else data}
    else:
        data = settings.data.data or ""
        if data not in OFFLINE and not os.path.exists(os.path.expanduser(data)):
            raise DataError(
                f"{data} is not there, which the adapter was trained on: name the DATA to evaluate, or write "
                f"where it is now to data: in {run / 'config.yaml'}"
            )
        record, described = record_of(run)
        source = replace(settings.data, duplicates="none", **own)
        split = args.split
        if record is not None:
            split = split or ("test" if record.parts["test"] else "val")
            splits = source.load(record=record, needed=(split,))
        else:
            splits = source.load(settings.train.seed)
            refuse_other(run, described, splits.description)
            split = split or ("test" if splits.test else "val")
        images = getattr(splits, split)
        if not images:
            raise DataError(f"{data} as the adapter was trained on it has no {split} images")
        if model.classes is not None and splits.classes != model.classes:
            raise DataError(f"{data} has other classes by now than the adapter was trained on")
        about = {"data": f"{data} ({split})", "changes": splits.description.get("changes", {})}
    given = [args.data] if args.data else []
    return images, about | {"training_images": tell_trained(record, settings, given, images.stored())}
