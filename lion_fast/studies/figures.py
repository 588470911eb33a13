"""Plots of training runs, from the rows that the runs wrote. Needs matplotlib; draws to files, no display."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle

# Okabe and Ito: apart for every eye
_OWN_COLOURS = {"lion": "#d55e00", "vpt": "#0072b2", "probe": "#009e73"}
COLOURS = ("#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999933")
_MARKERS = "osD^vP*X"


def accuracy_over_epochs(
    histories: Mapping[str, Sequence[dict]],
    path: str | os.PathLike,
    *,
    labels: Mapping[str, str] | None = None,
) -> None:
    """Validation accuracy (solid) and training accuracy (thin, dotted) of each method over its epochs.

    Args:
        histories: Per method the rows of `FitResult.history`.
        path: File to write; its ending names the format.
        labels: Names to show for the methods.
    """
    with figure_at(path, (7.0, 4.4)) as figure:
        axes = figure.subplots()
        for name, colour, marker in styles_of(histories):
            rows = histories[name]
            epochs = [row["epoch"] for row in rows]
            axes.plot(epochs, [row["train_accuracy"] for row in rows], ":", color=colour, linewidth=1.2)
            if "val_accuracy" in rows[0]:
                axes.plot(
                    epochs,
                    [row["val_accuracy"] for row in rows],
                    color=colour,
                    marker=marker,
                    markersize=4,
                    label=f"{(labels or {}).get(name, name)}, validation",
                )
        axes.plot([], [], ":", color="0.4", linewidth=1.2, label="the same, on training images")
        axes.set(xlabel="epoch", ylabel="accuracy", title="Accuracy over epochs")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylim(top=1.02)
        axes.legend(loc="lower right", frameon=True, framealpha=0.9, edgecolor="none")


def accuracy_against_parameters(
    rows: Sequence[dict], path: str | os.PathLike, *, labels: Mapping[str, str] | None = None, title: str = ""
) -> None:
    """Test accuracy with its 95 % interval (Wilson) against trained parameters, the head included.

    Args:
        rows: Dicts with method, accuracy, n and parameters_with_head.
        path: File to write.
        labels: Names to show for the methods.
        title: Title of the plot.
    """
    by_name = {row["method"]: row for row in rows}
    with figure_at(path, (7.0, 4.4)) as figure:
        axes = figure.subplots()
        for name, colour, marker in styles_of(by_name):
            row = by_name[name]
            x, y = row["parameters_with_head"], row["accuracy"]
            low, high = wilson(y, row["n"])
            axes.errorbar(
                x,
                y,
                yerr=[[y - low], [high - y]],
                color=colour,
                marker=marker,
                markersize=8,
                capsize=4,
                linewidth=1.4,
            )
            axes.annotate(
                f"{(labels or {}).get(name, name)}\n{x:,} parameters, {y:.3f}",
                (x, y),
                xytext=(10, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
            )
        axes.set_xscale("log")
        values = [row["parameters_with_head"] for row in rows]
        axes.set_xlim(min(values) / 1.6, max(values) * 6)  # room for the words beside the last point
        axes.set(xlabel="trained parameters, head included (log scale)", ylabel="test accuracy")
        axes.set_title(title or "Accuracy against trained parameters")


def solver_over_training(
    rows: Sequence[Mapping], path: str | os.PathLike, *, tol: float | None = None
) -> None:
    """Iterations and worst residuals of the equilibrium solves at both ends over the optimiser steps.

    The forward solve stops a token as soon as it is below the tolerance, so its worst residual lies just
    there; the backward one shows what a fixed number of Neumann terms leaves.

    Args:
        rows: Rows of steps.csv (text or numbers) of a LION run.
        path: File to write.
        tol: Tolerance to mark in the residuals.
    """
    steps = [int(row["step"]) for row in rows]
    present = [end for end in ("input", "output") if f"{end}_iterations" in rows[0]]
    with figure_at(path, (7.0, 5.4)) as figure:
        upper, lower = figure.subplots(2, 1, sharex=True)
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
        upper.set(ylabel="iterations", title="Equilibrium solves during training")
        upper.set_ylim(0, 1.12 * highest)
        upper.legend(ncols=2, fontsize=8, frameon=False, loc="lower left")
        lower.set(xlabel="optimiser step", ylabel="worst relative residual", yscale="log")
        if tol is not None:
            lower.axhline(tol, color="0.4", linestyle=":", label=f"tolerance {tol:g}")
        if residuals:
            # a decade below for the legend
            low, high = min(residuals), max(*residuals, tol or 0.0)
            lower.set_ylim(low / 10, high * 2)
        lower.legend(ncols=3, fontsize=8, frameon=False, loc="lower left")


def wilson(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a share seen in n draws.

    >>> low, high = wilson(0.5, 100)
    >>> round(low, 4), round(high, 4)
    (0.4038, 0.5962)
    """
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def styles_of(names: Iterable[str]) -> list[tuple[str, str, str]]:
    """(name, colour, marker) of each; lion, vpt and probe have colours of their own, the others repeat."""
    more, markers = cycle(COLOURS), cycle(_MARKERS)
    return [(name, _OWN_COLOURS.get(name) or next(more), next(markers)) for name in names]


@contextmanager
def figure_at(path: str | os.PathLike, size: tuple[float, float]):
    """A matplotlib figure of that size in inches, written to `path` where the context ends."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style = {"axes.grid": True, "grid.color": "0.9", "axes.spines.top": False, "axes.spines.right": False}
    with rc_context(style | {"axes.axisbelow": True, "font.size": 10, "axes.titlesize": 11}):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)  # no pyplot: no window system, no global state
        yield figure
        figure.savefig(path, dpi=150)
