"""What every plot is drawn with. Needs matplotlib; draws to files, no display."""

import os
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from itertools import cycle

from lion_fast.files import writing

# Okabe and Ito: apart for every eye
_OWN_COLOURS = {"lion": "#d55e00", "vpt": "#0072b2", "probe": "#009e73"}
COLOURS = ("#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999933")
_MARKERS = "osD^vP*X"
# Who keeps memory in a step, see `memory.OWNERS`
OWNERS = {"backbone": "#999999", "method": "#d55e00", "head": "#009e73", "loss": "#cc79a7"}


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
        with writing(path):
            figure.savefig(path, dpi=150)


def points(axes, x, y, *, colour: str, marker: str, **more) -> None:
    """Points with bars (`xerr`, `yerr`), joined by a line only where `linestyle` says so."""
    look = {"markersize": 6, "capsize": 2.5, "linewidth": 1.3, "linestyle": "none"}
    axes.errorbar(x, y, color=colour, marker=marker, **look | more)


def list_down(axes, names: Sequence[str]) -> None:
    """Name the horizontal bars at 0, 1, ... from the top down."""
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
