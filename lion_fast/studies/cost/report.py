"""Rows to words: report.md, beside it the same rows as a table for a spreadsheet, and the plots."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lion_fast.files import write_atomically
from lion_fast.studies.cost import plots
from lion_fast.studies.markdown import table, where_taken
from lion_fast.studies.rows import write_csv


def write(rows: Sequence[Mapping[str, Any]], folder: str | os.PathLike) -> Path:
    """rows.csv, the plots and report.md of some rows, into `folder`; the path of the report."""
    path = Path(folder) / "report.md"
    write_csv(rows, path.with_name("rows.csv"))
    drawn = plots.draw_all(rows, folder)
    write_atomically(path, markdown(rows, drawn))
    return path


def markdown(rows: Sequence[Mapping[str, Any]], drawn: Sequence[str] = ()) -> str:
    """The report of some rows; `drawn` are the names of plots to show."""
    lines = ["# Measured cost", ""]
    for where, some in _grouped(rows, where_taken):
        lines += [f"Measured on {where}.", ""]
        sources = sorted({(r["backbone"], r["weights_source"], r["weights_sha256"][:12]) for r in some})
        lines += [f"- {name}: weights {source}, sha256 {digest}" for name, source, digest in sources]
        lines += [
            "",
            "Random weights cost what trained ones cost, with one exception: LION's iterations depend on",
            "weights, so its rows say how many there were. Every time is the median over interleaved rounds,",
            "with the 20 % and 80 % quantiles; a ratio is to the floor in the same round. Floors: the bare",
            "frozen backbone (infer), and the frozen backbone with a backward to its input and no optimiser",
            "(train). A ratio below 1 in training: a method without a backward through all of the backbone.",
            "",
        ]
        for setting, inside in _grouped(some, lambda r: r["setting"]):
            lines += [f"## {setting}", "", *table(_HEAD, map(_costs, _good(inside))), ""]
            lines += _apart(inside)
        lines += _across(some)
    for plot in drawn:
        lines += [f"![{plot.rsplit('.', 1)[0].replace('-', ' ')}]({plot})", ""]
    return "\n".join(lines).rstrip() + "\n"


_HEAD = (
    "contender",
    "x floor",
    "20-80 %",
    "images/s",
    "ms per step",
    "GMACs/image",
    "kept MiB: backbone, method, head",
    "peak MiB",
    "trained (with head)",
    "adapter KiB",
    "first step s",
)


def _costs(row: Mapping[str, Any]) -> list[str]:
    kept, count = row.get("activation_bytes"), row.get("macs_per_image")
    return [
        f"`{row['label']}`",
        f"{row['ratio']:.3f}",
        f"{row['ratio_q20']:.3f}-{row['ratio_q80']:.3f}",
        f"{row['images_per_second']:.1f}",
        f"{1e3 * row['seconds']:.2f}",
        "" if count is None else f"{count / 1e9:.3f}",
        "" if not kept else ", ".join(f"{kept[k] / 2**20:.1f}" for k in ("backbone", "method", "head")),
        f"{row['peak_bytes'] / 2**20:.0f}",
        f"{row['parameters']:,} ({row['parameters_with_head']:,})" if "parameters" in row else "",
        f"{row['adapter_bytes'] / 1024:.0f}" if "adapter_bytes" in row else "",
        f"{row['build_seconds'] + row['first_step_seconds']:.2f}",
    ]


def _apart(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What stands below the table of a setting."""
    lines = []
    checked = [f"`{r['label']}` {r['checked']}" for r in rows if r.get("checked", "").find("=") > 0]
    if checked:
        lines += ["Checked before timing: " + "; ".join(checked) + ".", ""]
    iterations = [f"`{r['label']}` {told}" for r in rows if (told := _iterations(r))]
    if iterations:
        lines += ["Mean iterations per token: " + "; ".join(iterations) + ".", ""]
    rounded = [
        f"`{r['label']}` {told['relative']:.2e} ({told['sqnr_db']:.1f} dB), {told['same_class']:.0%}"
        for r in _good(rows)
        if (told := r.get("against_fp32"))
    ]
    if rounded:
        told = "; ".join(rounded)
        lines += [f"Outputs against float32, relative error and share of equal decisions: {told}.", ""]
    for status in ("skipped", "failed"):
        lines += [f"- {status}: `{r['label']}`: {r['reason']}" for r in rows if r["status"] == status]
    return [*lines, ""] if lines and lines[-1] else lines


def _iterations(row: Mapping[str, Any]) -> str:
    told = row.get("diagnostics") or {}
    means = {k: v for k, v in told.items() if k.endswith("_iterations") and not k.endswith("max_iterations")}
    return ", ".join(f"{k.removesuffix('_iterations')} {v:.1f}" for k, v in means.items())


def _across(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the backbone's options change: the same contender with and without."""
    found = []
    by_key = {(r["setting"], r["label"]): r for r in _good(rows)}
    for name, word, plain in (
        ('memory="save"', "/save", ""),
        ("fold=True", "/fold", ""),
        ('precision="fp8"', "/fp8/", "/bf16/"),
    ):
        for (setting, label), row in by_key.items():
            other = by_key.get((setting.replace(word, plain), label))
            if word not in setting or other is None:
                continue
            kept, before = plots.kept_bytes(row), plots.kept_bytes(other)
            times = f"{row['seconds'] / other['seconds']:.3f}"
            more = f"{kept / before:.3f}" if kept and before else ""
            peak = f"{row['peak_bytes'] / max(other['peak_bytes'], 1):.3f}"
            found.append([name, setting, f"`{label}`", times, more, peak])
    if not found:
        return []
    head = ("option", "setting", "contender", "x time", "x kept", "x peak")
    return ["## Options of the backbone", "", *table(head, found, left=(0, 1, 2)), ""]


def _good(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["status"] == "ok"]


def _grouped(rows, key) -> list[tuple[str, list]]:
    found: dict[str, list] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return list(found.items())
