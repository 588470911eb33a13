"""What got worse since other rows were taken."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

THRESHOLD = 0.1
# Counted, not timed: the same every time
COUNTED_THRESHOLD = 0.01


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


def _counted(was: Mapping[str, Any], row: Mapping[str, Any]) -> Iterator[tuple[str, float, float]]:
    """What both rows counted: its name, and the two numbers."""
    for name in ("macs_per_image", "parameters", "adapter_bytes"):
        if was.get(name) is not None and row.get(name) is not None:
            yield name, was[name], row[name]
    a, b = (r.get("activation_bytes") or {} for r in (was, row))
    for name in sorted((a.keys() & b.keys()) - {"by_allocator"}):
        yield f"activations of {name}", a[name], b[name]
