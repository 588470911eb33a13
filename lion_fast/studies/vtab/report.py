"""Rows to numbers and words: accuracy by task, means of the groups, report and plot."""

import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lion_fast.files import write_atomically
from lion_fast.studies import markdown as common
from lion_fast.studies.figures import figure_at
from lion_fast.studies.rows import of_rows, read_rows
from lion_fast.studies.statistics import wilson
from lion_fast.studies.vtab.protocol import LARGEST_GRID
from lion_fast.studies.vtab.tasks import GROUPS, absent, differences
from lion_fast.training.presets import VTAB

REPORT_NAME, PLOT_NAME = "report.md", "accuracy.png"
_COLOURS = {"natural": "#009e73", "specialized": "#0072b2", "structured": "#d55e00"}


def summarize(rows: Sequence[dict]) -> dict[str, Any]:
    """Means of the final rows; JSON-able.

    Keys: `tasks` (by task: `accuracy`, the mean over seeds; `sd` over them, None for one; `seeds`,
    `val_accuracy`, `test_images`, `parameters`, `with_head`, `varied`), `groups` (by group: `accuracy`, the
    mean over its tasks that are there, None without any; `tasks`, how many; `of`), `mean_of_groups` (None
    unless all three are there), `mean` (over all tasks that are there), `n`, `absent`, `diverged` and the
    means `parameters` and `with_head`. Accuracies are shares of 1.
    """
    found: dict[str, dict[str, Any]] = {}
    for task in VTAB:
        own = [row for row in _of(rows, "final", task) if not row["failed"]]
        if not own:
            continue
        values, last = [row["test"]["accuracy"] for row in own], own[-1]
        tuned = [r for r in _of(rows, "tune", task) if r["configuration"] == last["configuration"]]
        found[task] = {
            "accuracy": statistics.fmean(values),
            "sd": statistics.stdev(values) if len(values) > 1 else None,
            "seeds": [row["seed"] for row in own],
            "val_accuracy": tuned[0]["val"]["accuracy"] if tuned else None,
            "test_images": last["test"]["n"],
            "parameters": last["parameters"]["kept"],
            "with_head": last["parameters"]["kept_with_head"],
            "varied": {name.partition(".")[2]: value for name, value in last["configuration"].items()},
        }
    groups = {}
    for group, tasks in GROUPS.items():
        values = [found[task]["accuracy"] for task in tasks if task in found]
        mean = statistics.fmean(values) if values else None
        groups[group] = {"accuracy": mean, "tasks": len(values), "of": len(tasks)}
    means = [group["accuracy"] for group in groups.values()]

    def mean_of(name: str) -> float | None:
        return statistics.fmean(one[name] for one in found.values()) if found else None

    return {
        "tasks": found,
        "groups": groups,
        "mean_of_groups": statistics.fmean(means) if None not in means else None,
        "mean": mean_of("accuracy"),
        "n": len(found),
        "absent": absent(found),
        "diverged": [
            f"{row['set']}, {'tuning' if row['stage'] == 'tune' else 'final run'}, seed {row['seed']}: "
            + (_words(row["configuration"]) or "the only configuration")
            for row in rows
            if row["stage"] != "draw" and row["failed"]
        ],
        "parameters": mean_of("parameters"),
        "with_head": mean_of("with_head"),
    }


def write(folder: str | os.PathLike, *, plot: bool = True) -> dict[str, Any]:
    """Write report.md of the rows in a folder, and accuracy.png where one is of a test; the summary."""
    folder = Path(folder)
    rows = [row for row in read_rows(folder) if row.get("stage") in ("tune", "final")]
    with of_rows(folder):
        summary = summarize(rows)
        text = markdown(rows, summary)
    write_atomically(folder / REPORT_NAME, text)
    if plot and summary["n"]:
        accuracy_by_task(summary, folder / PLOT_NAME, title=_title(rows[0]["protocol"]))
    return summary


def table(summary: dict[str, Any]) -> str:
    """The tasks, the groups and the means as a Markdown table."""
    head = ("task", "test accuracy", "validation", "test images", "trained parameters", "with head", "chosen")
    cells = []
    for group, tasks in GROUPS.items():
        for task in tasks:
            one = summary["tasks"].get(task)
            if one is None:
                cells.append([task, *["-"] * 5, "not run"])
                continue
            spread = "" if one["sd"] is None else f" ± {100 * one['sd']:.2f}"
            counts = (f"{one[name]:,}" for name in ("test_images", "parameters", "with_head"))
            accuracies = (_percent(one["accuracy"]) + spread, _percent(one["val_accuracy"]))
            cells.append([task, *accuracies, *counts, _words(one["varied"])])
        of = summary["groups"][group]
        cells.append([f"**{group}** ({of['tasks']} of {of['of']})", _percent(of["accuracy"]), *[""] * 5])
    counted = ("-" if summary[n] is None else f"{summary[n]:,.0f}" for n in ("parameters", "with_head"))
    cells.append(["**mean of the groups**", _percent(summary["mean_of_groups"]), *[""] * 5])
    name = f"**mean** ({summary['n']} of {len(VTAB)})"
    cells.append([name, _percent(summary["mean"]), "", "", *counted, ""])
    return "\n".join(common.table(head, cells, left=(0, len(head) - 1), pad=True))


def markdown(rows: Sequence[dict], summary: dict[str, Any]) -> str:
    """The report."""
    plan, backbone = rows[0]["protocol"]["protocol"], rows[0]["protocol"]["backbone"]
    tested = _of(rows, "final")
    lines = [
        f"# {_title(rows[0]['protocol'])}",
        "",
        f"Backbone: {backbone['name']} at {backbone['img_size']} px, frozen, weights: "
        f"{backbone['weights_source']}",
        f"(sha256 {backbone['sha256'][:16]}...), precision {backbone['precision']}. Images: resize "
        f"{backbone['resize']}, {backbone['interpolation']},",
        f"mean {backbone['mean']}, std {backbone['std']}.",
        "",
        table(summary),
        "",
    ]
    if summary["n"] < len(VTAB):
        lines += [
            f"**The mean is over {summary['n']} of {len(VTAB)} tasks** and compares with no published mean "
            f"over {len(VTAB)}; a group's mean is over its tasks that are there. Not there: "
            f"{', '.join(summary['absent'])}.",
            "",
        ]
    tried = sorted({len(_of(rows, "tune", row["set"])) or 1 for row in tested})
    lines += [
        "Accuracies in per cent, top-1. Trained parameters count the method alone, and with its linear head;",
        "their mean is over the tasks.",
        "",
        "## Protocol",
        "",
        "Each configuration was trained on 800 images (train800) and judged on 200 (val200) after its",
        "last epoch; the best one by accuracy, then loss, was trained anew on all 1,000 (train800val200) and",
        "its last epoch read the test images once per seed. Test images decided nothing. "
        f"Configurations per task: {' or '.join(map(str, tried)) or '-'}"
        + (" (with one, nothing was chosen)." if 1 in tried else "."),
        "",
        f"- method {plan['method']}, preset {plan['preset']}, fixed options {json.dumps(plan['options'])}, "
        f"fixed settings {json.dumps(plan['train'])}",
        f"- grid: {_grid(plan)}",
        f"- seeds: tuning {plan['tuning_seed']}, final {sorted({row['seed'] for row in tested})}",
    ]
    of_tasks = {row["set"]: row["data"] for row in tested}
    remarks = [
        f"{task}: {what}"
        for task, data in of_tasks.items()
        for what in differences(task, data["classes"], data["sizes"]["train"], data["sizes"]["test"])
    ]
    remarks += [
        f"{task}: {data['skipped']} unreadable images were skipped"
        for task, data in of_tasks.items()
        if data["skipped"]
    ]
    remarks += [f"diverged, and so without a result: {one}" for one in summary["diverged"]]
    remarks += common.sources(rows)
    lines += ["", "## Remarks", "", *(f"- {one}" for one in remarks)]
    if summary["n"]:
        lines += ["", f"![test accuracy by task]({PLOT_NAME})"]
    return "\n".join(lines) + "\n"


def accuracy_by_task(summary: dict[str, Any], path: str | os.PathLike, *, title: str = "") -> None:
    """Test accuracy of each task in the colour of its group, and the groups' means.

    Whiskers: the 95 % interval of that many test images (Wilson) for one seed, else the standard deviation
    over seeds.
    """
    with figure_at(path, (8.0, 1.6 + 0.27 * summary["n"])) as figure:
        axes = figure.subplots()
        names = [task for task in VTAB if task in summary["tasks"]]
        kinds = {summary["tasks"][task]["sd"] is not None for task in names}
        for group, tasks in GROUPS.items():
            places = [names.index(task) for task in tasks if task in names]
            if not places:
                continue
            colour, mean = _COLOURS[group], 100 * summary["groups"][group]["accuracy"]
            label = f"{group}, mean {mean:.1f}"
            for place in places:
                one = summary["tasks"][names[place]]
                low, high = _interval(one)
                axes.barh(place, 100 * one["accuracy"], color=colour, alpha=0.75, label=label)
                axes.plot([100 * low, 100 * high], [place, place], color="0.15", linewidth=1.4)
                axes.text(101.5, place, f"{100 * one['accuracy']:.1f}", va="center", fontsize=8)
                label = None
            axes.plot([mean, mean], [places[0] - 0.45, places[-1] + 0.45], "--", color=colour, linewidth=1.2)
        axes.set_yticks(range(len(names)), names)
        axes.grid(False, axis="y")
        axes.set_xlim(0, 108)
        axes.set_ylim(len(names) - 0.4, -0.6)  # the first task on top
        said = {True: "standard deviation over seeds", False: "95 % interval of one seed's test images"}
        whiskers = " or ".join(said[kind] for kind in sorted(kinds))
        axes.set(xlabel=f"test accuracy in per cent (whiskers: {whiskers})", title=title)
        figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)


def _interval(one: dict[str, Any]) -> tuple[float, float]:
    if one["sd"] is None:
        return wilson(one["accuracy"], one["test_images"])
    return max(0.0, one["accuracy"] - one["sd"]), min(1.0, one["accuracy"] + one["sd"])


def _title(protocol: dict[str, Any]) -> str:
    return f"VTAB-1k: {protocol['protocol']['method']} on {protocol['backbone']['name']}"


def _grid(plan: dict[str, Any]) -> str:
    if plan["grid"] is not None:
        return json.dumps(plan["grid"])
    return (
        "the preset's own where it has at most "
        f"{LARGEST_GRID} configurations, else 1/4, 1 and 4 times its lr with 1/10 and 1 times its "
        "weight decay"
    )


def _of(rows: Sequence[dict], stage: str, task: str | None = None) -> list[dict]:
    return [row for row in rows if row["stage"] == stage and task in (None, row["set"])]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}"


def _words(varied: dict[str, Any]) -> str:
    named = ((name.removeprefix("train.").removeprefix("options."), v) for name, v in varied.items())
    return ", ".join(f"{name} {v:g}" if isinstance(v, float) else f"{name} {v}" for name, v in named)
