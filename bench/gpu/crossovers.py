"""From the rows of the sparse stage: where each storage begins to beat dense, and a plot of it.

    python bench/gpu/crossovers.py bench/results/gpu-*.jsonl [--out FILE] [--plot FILE]

Writes lion_fast/pruning/crossovers.json, which `lion_fast.pruning.choose_storage` reads. Devices that the
rows do not name keep their entries.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT), str(ROOT / "kernels")]

from lion_fast.studies.figures import figure_at, styles_of  # noqa: E402
from lion_fast.studies.rows import read_rows  # noqa: E402

TARGET = ROOT / "lion_fast" / "pruning" / "crossovers.json"
DENSE = "dense fused"
# The contender that stands for each granularity, and its key in the file.
STORAGES = {
    "block": ("block-sparse fused", "block-sparse"),
    "unit": ("compacted", "compact"),
    "element": ("CSR loop", "element"),
    "2:4": ("2:4 form", "2:4"),
}
CASE = ("device", "dtype", "width", "state", "granularity", "block", "sparsity", "mode", "batch", "revision")


def measured(paths: Iterable[Path]) -> list[dict]:
    """The sparse rows of JSON-lines files; dry runs and a CPU's are no measurements and are left out."""
    rows = [row for path in paths for row in read_rows(path)]
    return [r for r in rows if r["kind"] == "sparse" and not r.get("dry_run") and r["device"] != "cpu"]


def compare(rows: Iterable[dict]) -> list[dict]:
    """Each timed storage beside the dense fused solve of its own case, the newest measurement of it.

    A result has the row's keys, `ratio` (dense time / its time) and `pays`: its 80 % quantile is
    below the dense one's 20 % quantile.
    """
    timed = [row for row in rows if "us" in row]
    dense = {tuple(r[k] for k in CASE): r for r in timed if r["contender"] == DENSE}
    newest: dict[tuple, dict] = {}
    for row in sorted(timed, key=lambda r: r["when"]):
        rival = dense.get(tuple(row[k] for k in CASE))
        if rival is None or row["contender"] == DENSE:
            continue
        found = {**row, "ratio": rival["us"] / row["us"], "pays": row["us_80"] < rival["us_20"]}
        newest[(*(row[k] for k in CASE[:-1]), row["contender"])] = found
    return list(newest.values())


def _from(points: list[dict]) -> float | None:
    """The smallest share of zeros of W from which on every measured one pays, or None."""
    least = None
    for point in sorted(points, key=lambda p: p["dead"], reverse=True):
        if not point["pays"]:
            break
        least = point["dead"]
    return least


def find_crossovers(rows: Iterable[dict], dtype: str = "bf16") -> dict:
    """What crossovers.json holds, from rows of one dtype.

    Per device and storage a list of {"state_dim", "width", "block", "from_sparsity",
    "backward_from_sparsity"}, for the forward and the backward pass alone; the second is None where dense
    stayed ahead, and an entry is left out where it stayed ahead in the forward pass. Where one state width
    was measured at several token widths, the worst counts. A sparsity is that of W: blocks, units or entries.
    """
    groups: dict[tuple, dict[str, list[dict]]] = {}
    for found in compare(r for r in rows if r["dtype"] == dtype):
        contender, key = STORAGES[found["granularity"]]
        if found["contender"] == contender:
            place = (found["device"], key, found["state"], found["block"], found["width"])
            groups.setdefault(place, {}).setdefault(found["mode"], []).append(found)
    worst: dict[tuple, dict | None] = {}
    for (device, key, state, block, width), modes in sorted(groups.items(), key=str):
        forward, backward = (_from(modes.get(mode, [])) for mode in ("forward", "backward"))
        entry = {"state_dim": state, "width": width, "block": block, "from_sparsity": forward}
        entry["backward_from_sparsity"] = backward
        place = (device, key, state, block)
        if forward is None:
            worst[place] = None
        elif place not in worst:
            worst[place] = entry
        elif (last := worst[place]) is not None and last["from_sparsity"] < forward:
            worst[place] = entry
    devices: dict[str, dict[str, list[dict]]] = {place[0]: {} for place in groups}
    for (device, key, _, block), entry in sorted(worst.items(), key=lambda i: (*i[0][:3], i[0][3] or 0)):
        found = devices[device].setdefault(key, [])
        if entry is not None:
            found.append({k: v for k, v in entry.items() if k != "block" or block is not None})
    return {"format": 1, "devices": devices}


def write_crossovers(found: dict, path: Path) -> None:
    """Write the file; devices that it names and `found` does not keep their entries."""
    earlier = json.loads(path.read_text())["devices"] if path.exists() else {}
    path.write_text(json.dumps({**found, "devices": {**earlier, **found["devices"]}}, indent=2) + "\n")


def plot(rows: Iterable[dict], path: Path, mode: str = "forward", dtype: str = "bf16") -> int:
    """Times as fast as the dense fused solve against sparsity, a panel per device and width.

    Returns the number of panels; draws nothing and returns 0 where no row can be compared.
    """
    panels: dict[tuple, dict[str, list[dict]]] = {}
    for found in compare(r for r in rows if r["dtype"] == dtype and r["mode"] == mode):
        suffix = f" {found['block']}" if found["block"] else ""
        name = f"{found['granularity']}{suffix}: {found['contender']}"
        panel = (found["device"], found["state"], found["width"])
        panels.setdefault(panel, {}).setdefault(name, []).append(found)
    if not panels:
        return 0
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    styles = {
        name: more for name, *more in styles_of(sorted({n for panel in panels.values() for n in panel}))
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with figure_at(path, (4.6 * columns, 3.6 * lines + 1.2)) as figure:
        grid = figure.subplots(lines, columns, squeeze=False).flatten()
        handles = {}
        for axes, ((device, state, width), forms) in zip(grid, sorted(panels.items()), strict=False):
            for name, points in sorted(forms.items()):
                points = sorted(points, key=lambda p: p["dead"])
                (colour, marker), xs = styles[name], [100 * p["dead"] for p in points]
                ys = [p["ratio"] for p in points]
                (handles[name],) = axes.plot(xs, ys, marker=marker, color=colour, markersize=4)
            axes.axhline(1, color="0.4", linewidth=1, linestyle="--")
            axes.set(title=f"R = {state}, D = {width}\n{device}", xlabel="zeros of W (%)", xlim=(-3, 100))
            axes.set_yscale("log", base=2)
            axes.yaxis.set_major_formatter("{x:g}")
            axes.set_ylabel("dense time / time")
        for axes in grid[len(panels) :]:
            axes.remove()
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=8)
        figure.suptitle(f"Sparse forms against the dense fused solve, {mode}, {dtype}")
    return len(panels)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="crossovers.py", description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path, nargs="+", help="JSON-lines files of bench/gpu/run.py")
    parser.add_argument("--out", type=Path, default=TARGET, help="default: the file that the package ships")
    parser.add_argument("--dtype", default="bf16", help="rows of this dtype (default bf16)")
    parser.add_argument("--plot", type=Path, help="also draw the crossovers into this file")
    options = parser.parse_args(argv)
    rows = measured(options.rows)
    found = find_crossovers(rows, options.dtype)
    if not found["devices"]:
        parser.error(
            f"no sparse storage was timed beside the dense solve in {options.dtype} on a GPU in these rows; "
            "nothing is written. Measure with bench/gpu/run.py"
        )
    write_crossovers(found, options.out)
    print(f"{options.out}: {', '.join(found['devices'])}")
    if options.plot:
        plot(rows, options.plot, dtype=options.dtype)
        print(options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
