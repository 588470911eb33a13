"""Presets: a method's options and training settings, as published ("paper"), alike for all ("common"), or
for LION by the number of training images ("few", "small", "large"; docs/accuracy.md).

Settings are plain data with the names of `create`'s options and of `lion_fast.training.TrainConfig`:

    chosen = preset("cvpt", task="kitti")
    model = create(backbone, "cvpt", num_classes=4, **chosen.options)
    fit(model, splits, TrainConfig(**chosen.train), out_dir)

What a paper searches over stands in `grid`; what it says per task of VTAB-1k in `TASKS`. Tasks are named as
the folders of the usual image copies of VTAB-1k are. `note` says where a preset departs from its source.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lion_fast.errors import OptionError, check_choice
from lion_fast.methods.base import available

NATURAL = ("cifar", "caltech101", "dtd", "oxford_flowers102", "oxford_iiit_pet", "svhn", "sun397")
SPECIALIZED = ("patch_camelyon", "eurosat", "resisc45", "diabetic_retinopathy")
STRUCTURED = (
    "clevr_count", "clevr_dist", "dmlab", "kitti", "dsprites_loc", "dsprites_ori", "smallnorb_azi",
    "smallnorb_ele",
)  # fmt: skip
VTAB = NATURAL + SPECIALIZED + STRUCTURED


@dataclass(frozen=True)
class Preset:
    """One setting of one method.

    options: of the method. train: of `TrainConfig`. grid: values searched over in the source, by the name of
    the option or setting (learning rates as given to the optimiser, at this preset's batch size). note: what
    differs from the source or is not known.
    """

    method: str
    name: str
    options: Mapping[str, Any]
    train: Mapping[str, Any]
    grid: Mapping[str, tuple] = field(default_factory=dict)
    note: str = ""


def preset(method: str, name: str = "paper", task: str | None = None) -> Preset:
    """The preset `name` of a method: "paper", "common" or, for "lion", one of `SIZES` (see `size_of`).

    With `task`, a task of `VTAB`, the paper's values for it. `OptionError` for an unknown method, preset or
    task, and where the paper says nothing about single tasks.

    >>> preset("cvpt", task="kitti").options["length"], preset("cvpt", task="kitti").train["lr"]
    (20, 0.005)
    >>> preset("ssf", "common").train["optimizer"]
    'adamw'
    """
    if method not in available():
        raise OptionError(f"no method named {method!r}; the methods are {', '.join(available())}")
    by_size = _BY_SIZE.get(method, {})
    check_choice("preset", name, ("paper", "common", *by_size))
    if name in by_size:
        options, train, grid, note = by_size[name]
    else:
        options, train, grid, note = _PAPER[method] if name == "paper" else _common(method)
    options, train = dict(options), dict(train)
    if task is not None:
        if name != "paper":
            raise OptionError(f"the {name} preset is the same for every task; leave task out")
        check_choice("task", task, VTAB)
        if method not in TASKS:
            raise OptionError(f"no values by task are known for {method}; use its preset without task")
        for key, value in TASKS[method][task].items():
            (train if key in ("lr", "weight_decay", "batch_size", "seed") else options)[key] = value
    return Preset(method, name, options, train, grid, note)


_LONG = {"epochs": 100, "warmup_epochs": 10.0, "keep": "last", "label_smoothing": 0.0, "augment": "none"}
_ADAMW = {**_LONG, "optimizer": "adamw", "lr": 1e-3, "weight_decay": 1e-4, "batch_size": 64}
_SGD = {**_LONG, "optimizer": "sgd", "batch_size": 64}

# VPT's grid of base rates, for a batch of 256; a batch of 64 takes a quarter
_VPT_RATES = tuple(base / 4 for base in (50.0, 25.0, 10.0, 5.0, 2.5, 1.0, 0.5, 0.25, 0.1, 0.05))
_VPT_GRID = {"lr": _VPT_RATES, "weight_decay": (1e-2, 1e-3, 1e-4, 0.0)}
_VPT = {**_SGD, "lr": 0.25, "weight_decay": 1e-3}
_LENGTHS = (1, 5, 10, 50, 100, 200)
_BACKBONE = {**_LONG, "optimizer": "adamw", "lr": 1e-3, "weight_decay": 1e-2, "batch_size": 128}
_BACKBONE_GRID = {"lr": (1e-3, 1e-4, 5e-4, 5e-3), "weight_decay": (1e-2, 1e-3, 1e-4, 0.0)}
_SEARCHED = "lr and weight_decay are searched per task, selected on the validation images at the last epoch"
_DROP_PATH = "its stochastic depth is left out: a frozen backbone has it off"
_OWNED = f"{_SEARCHED}; dropout and stochastic depth of the backbone stay off"

# method: options, training, grid, note
_PAPER: dict[str, tuple[dict, dict, dict, str]] = {
    "lion": (
        {"form": "residual"},
        _ADAMW,
        {},
        "the form of the public text; LION's training settings are not published: the common preset",
    ),
    "probe": (
        {},
        {**_SGD, "batch_size": 2048, "lr": 8.0, "weight_decay": 1e-3},
        {"lr": tuple(32 * rate for rate in _VPT_RATES), "weight_decay": _VPT_GRID["weight_decay"]},
        f"VPT's linear probe; {_SEARCHED}",
    ),
    "full": ({}, _BACKBONE, _BACKBONE_GRID, f"VPT's; {_OWNED}"),
    "partial": ({"blocks": 1}, _BACKBONE, _BACKBONE_GRID, f"VPT's; {_OWNED}"),
    "bitfit": ({}, _BACKBONE, _BACKBONE_GRID, f"VPT's; {_OWNED}"),
    "lntune": ({}, _ADAMW, {}, "no settings of a source are known; this is the common preset"),
    "vpt": (
        {"depth": "deep", "length": 10, "dropout": 0.1},
        _VPT,
        {**_VPT_GRID, "length": _LENGTHS},
        f"{_SEARCHED}, length with them; batches of 128 below 100 prompts; its schedule moves per epoch; "
        "lengths by task are inferred from published shares of tuned parameters",
    ),
    "e2vpt": (
        {"length": 10, "kv_length": 5, "masks": "learned", "dropout": 0.1},
        _VPT,
        {**_VPT_GRID, "prune_ratio": tuple(i / 10 for i in range(1, 10))},
        f"{_SEARCHED}, then every pair of ratios is pruned, rewound and trained again; the published "
        "commands cannot be the runs behind the published parameter counts on about half the tasks",
    ),
    "vfpt": (
        {"length": 10, "fraction": 0.5, "dropout": 0.1},
        _VPT,
        {**_VPT_GRID, "length": _LENGTHS, "fraction": (0.0, 0.3, 0.5, 0.7, 1.0)},
        f"{_SEARCHED}; lengths by task are inferred from published shares of tuned parameters, to +-1",
    ),
    "cvpt": (
        {"length": 10, "dropout": 0.1},
        {**_LONG, "optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.05, "batch_size": 32},
        {},
        f"{_DROP_PATH} (0.1 there); the published runs keep the epoch that is best on the test images, this "
        "preset the last one; seeds are the published ones",
    ),
    "dyt": (
        {"rank": 8, "rate": 0.5, "temperature": 5.0, "scale": 1.0, "dropout": 0.1},
        _ADAMW,
        {"rate": (0.5, 0.7, 0.9)},
        "the published script has rank 16; the published runs keep the epoch that is best on the test "
        "images, this preset the last one",
    ),
    "ssf": (
        {},
        {**_LONG, "optimizer": "adamw", "lr": 5e-3, "weight_decay": 5e-5, "batch_size": 64},
        {},
        f"{_DROP_PATH} (0 to 0.2 by task there); the published runs keep the epoch that is best on the test "
        "images, this preset the last one",
    ),
    "apt": ({"length": 200}, _ADAMW, {}, "a port: no published settings for image classification"),
    "adaptformer": ({"rank": 8, "scale": 0.1, "dropout": 0.1}, _ADAMW, {}, "VTAB-1k re-runs of others"),
    "houlsby": ({"rank": 8}, _ADAMW, {}, "as NOAH trains its (single, sequential) adapter"),
    "lora": ({"rank": 8, "target": "qkv"}, _ADAMW, {}, "as NOAH trains its LoRA"),
}


# By the number of training images. Rate and decay were chosen on validation images of the grey sets of
# docs/accuracy.md, up to 1,572 of them; "large" follows from its longer epochs and was not tuned. The width
# is chosen with the reading.
_LION_GRID = {"lr": (2e-3, 5e-3), "state_dim": (32, 64)}
_LION = {**_ADAMW, "warmup_epochs": 1.0, "lr": 5e-3, "weight_decay": 0.3, "batch_size": 32}
_BY_SIZE: dict[str, dict[str, tuple[dict, dict, dict, str]]] = {
    "lion": {
        "few": ({}, {**_LION, "epochs": 60}, _LION_GRID, "up to 20 images a class"),
        "small": ({}, {**_LION, "epochs": 20}, _LION_GRID, "up to 5,000 images"),
        "large": (
            {},
            {**_LION, "lr": 2e-3, "batch_size": 64, "epochs": 20},
            _LION_GRID,
            "more; not tuned",
        ),
    }
}
SIZES = ("few", "small", "large")


def size_of(images: int, classes: int) -> str:
    """The preset of `SIZES` for so many training images of so many classes.

    >>> size_of(160, 10), size_of(1_000, 10), size_of(50_000, 100)
    ('few', 'small', 'large')
    """
    if images <= 20 * classes:
        return "few"
    return "small" if images <= 5_000 else "large"


def _common(method: str) -> tuple[dict, dict, dict, str]:
    """One AdamW setting for all: what a comparison can use that tunes no method more than another."""
    rank = {name: {"rank": 8} for name in ("adaptformer", "houlsby", "lora", "dyt")}
    length = {name: {"length": 10} for name in ("vpt", "e2vpt", "vfpt", "cvpt", "apt")}
    options = (rank | length).get(method, {})
    # six configurations for each; LION's default variant wants a stronger decay than methods that tune blocks
    grid = {"lr": (1e-3, 5e-3, 1e-2), "weight_decay": (1e-4, 1e-2)}
    grid = {"lr": (1e-3, 5e-3), "weight_decay": (1e-4, 0.1, 0.3)} if method == "lion" else grid
    return options, _ADAMW, grid, ""


def _by_task(names: tuple[str, ...], *rows: tuple) -> dict[str, dict[str, Any]]:
    """Rows of values, in the order of `VTAB`, to a mapping by task."""
    assert all(len(row) == len(VTAB) for row in rows), [len(row) for row in rows]
    columns = zip(*rows, strict=True)
    return {task: dict(zip(names, column, strict=True)) for task, column in zip(VTAB, columns, strict=True)}


# By task, in the order of VTAB: natural, specialized, structured.
TASKS: dict[str, dict[str, dict[str, Any]]] = {
    "vpt": _by_task(
        ("length",),
        (10, 10, 10, 1, 1, 50, 5) + (100, 100, 10, 1) + (50, 200, 100, 50, 10, 50, 200, 200),
    ),
    "vfpt": _by_task(
        ("length", "fraction"),
        (10, 20, 15, 2, 2, 10, 5) + (100, 10, 6, 2) + (50, 200, 10, 66, 10, 50, 180, 200),
        (0.7, 0.5, 0.3, 0.5, 0.5, 0.2, 0.5) + (1.0, 0.3, 1.0, 1.0)
        + (1.0, 1.0, 0.7, 0.5, 1.0, 0.7, 1.0, 0.7),
    ),
    "e2vpt": _by_task(
        ("length", "kv_length"),
        (5, 32, 10, 1, 10, 10, 10) + (10, 10, 10, 10) + (10, 10, 10, 10, 5, 5, 10, 10),
        (5, 5, 5, 1, 5, 5, 5) + (10, 5, 5, 5) + (5, 5, 5, 5, 5, 5, 5, 5),
    ),
    "cvpt": _by_task(
        ("lr", "length", "seed", "weight_decay", "batch_size"),
        (1e-3, 1e-3, 1e-3, 2e-3, 1e-3, 1e-2, 2e-3) + (1e-2, 5e-3, 5e-3, 5e-3)
        + (1e-3, 1e-3, 2e-3, 5e-3, 5e-3, 5e-3, 5e-3, 1e-3),
        (10, 200, 10, 5, 5, 5, 10) + (1, 5, 10, 5) + (20, 50, 200, 20, 20, 5, 50, 50),
        (44, 800, 80, 44, 44, 800, 80) + (800, 800, 800, 42) + (42, 80, 44, 44, 42, 800, 44, 44),
        (0.05, 0.05, 0.05, 0.05, 1e-5, 0.05, 0.05) + (1e-5, 0.05, 0.05, 1e-5)
        + (0.05, 1e-5, 0.05, 0.05, 1e-5, 1e-5, 0.05, 0.05),
        (32, 32, 64, 16, 64, 32, 16) + (16, 32, 16, 32) + (16, 64, 16, 16, 32, 16, 32, 32),
    ),
    "ssf": _by_task(
        ("lr", "weight_decay"),
        (5e-3, 1e-3, 5e-3, 5e-3, 5e-3, 1e-2, 5e-3) + (5e-3, 3e-3, 2e-3, 5e-3)
        + (2e-3, 5e-2, 5e-3, 1e-2, 1e-2, 5e-3, 2e-2, 5e-3),
        (5e-5, 0.05, 5e-5, 5e-5, 5e-5, 5e-5, 5e-5) + (5e-5, 0.05, 5e-5, 5e-5)
        + (0.05, 0.05, 5e-5, 5e-5, 5e-5, 5e-5, 5e-5, 0.05),
    ),
}  # fmt: skip
