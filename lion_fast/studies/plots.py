"""Pictures of an experiment and of single runs. Needs matplotlib; draws to files, no display."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from lion_fast.studies.figures import figure_at, points, styles_of
from lion_fast.studies.grid import Grid
from lion_fast.studies.statistics import Estimate
from lion_fast.studies.tables import Results

_COLUMNS = 4
_NAMES = {"accuracy": "accuracy", "balanced_accuracy": "balanced accuracy"}


def slug(label: str) -> str:
    """A label as a part of a file's name."""
    return re.sub(r"[^\w.-]+", "-", label)


def draw_all(results: Results, folder: str | os.PathLike) -> list[str]:
    """Every plot that the rows allow; the names of the files."""
    drawn = []
    for backbone in results.grid.backbones:
        for name, draw in (("accuracy", accuracy_against_parameters), ("differences", differences)):
            path = Path(folder) / f"{name}-{slug(backbone)}.png"
            if draw(results, backbone, path):
                drawn.append(path.name)
    return drawn


def _styles(grid: Grid) -> list[tuple[str, str, str]]:
    """(label, colour, marker); a label that stands alone for its method is drawn as that method."""
    methods = [spec.method for spec in grid.methods.values()]
    names = [
        spec.method if methods.count(spec.method) == 1 else label for label, spec in grid.methods.items()
    ]
    return [(label, *look) for label, (_, *look) in zip(grid.methods, styles_of(names), strict=True)]


def accuracy_against_parameters(
    results: Results, backbone: str, path: Path, beside: Sequence[Results] = ()
) -> bool:
    """Mean over the sets of the metric, with intervals, against trained parameters, head included.

    beside: results of other sets, each in a panel of its own.
    """
    panels = [(one, found) for one in (results, *beside) if (found := _accuracies(one, backbone))]
    if not panels:
        return False
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    with figure_at(path, (3.2 + 4.4 * len(panels), 4.6)) as figure:
        for axes, (one, found) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            for label, colour, marker, x, estimate in found:
                bars = _bars(estimate)
                points(axes, x, 100 * estimate.point, yerr=bars, colour=colour, marker=marker, label=label)
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            axes.xaxis.set_minor_formatter(NullFormatter())
            low, high = min(p[3] for p in found), max(p[3] for p in found)
            axes.set_xlim(low / 1.5, high * 1.5)
            sets = "1 set" if len(one.grid.sets) == 1 else f"mean of {len(one.grid.sets)} sets"
            axes.set_ylabel(f"{_NAMES[_metric(one)]} on test images, %, {sets}")
            if beside:
                axes.set_title(", ".join(one.grid.sets))
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
        seeds = results.grid.seeds
        told = "1 seed and its" if len(seeds) == 1 else f"{len(seeds)} seeds and their"
        figure.supxlabel("trained parameters, head included (log scale)", fontsize=10)
        figure.suptitle(
            f"Accuracy against trained parameters, {backbone}\nbars: 95 % intervals over {told} test images",
            fontsize=11,
        )
    return True


def _accuracies(results: Results, backbone: str) -> list[tuple[str, str, str, float, Estimate]]:
    """(label, colour, marker, parameters, accuracy) of each method that has rows."""
    found = []
    for label, colour, marker in _styles(results.grid):
        estimate = results.mean_estimate(backbone, label, _metric(results))
        ends = results.parameters(backbone, label, "kept_with_head")
        if estimate is not None and ends is not None:
            found.append((label, colour, marker, math.sqrt(ends[0] * ends[1]), estimate))
    return found


def differences(results: Results, backbone: str, path: Path) -> bool:
    """Difference from the reference with its interval, a panel a set and one for their mean."""
    grid = results.grid
    if grid.reference is None:
        return False
    metric = _metric(results)
    styles = [s for s in _styles(grid) if s[0] != grid.reference]
    panels: list[tuple[str, list[Estimate | None]]] = []
    for set_label in grid.sets:
        found = [results.difference(backbone, set_label, s[0], grid.reference, metric) for s in styles]
        panels.append((set_label, [pair[0] if pair else None for pair in found]))
    if len(grid.sets) > 1:
        mean = [results.mean_difference(backbone, s[0], grid.reference, metric) for s in styles]
        panels.append(("mean of sets", mean))
    if not any(estimate for _, column in panels for estimate in column):
        return False
    columns = min(_COLUMNS, len(panels))
    lines = math.ceil(len(panels) / columns)
    height = lines * (0.9 + 0.27 * len(styles)) + 0.7
    with figure_at(path, (2.2 + 2.3 * columns, max(2.6, height))) as figure:
        grid_of_axes = figure.subplots(lines, columns, sharey=True, squeeze=False)
        flat = list(grid_of_axes.flat)
        for axes, (title, column) in zip(flat, panels, strict=False):
            for y, ((_, colour, marker), estimate) in enumerate(zip(styles, column, strict=True)):
                if estimate is None:
                    look = {"ha": "center", "va": "center", "fontsize": 8, "color": "0.4"}
                    look |= {"bbox": {"facecolor": "white", "edgecolor": "none", "pad": 1.5}}
                    axes.text(0.5, y, "no rows", transform=axes.get_yaxis_transform(), **look)
                    continue
                points(axes, 100 * estimate.point, y, xerr=_bars(estimate), colour=colour, marker=marker)
            axes.axvline(0, color="0.35", linewidth=1)
            axes.set_title(title, fontweight="bold" if title == "mean of sets" else "normal")
            axes.set_yticks(range(len(styles)), [s[0] for s in styles])
            axes.set_ylim(len(styles) - 0.4, -0.6)
            axes.margins(x=0.08)
            axes.locator_params(axis="x", nbins=5)
        for axes in flat[len(panels) :]:
            axes.set_visible(False)
        figure.suptitle(
            f"{_NAMES[metric].capitalize()} minus that of {grid.reference}, {backbone}", fontsize=11
        )
        figure.supxlabel("percentage points, with 95 % intervals", fontsize=10)
    return True


def _metric(results: Results) -> str:
    """Balanced accuracy for all sets where one of them is judged by it, else accuracy."""
    balanced = any(images.monitor == "balanced_accuracy" for images in results.grid.sets.values())
    return "balanced_accuracy" if balanced else "accuracy"


def _bars(estimate: Estimate) -> list[list[float]]:
    # the percentile interval need not hold the point
    below, above = estimate.point - estimate.low, estimate.high - estimate.point
    return [[100 * max(0.0, below)], [100 * max(0.0, above)]]


def accuracy_over_epochs(
    panels: Mapping[str, Mapping[str, Sequence[dict]]], path: str | os.PathLike, labels: Mapping[str, str]
) -> None:
    """Validation accuracy (solid) and training accuracy (thin, dotted) of each method over its epochs.

    Args:
        panels: By title, per method the rows of `FitResult.history`, with validation.
        path: File to write; its ending names the format.
        labels: Names to show for the methods.
    """
    with figure_at(path, (1.0 + 6.0 * len(panels), 4.4)) as figure:
        row = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (title, histories) in zip(row, panels.items(), strict=True):
            for name, colour, marker in styles_of(histories):
                columns = ("epoch", "train_accuracy", "val_accuracy")
                epochs, train, val = ([row[column] for row in histories[name]] for column in columns)
                axes.plot(epochs, train, ":", color=colour, linewidth=1.2)
                look = {"color": colour, "marker": marker, "markersize": 4}
                axes.plot(epochs, val, label=f"{labels[name]}, validation", **look)
            axes.plot([], [], ":", color="0.4", linewidth=1.2, label="the same, on training images")
            axes.set(xlabel="epoch", ylabel="accuracy", title=f"Accuracy over epochs, {title}")
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.set_ylim(top=1.02)
            axes.legend(loc="lower right", frameon=True, framealpha=0.9, edgecolor="none")


def solver_over_training(
    panels: Mapping[str, Sequence[Mapping]], path: str | os.PathLike, tol: float
) -> None:
    """Iterations and worst residuals of the equilibrium solves at both ends over the optimiser steps.

    The forward solve stops a token as soon as it is below the tolerance, so its worst residual lies just
    there; the backward one shows what a fixed number of Neumann terms leaves.

    Args:
        panels: By title, the rows of steps.csv (text or numbers) of a LION run.
        path: File to write.
        tol: Tolerance to mark in the residuals.
    """
    with figure_at(path, (1.0 + 6.0 * len(panels), 5.4)) as figure:
        columns = figure.subplots(2, len(panels), sharex="col", squeeze=False).T
        for (upper, lower), (title, rows) in zip(columns, panels.items(), strict=True):
            _solver(upper, lower, rows, tol)
            upper.set_title(f"Equilibrium solves during training, {title}")


def _solver(upper, lower, rows: Sequence[Mapping], tol: float) -> None:
    steps = [int(row["step"]) for row in rows]
    present = [end for end in ("input", "output") if f"{end}_iterations" in rows[0]]
    residuals: list[float] = []
    highest = 1.0
    for end, colour in zip(present, ("#0072b2", "#d55e00"), strict=False):
        mean = [float(row[f"{end}_iterations"]) for row in rows]
        most = [float(row[f"{end}_max_iterations"]) for row in rows]
        upper.plot(steps, mean, color=colour, label=f"{end} end, mean over tokens")
        upper.plot(steps, most, "--", color=colour, linewidth=1.0, label=f"{end} end, slowest token")
        for key, line, what in (("residual", "-", ""), ("backward_residual", "--", ", backward")):
            values = [float(row.get(f"{end}_{key}") or "nan") for row in rows]
            if not all(map(math.isnan, values)):
                lower.plot(steps, values, line, color=colour, linewidth=1.4, label=f"{end} end{what}")
                residuals += [value for value in values if value > 0]
        highest = max(highest, *most)
    upper.set_ylabel("iterations")
    upper.set_ylim(0, 1.12 * highest)
    upper.legend(ncols=2, fontsize=8, frameon=False, loc="lower left")
    lower.set(xlabel="optimiser step", ylabel="worst relative residual", yscale="log")
    lower.axhline(tol, color="0.4", linestyle=":", label=f"tolerance {tol:g}")
    if residuals:
        # a decade below for the legend
        low, high = min(residuals), max(*residuals, tol)
        lower.set_ylim(low / 10, high * 2)
    lower.legend(ncols=3, fontsize=8, frameon=False, loc="lower left")
