"""Plots of measurement rows. Needs matplotlib; draws to files, no display."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lion_fast.studies.figures import figure_at, styles_of

_PARTS = {
    "backbone": "#999999",
    "method": "#d55e00",
    "head": "#009e73",
    "loss": "#cc79a7",
    "optimiser": "#0072b2",
}


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
            colour = {"floor": "0.45", "lion, states": _PARTS["method"]}.get(name, colour)
            for i, row in enumerate(r for r in rows if _name(r) == name):
                slow = row["batch_size"] / row["seconds_q80"]
                fast = row["batch_size"] / row["seconds_q20"]
                y = row["images_per_second"]
                hollow = row["form"] == "naive"
                axes.errorbar(
                    _memory(row),
                    y,
                    yerr=[[max(0.0, y - slow)], [max(0.0, fast - y)]],
                    color=colour,
                    marker=marker,
                    markersize=7,
                    markerfacecolor="white" if hollow else colour,
                    capsize=2,
                    linewidth=1,
                    linestyle="none",
                    label=name if i == 0 else None,
                )
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
    lines: dict[str, list] = {}
    for row in rows:
        length = row["options"].get("length")
        if length is not None and not row["options"].get("depth") == "shallow":
            lines.setdefault(row["method"] + (f", {row['form']}" if row["form"] else ""), []).append(
                (length, row)
            )
    lines = {name: sorted(some, key=lambda s: s[0]) for name, some in lines.items() if len(some) > 1}
    if not lines:
        return False
    level = [row for row in rows if row["label"] in ("lion", "lion:residual", "lion:states", "floor")]
    with figure_at(path, (7.0, 4.4)) as figure:
        axes = figure.subplots()
        methods = list(dict.fromkeys(some[0][1]["method"] for some in lines.values()))
        styles = {method: (colour, marker) for method, colour, marker in styles_of(methods)}
        for name, some in lines.items():
            colour, marker = styles[some[0][1]["method"]]
            naive = some[0][1]["form"] == "naive"
            ys = [row["ratio"] for _, row in some]
            low = [max(0.0, row["ratio"] - row["ratio_q20"]) for _, row in some]
            high = [max(0.0, row["ratio_q80"] - row["ratio"]) for _, row in some]
            axes.errorbar(
                [length for length, _ in some],
                ys,
                yerr=[low, high],
                color=colour,
                marker=marker,
                markersize=5,
                markerfacecolor="white" if naive else colour,
                linestyle="--" if naive else "-",
                capsize=2,
                label=name,
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
        axes.set_xticks(sorted({length for some in lines.values() for length, _ in some}))
        axes.legend(frameon=False, fontsize=8)
    return True


def breakdown(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike) -> bool:
    """What a training step keeps, by component, one bar per contender."""
    rows = [row for row in rows if row.get("activation_bytes") and not _longer(row)]
    if len(rows) < 2:
        return False
    with figure_at(path, (8.0, 1.4 + 0.28 * len(rows))) as figure:
        axes = figure.subplots()
        left = [0.0] * len(rows)
        for part, colour in _PARTS.items():
            if part == "optimiser":
                sizes = [
                    row["resident_bytes"]["optimiser"] + row["resident_bytes"]["gradients"] for row in rows
                ]
            else:
                sizes = [row["activation_bytes"].get(part, 0) for row in rows]
            mib = [size / 2**20 for size in sizes]
            words = "optimiser and gradients" if part == "optimiser" else f"kept by the {part}"
            axes.barh(range(len(rows)), mib, left=left, color=colour, label=words, height=0.75)
            left = [a + b for a, b in zip(left, mib, strict=True)]
        axes.set_yticks(range(len(rows)), [row["label"] for row in rows], fontsize=8)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
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


def _name(row: Mapping[str, Any]) -> str:
    """The method, and of LION the form too; rows from before it had two are of its residual form."""
    return f"lion, {row['form'] or 'residual'}" if row["method"] == "lion" else row["method"]


def _longer(row: Mapping[str, Any]) -> bool:
    """Whether this is a second length of a method, which the plot of lengths shows."""
    return row["method"] == "vpt" and (row["options"].get("length", 10) > 10 or "depth" in row["options"])


def _title(row: Mapping[str, Any]) -> str:
    return f"{row['setting']}, {row['device_name']}"
