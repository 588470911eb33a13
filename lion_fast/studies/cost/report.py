"""Rows to words: the Markdown report, and what got worse since other rows."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from lion_fast.studies.markdown import table, where_taken

THRESHOLD = 0.1
# Counted, not timed: the same every time
COUNTED_THRESHOLD = 0.01


def markdown(rows: Sequence[Mapping[str, Any]], plots: Sequence[str] = ()) -> str:
    """The report of some rows; `plots` are file names to show."""
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
    for plot in plots:
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
            kept, before = kept_bytes(row), kept_bytes(other)
            times = f"{row['seconds'] / other['seconds']:.3f}"
            more = f"{kept / before:.3f}" if kept and before else ""
            peak = f"{row['peak_bytes'] / max(other['peak_bytes'], 1):.3f}"
            found.append([name, setting, f"`{label}`", times, more, peak])
    if not found:
        return []
    head = ("option", "setting", "contender", "x time", "x kept", "x peak")
    return ["## Options of the backbone", "", *table(head, found, left=(0, 1, 2)), ""]


def kept_bytes(row: Mapping[str, Any]) -> int | None:
    """Bytes that a step keeps for its backward, by whoever; None where they were not counted."""
    kept = row.get("activation_bytes")
    return sum(v for k, v in kept.items() if k != "by_allocator") if kept else None


def _good(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["status"] == "ok"]


def _grouped(rows, key) -> list[tuple[str, list]]:
    found: dict[str, list] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return list(found.items())


def compare(
    old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]], threshold: float = THRESHOLD
) -> tuple[list[str], list[str]]:
    """(regressions, other remarks), a line each, of rows with the same key.

    A time has got worse if its median rose by more than `threshold` and lies above the old 80 % quantile with
    its own 20 % quantile. On the same device and threads the time itself is compared, elsewhere the ratio to
    the floor, floors then left out. What is counted (activations kept, products, parameters, adapter) may
    rise by 1 %. A row that was measured and now fails is a regression.
    """
    before = {row["key"]: row for row in old}
    worse, remarks = [], []
    for row in new:
        was = before.pop(row["key"], None)
        if was is None:
            remarks.append(f"{row['key']}: new")
            continue
        if was["status"] != "ok" or row["status"] != "ok":
            if was["status"] == "ok":
                worse.append(f"{row['key']}: was measured, now {row['status']}: {row['reason']}")
            continue
        same = all(was[k] == row[k] for k in ("device_name", "threads"))
        name = "seconds" if same else "ratio"
        if same or row["method"] != "floor":
            rise = row[name] / was[name] - 1
            apart = row[f"{name}_q20"] > was[f"{name}_q80"]
            told = f"{row['key']}: {name} {was[name]:.4g} -> {row[name]:.4g} ({rise:+.1%})"
            if rise > threshold and apart:
                worse.append(told)
            elif rise < -threshold and row[f"{name}_q80"] < was[f"{name}_q20"]:
                remarks.append(told + ", better")
        for name, a, b in _counted(was, row):
            if a and b > a * (1 + COUNTED_THRESHOLD):
                worse.append(f"{row['key']}: {name} {a:,.0f} -> {b:,.0f} ({b / a - 1:+.1%})")
    remarks += [f"{key}: not in the new rows" for key in before]
    return worse, remarks


def _counted(was: Mapping[str, Any], row: Mapping[str, Any]):
    for name in ("macs_per_image", "parameters", "adapter_bytes"):
        if was.get(name) is not None and row.get(name) is not None:
            yield name, was[name], row[name]
    a, b = (r.get("activation_bytes") or {} for r in (was, row))
    for name in sorted(set(itertools.chain(a, b)) - {"by_allocator"}):
        if name in a and name in b:
            yield f"activations of {name}", a[name], b[name]
