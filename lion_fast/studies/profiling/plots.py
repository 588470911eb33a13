"""Plots of a profile. Needs matplotlib; draws to files, no display."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lion_fast.studies.figures import OWNERS, figure_at, list_down
from lion_fast.studies.profiling.parts import PARTS

_PHASES = {"forward": "#56b4e9", "backward": "#0072b2", "optimiser": "#e69f00", "other": "0.6"}
_THERE = "#0072b2"
_RESIDENT_WORDS = {
    "backbone_weights": "weights of the backbone",
    "method_weights": "weights of method and head",
    "gradients": "gradients",
    "optimiser": "state of the optimiser",
}


def draw_all(found: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Every plot that what was found allows, into `folder`: the files' names by what they show."""
    drawn = {}
    title = f"{found['method']} on {found['backbone']}, batch {found['batch_size']}, {found['device_name']}"
    for name, draw in (("time", time_by_part), ("memory", memory_by_owner)):
        if draw(found["modes"], folder / f"{name}.png", title):
            drawn[name] = f"{name}.png"
    return drawn


def time_by_part(modes: Mapping[str, Any], path: Path, title: str) -> bool:
    """Milliseconds of each part, forward and backward behind each other, a panel for each kind of step."""
    timed = {kind: told for kind, told in modes.items() if "parts" in told}
    rows = {
        kind: [p for p in PARTS if any(p in at for at in t["parts"].values())] for kind, t in timed.items()
    }
    if not timed:
        return False
    heights = [len(parts) + 1.2 for parts in rows.values()]
    with figure_at(path, (8.0, 0.7 + 0.3 * sum(heights))) as figure:
        panels = figure.subplots(len(timed), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axes, (kind, told) in zip(panels, timed.items(), strict=True):
            for y, part in enumerate(rows[kind]):
                left = share = 0.0
                for phase, inside in told["parts"].items():
                    if part in inside:
                        width = 1e3 * inside[part]["seconds"]
                        axes.barh(y, width, left=left, color=_PHASES[phase], height=0.7)
                        left, share = left + width, share + inside[part]["share"]
                _beside(axes, left, y, f"{_short(left)} ms, {share:.1%}")
            whole = 1e3 * told["clocked"]["seconds"]
            _finish(axes, rows[kind], f"{kind}: {_short(whole)} ms a step, with the clock")
        panels[-1].set_xlabel("ms, median")
        seen = {phase for told in timed.values() for phase in told["parts"]}
        _legend(panels[0], {phase: colour for phase, colour in _PHASES.items() if phase in seen})
        figure.suptitle(f"Time by part: {title}", fontsize=10)
    return True


def memory_by_owner(modes: Mapping[str, Any], path: Path, title: str) -> bool:
    """MiB that are there all the time, and that a step keeps for its backward by owner."""
    kind = next((kind for kind, told in modes.items() if "resident_bytes" in told), None)
    if kind is None:
        return False
    told = modes[kind]
    rows = memory_rows(told)
    with figure_at(path, (8.0, 1.2 + 0.3 * len(rows))) as figure:
        axes = figure.subplots()
        for y, (name, size) in enumerate(rows.items()):
            owner = name.rpartition(": ")[2] if ": " in name else None
            mib = size / 2**20
            axes.barh(y, mib, color=OWNERS.get(owner, _THERE), height=0.7)
            _beside(axes, mib, y, f"{_short(mib)} MiB")
        _finish(axes, list(rows), f"Memory of {kind}: {title}")
        axes.set_xlabel("MiB")
    return True


def memory_rows(told: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of what is there all the time and of what a step keeps, by their names."""
    there = told["resident_bytes"]
    rows = {words: there[name] for name, words in _RESIDENT_WORDS.items() if there[name]}
    kept = told.get("activation_bytes", {})
    return rows | {f"kept for the backward: {owner}": size for owner, size in kept.items()}


def allocator_level(level: Sequence[tuple[float, int]], path: Path) -> None:
    """MiB in use by torch's CUDA allocator over a step, from (seconds, bytes) after each event."""
    with figure_at(path, (8.0, 3.2)) as figure:
        axes = figure.subplots()
        axes.step([1e3 * s for s, _ in level], [b / 2**20 for _, b in level], where="post", color=_THERE)
        axes.set(xlabel="ms (while recording)", ylabel="MiB in use", title="CUDA allocator over a step")
        axes.set_ylim(bottom=0)


def _short(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.0f}" if value >= 1000 else f"{value:.1f}"


def _beside(axes, x: float, y: float, words: str) -> None:
    axes.annotate(words, (x, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)


def _finish(axes, names: Sequence[str], title: str) -> None:
    list_down(axes, names)
    axes.set_xlim(0, 1.25 * axes.dataLim.xmax or 1.0)  # room for the words beside the longest bar
    axes.set_title(title, fontsize=9, loc="left")


def _legend(axes, colours: Mapping[str, str]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=colour, label=phase) for phase, colour in colours.items()]
    axes.legend(handles=handles, frameon=False, fontsize=8, loc="lower right")
