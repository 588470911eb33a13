"""Accuracy, balanced accuracy, loss and recall of an adapter.

examples:
  lion-fast evaluate runs/photos                  the test split the adapter was trained beside
  lion-fast evaluate runs/photos/adapter more/    every image of another folder
"""

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

from lion_fast.commands.common import (
    add_adapter,
    add_running,
    add_settings,
    given_settings,
    load_run,
    running,
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
    images, where = _images(args, model, settings)
    metrics = evaluate(model, images.with_transform(transforms(model.backbone)), **running(args))
    result = {"adapter": str(folder), "data": where} | metrics.to_dict(model.classes)
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


def _images(args: argparse.Namespace, model: "TunedModel", settings: "Settings") -> tuple["ImageSet", str]:
    """The images asked for, and what they are called."""
    from lion_fast.data import load_images

    own = given_settings(args, DataSettings)
    if data := own.pop("data", None):
        images = load_images(data, classes=model.classes, split=args.split, **own)
        return images, f"{data} ({args.split})" if args.split else data
    splits = replace(settings.data, **own).load(settings.train.seed)
    split, data = args.split or ("test" if splits.test else "val"), settings.data.data
    images = getattr(splits, split)
    if not images:
        raise DataError(f"{data} as the adapter was trained on it has no {split} images")
    if model.classes is not None and splits.classes != model.classes:
        raise DataError(f"{data} has other classes by now than the adapter was trained on")
    return images, f"{data} ({split})"
