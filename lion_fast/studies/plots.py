"""Pictures of an experiment. Needs matplotlib; draws to files, no display."""

import math
import os
import re
from pathlib import Path

from lion_fast.studies.figures import figure_at, styles_of
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


def accuracy_against_parameters(results: Results, backbone: str, path: Path) -> bool:
    """Mean over the sets of the metric, with intervals, against trained parameters, head included."""
    grid = results.grid
    metric, points = _metric(results), []
    for label, colour, marker in styles_of(grid.methods):
        estimate = results.mean_estimate(backbone, label, metric)
        ends = results.parameters(backbone, label, "kept_with_head")
        if estimate is not None and ends is not None:
            points.append((label, colour, marker, math.sqrt(ends[0] * ends[1]), estimate))
    if not points:
        return False
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    with figure_at(path, (7.6, 4.6)) as figure:
        axes = figure.subplots()
        for label, colour, marker, x, estimate in points:
            axes.errorbar(
                x,
                100 * estimate.point,
                yerr=_bars(estimate),
                color=colour,
                marker=marker,
                markersize=7,
                capsize=3,
                linewidth=1.2,
                linestyle="none",
                label=label,
            )
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_minor_formatter(NullFormatter())
        low, high = min(p[3] for p in points), max(p[3] for p in points)
        axes.set_xlim(low / 1.5, high * 1.5)
        sets = "1 set" if len(grid.sets) == 1 else f"mean of {len(grid.sets)} sets"
        axes.set(
            xlabel="trained parameters, head included (log scale)",
            ylabel=f"{_NAMES[metric]} on test images, %, {sets}",
            title=f"Accuracy against trained parameters, {backbone}\n"
            f"bars: 95 % intervals over {len(grid.seeds)} seeds and their test images",
        )
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
    return True


def differences(results: Results, backbone: str, path: Path) -> bool:
    """Difference from the reference with its interval, a panel a set and one for their mean."""
    grid = results.grid
    if grid.reference is None:
        return False
    metric = _metric(results)
    styles = [s for s in styles_of(grid.methods) if s[0] != grid.reference]
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
                    axes.text(
                        0.5,
                        y,
                        "no rows",
                        ha="center",
                        va="center",
                        fontsize=8,
                        color="0.4",
                        transform=axes.get_yaxis_transform(),
                        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
                    )
                    continue
                axes.errorbar(
                    100 * estimate.point,
                    y,
                    xerr=_bars(estimate),
                    color=colour,
                    marker=marker,
                    markersize=5.5,
                    capsize=2.5,
                    linewidth=1.3,
                    linestyle="none",
                )
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
