"""The rows of an experiment to report.md and its plots."""

import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path

from lion_fast.backbones.weights import caveat_of
from lion_fast.files import make_folder, write_atomically
from lion_fast.studies import plots
from lion_fast.studies.grid import Grid
from lion_fast.studies.markdown import sources, table
from lion_fast.studies.rows import of_rows, read_rows
from lion_fast.studies.statistics import RESAMPLES, Estimate
from lion_fast.studies.tables import Cell, Results

NAME = "report.md"
MISSING = "-"
_METRICS = {"accuracy": "Test accuracy", "balanced_accuracy": "Balanced test accuracy"}


def write(grid: Grid, out: str | os.PathLike) -> Path:
    """Write report.md and the plots of the rows in `out`; the path of the report."""
    out = Path(out)
    make_folder(out)
    path = out / NAME
    with of_rows(out):
        results = Results(grid, read_rows(out))
        text = markdown(results, plots.draw_all(results, out))
    write_atomically(path, text)
    return path


def markdown(results: Results, drawn: Sequence[str] = ()) -> str:
    """The report; `drawn` are the names of plots to show."""
    grid = results.grid
    lines = [f"# Experiment {grid.name}", ""]
    lines += [grid.note, ""] if grid.note else []
    lines += [*_protocol(results), ""]
    for backbone in grid.backbones:
        lines += [f"## {backbone}", "", *_about_backbone(results, backbone), ""]
        for metric, title in _METRICS.items():
            lines += [f"### {title}, %", "", *_accuracies(results, backbone, metric), ""]
        for metric, title in _METRICS.items():
            lines += _differences(results, backbone, metric, title)
        own = [f"{kind}-{plots.slug(backbone)}.png" for kind in ("accuracy", "differences")]
        for plot in (name for name in own if name in drawn):
            lines += [f"![{plot.removesuffix('.png').replace('-', ' ')}]({plot})", ""]
        lines += ["### Chosen configurations", "", *_chosen(results, backbone), ""]
    lines += ["## Settings", "", *_settings(results), ""]
    remarks = dict.fromkeys(results.remarks)
    if remarks:
        lines += ["## Remarks", "", *(f"- {remark}" for remark in remarks), ""]
    return "\n".join(lines).rstrip() + "\n"


def _protocol(results: Results) -> list[str]:
    grid = results.grid
    counts = sorted({len(m.configurations) for m in grid.methods.values()})
    most = counts[-1]
    lines = [
        f"Every configuration was trained with tuning seeds {_list(grid.tuning_seeds)} and judged on the "
        f"validation images alone; the best was trained with seeds {_list(grid.seeds)}, each with its own "
        f"draw of images, initial values and order, and the test images were read once, at the end. "
        f"Configurations of each method and set: {most}"
        + (", but for those named below." if len(counts) > 1 else "."),
        "",
        f"± is the standard deviation over seeds. [low, high] is the 95 % interval of a paired bootstrap "
        f"({RESAMPLES:,} resamples of seeds and, within each, of test images, both methods on the same); "
        "an interval that holds 0 decides nothing. With few seeds such intervals are too narrow where seeds "
        "differ more than the images of one explain, and too wide where they do not. The mean is over these "
        "sets, as they are. No correction is made for the number of comparisons.",
    ]
    lines += [
        f"- {m.label}: {len(m.configurations)} configuration{'s' * (len(m.configurations) > 1)}: {m.fewer}"
        for m in grid.methods.values()
        if len(m.configurations) < most
    ]
    lines += [f"- {m.label}: {m.note}" for m in grid.methods.values() if m.note]
    for label in grid.sets:
        among, seen = results.shared_images(label)
        if among:
            lines.append(
                f"- {label}: {among:.0%} of a seed's test images are also tested with another seed. They are "
                "resampled within each seed, as if they were others: its intervals are a little too narrow."
            )
        if seen:
            lines.append(
                f"- {label}: {seen:.0%} of the test images were among the training or validation images of "
                "the tuning seeds (the source has no test split of its own); every method had the same ones."
            )
    return lines


def _about_backbone(results: Results, backbone: str) -> list[str]:
    rows = [row for (b, _, _), cell in results.cells.items() if b == backbone for row in cell.rows.values()]
    if not rows:
        return ["No final runs yet."]
    lines = []
    for about in {json.dumps(row["backbone_settings"]): row["backbone_settings"] for row in rows}.values():
        lines.append(
            f"{about['name']} at {about['img_size']} px, frozen, weights: {about['weights_source']} "
            f"(sha256 {about['weights_sha256'][:12]})."
        )
        if caveat := caveat_of(about["weights_source"]):
            lines.append(f"Mind: {caveat}.")
    places = {(row["device_name"], row["threads"]) for row in rows}
    lines.append(
        "Training seconds: median over the final runs of all sets, validation and test left out"
        + (", from several machines." if len(places) > 1 else ".")
    )
    return lines


def _accuracies(results: Results, backbone: str, metric: str) -> list[str]:
    grid = results.grid
    head = ["method", *grid.sets, "mean of sets"]
    if metric == "accuracy":
        head += ["trained parameters", "with head", "training s"]
    rows = []
    for label in grid.methods:
        cells = [results.cells[backbone, s, label] for s in grid.sets]
        row = [label, *(_cell(cell, metric) for cell in cells), _mean(cells, metric)]
        if metric == "accuracy":
            seconds = results.seconds(backbone, label)
            row += [_range(results.parameters(backbone, label, n) or ()) for n in ("kept", "kept_with_head")]
            row.append(MISSING if seconds is None else f"{seconds:,.1f}")
        rows.append(row)
    return table(head, rows)


def _cell(cell: Cell, metric: str) -> str:
    values = cell.values(metric)
    mark = f" ({cell.mark()})" if cell.mark() else ""
    if not values:
        return MISSING + (mark if cell.failed else "")
    spread = f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.2f}{spread}{mark}"


def _mean(cells: Sequence[Cell], metric: str) -> str:
    if not all(cell.rows for cell in cells):
        return MISSING
    mean = statistics.mean(statistics.mean(cell.values(metric)) for cell in cells)
    return f"{100 * mean:.2f}" + ("" if all(cell.whole for cell in cells) else " (seeds missing)")


def _differences(results: Results, backbone: str, metric: str, title: str) -> list[str]:
    grid = results.grid
    lines: list[str] = []
    head = ["", *grid.sets, "mean of sets"]

    def row(name: str, first: str, second: str) -> list[str]:
        cells = [
            _difference(results.difference(backbone, s, first, second, metric), len(grid.seeds))
            for s in grid.sets
        ]
        return [name, *cells, _interval(results.mean_difference(backbone, first, second, metric))]

    if grid.reference:
        others = [label for label in grid.methods if label != grid.reference]
        lines += [f"### {title}: difference from {grid.reference}, percentage points", ""]
        lines += [*table(head, [row(label, label, grid.reference) for label in others]), ""]
    if grid.pairs:
        lines += [f"### {title}: further differences, percentage points", ""]
        lines += [*table(head, [row(f"{a} - {b}", a, b) for a, b in grid.pairs]), ""]
    return lines


def _difference(found: tuple[Estimate, int] | None, planned: int) -> str:
    if found is None:
        return MISSING
    estimate, seeds = found
    return _interval(estimate) + (f" ({seeds} of {planned} seeds)" if seeds < planned else "")


def _interval(estimate: Estimate | None) -> str:
    if estimate is None:
        return MISSING
    return f"{100 * estimate.point:+.2f} [{100 * estimate.low:+.2f}, {100 * estimate.high:+.2f}]"


def _chosen(results: Results, backbone: str) -> list[str]:
    grid = results.grid
    rows = []
    for set_label, images in grid.sets.items():
        for label, method in grid.methods.items():
            cell = results.cells[backbone, set_label, label]
            if cell.chosen is None:
                wanted = len(grid.tuning(backbone, set_label, label))
                chosen = f"tuning under way, {cell.tuned} of {wanted} runs"
            else:
                found = method.configurations[cell.chosen]
                chosen = ", ".join(f"{k} = {_value(v)}" for k, v in found.items()) or "as given"
            failed = f" ({cell.tuning_failed} runs failed)" if cell.tuning_failed else ""
            validation = MISSING if cell.validation is None else f"{100 * cell.validation:.2f}"
            name = images.monitor.replace("_", " ")
            rows.append([set_label, label, chosen, f"{cell.tried}{failed}", f"{validation} ({name})"])
    return table(["set", "method", "chosen", "configurations", "validation, %"], rows, left=(0, 1, 2))


def _settings(results: Results) -> list[str]:
    grid = results.grid
    lines = [f"- All: {json.dumps(grid.train)}"]
    for label, images in grid.sets.items():
        cells = [cell for (_, s, _), cell in results.cells.items() if s == label]
        sizes = [row["data"]["sizes"] for cell in cells for row in cell.rows.values()]
        told = ""
        if sizes:
            told = ", ".join(f"{_range([s[part] for s in sizes])} {part}" for part in sizes[0])
            told = f"; images: {told}"
        own = f"; {json.dumps(dict(images.train))}" if images.train else ""
        lines.append(f"- {label}: {json.dumps(dict(images.data))}{own}{told}")
    for label, method in grid.methods.items():
        own = {"options": dict(method.options), "train": dict(method.train)}
        lines.append(f"- {label}: {method.method}, {json.dumps({k: v for k, v in own.items() if v})}")
    return lines + [f"- {taken}" for taken in sources(results.rows)]


def _range(values: Sequence[int]) -> str:
    if not values:
        return MISSING
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _value(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)


def _list(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))
