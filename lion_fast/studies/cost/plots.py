"""Plots of measurement rows. Needs matplotlib; draws to files, no display."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lion_fast.studies.figures import OWNERS, figure_at, list_down, points, styles_of


def draw_all(rows: Sequence[Mapping[str, Any]], folder: str | os.PathLike) -> list[str]:
    """Every plot that the rows allow, into `folder`; the names of the files."""
    folder, drawn = Path(folder), []
    good = [row for row in rows if row["status"] == "ok"]
    for setting in dict.fromkeys(row["setting"] for row in good):
        inside = [row for row in good if row["setting"] == setting]
        slug = setting.replace("/", "-").replace("@", "-")
        for name, draw in (
            ("throughput", throughput_against_memory),
            ("lengths", cost_against_length),
            ("breakdown", breakdown),
        ):
            path = folder / f"{name}-{slug}.png"
            if draw(inside, path):
                drawn.append(path.name)
    return drawn


def throughput_against_memory(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike) -> bool:
    """Images a second against memory kept for the backward (inference: peak), one point per contender."""
    rows = [row for row in rows if _memory(row) is not None and not _longer(row)]
    if len(rows) < 3:
        return False
    names = list(dict.fromkeys(_name(row) for row in rows))
    with figure_at(path, (8.0, 5.0)) as figure:
        axes = figure.subplots()
        for name, colour, marker in styles_of(names):
            colour = {"floor": "0.45", "lion, states": OWNERS["method"]}.get(name, colour)
            for i, row in enumerate(r for r in rows if _name(r) == name):
                y, size = row["images_per_second"], row["batch_size"]
                bars = _bars(y, size / row["seconds_q80"], size / row["seconds_q20"])
                face = "white" if row["form"] == "naive" else colour
                look = {"colour": colour, "marker": marker, "markersize": 7, "markerfacecolor": face}
                label = name if i == 0 else None
                points(axes, _memory(row), y, yerr=bars, label=label, capsize=2, linewidth=1, **look)
        train = rows[0]["mode"] == "train"
        what = "kept for the backward" if train else "peak above the weights"
        axes.set(xlabel=f"MiB {what}", ylabel="images a second", title=_title(rows[0]))
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=-0.03 * max(_memory(row) for row in rows))  # whole markers at zero
        axes.legend(
            loc="center left",
            bbox_to_anchor=(1.01, 0.5),
            frameon=False,
            fontsize=8,
            title="hollow: naive form",
        )
    return True


def cost_against_length(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike) -> bool:
    """Time over the floor's against the number of prompts; methods without prompts as level lines."""
    lines: dict[tuple[str, str], dict[int, Mapping]] = {}
    for row in rows:
        if "length" in row["options"] and row["options"].get("depth") != "shallow":
            lines.setdefault((row["method"], row["form"]), {})[row["options"]["length"]] = row
    lines = {name: dict(sorted(some.items())) for name, some in lines.items() if len(some) > 1}
    if not lines:
        return False
    level = [row for row in rows if row["label"] in ("lion", "lion:residual", "lion:states", "floor")]
    with figure_at(path, (7.0, 4.4)) as figure:
        axes = figure.subplots()
        styles = {method: look for method, *look in styles_of(dict.fromkeys(m for m, _ in lines))}
        for (method, form), some in lines.items():
            colour, marker = styles[method]
            naive = form == "naive"
            bars = [_bars(r["ratio"], r["ratio_q20"], r["ratio_q80"]) for r in some.values()]
            points(
                axes,
                list(some),
                [row["ratio"] for row in some.values()],
                yerr=[[low for (low,), _ in bars], [high for _, (high,) in bars]],
                colour=colour,
                marker=marker,
                markersize=5,
                markerfacecolor="white" if naive else colour,
                linestyle="--" if naive else "-",
                linewidth=1.5,
                capsize=2,
                label=method + (f", {form}" if form else ""),
            )
        for row in level:
            lion = row["method"] == "lion"
            axes.axhline(
                row["ratio"],
                color="#d55e00" if lion else "0.5",
                linestyle={"floor": ":", "lion:states": "-."}.get(row["label"], "-"),
                label=f"{_name(row)} (no prompts)" if lion else "floor",
            )
        axes.set(xlabel="prompts per layer", ylabel="time over the floor's", title=_title(rows[0]))
        axes.set_xticks(sorted({length for some in lines.values() for length in some}))
        axes.legend(frameon=False, fontsize=8)
    return True


def breakdown(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike) -> bool:
    """What a training step keeps, by component, one bar per contender."""
    rows = [row for row in rows if row.get("activation_bytes") and not _longer(row)]
    if len(rows) < 2:
        return False
    with figure_at(path, (8.0, 1.4 + 0.28 * len(rows))) as figure:
        axes = figure.subplots()
        parts = {f"kept by the {part}": (part, colour) for part, colour in OWNERS.items()}
        left = [0.0] * len(rows)
        for words, (part, colour) in (parts | {"optimiser and gradients": (None, "#0072b2")}).items():
            kept = [row["activation_bytes"].get(part, 0) if part else _optimiser(row) for row in rows]
            mib = [size / 2**20 for size in kept]
            axes.barh(range(len(rows)), mib, left=left, color=colour, label=words, height=0.75)
            left = [a + b for a, b in zip(left, mib, strict=True)]
        list_down(axes, [row["label"] for row in rows])
        axes.set(xlabel="MiB", title="Memory of a training step beside the weights\n" + _title(rows[0]))
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return True


def kept_bytes(row: Mapping[str, Any]) -> int | None:
    """Bytes that a step keeps for its backward, by whoever; None where they were not counted."""
    kept = row.get("activation_bytes")
    return sum(v for k, v in kept.items() if k != "by_allocator") if kept else None


def _memory(row: Mapping[str, Any]) -> float | None:
    size = kept_bytes(row) if row["mode"] == "train" else row["peak_bytes"]
    return None if size is None else size / 2**20


def _optimiser(row: Mapping[str, Any]) -> int:
    return row["resident_bytes"]["optimiser"] + row["resident_bytes"]["gradients"]


def _bars(value: float, low: float, high: float) -> list[list[float]]:
    """What matplotlib draws from low to high around a value."""
    return [[max(0.0, value - low)], [max(0.0, high - value)]]


def _name(row: Mapping[str, Any]) -> str:
    """The method, and of LION the form too; rows from before it had two are of its residual form."""
    return f"lion, {row['form'] or 'residual'}" if row["method"] == "lion" else row["method"]


def _longer(row: Mapping[str, Any]) -> bool:
    """Whether this is a second length of a method, which the plot of lengths shows."""
    return row["method"] == "vpt" and (row["options"].get("length", 10) > 10 or "depth" in row["options"])


def _title(row: Mapping[str, Any]) -> str:
    return f"{row['setting']}, {row['device_name']}"
