"""Writes the measured rows into docs/kernels.md, from committed files only.

python bench/gpu/table.py [--docs docs/kernels.md]
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "bench"), str(ROOT), str(ROOT / "kernels")]

from aot import write_between  # noqa: E402

from lion_fast.studies.markdown import table  # noqa: E402

MARKERS = ("<!-- gpu-table:start -->", "<!-- gpu-table:end -->")
OURS = "lion-fast"
HEAD = (
    "D",
    "R",
    "B",
    "problem",
    "mode",
    "contender",
    "applications",
    "us (20 %, 80 %)",
    "% copy",
    "% matrix",
)
HEAD += ("timed", "eager us", "host us", "peak MB", "saved MB", "times ours")
NOTHING = "No time has been measured yet."


def committed_rows(root: Path, folder: str = "bench/results") -> list[dict]:
    """The rows of every JSON-lines file under `folder` as the last commit holds them, dry runs left out."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=root, check=True, capture_output=True, text=True).stdout

    rows = []
    for name in git("ls-tree", "-r", "--name-only", "HEAD", "--", folder).splitlines():
        if name.endswith(".jsonl"):
            rows += [json.loads(line) for line in git("show", f"HEAD:{name}").splitlines() if line]
    return [row for row in rows if not row.get("dry_run") and row.get("device") != "cpu"]


def checked(rows: list[dict]) -> str:
    """A table of what is right: the largest error of each check, or what failed."""
    newest = {
        (r["device"], r["dtype"], r["revision"], r["what"]): r for r in rows if r.get("kind") == "check"
    }
    if not newest:
        return ""
    lines = []
    for (*where, what), row in newest.items():
        cells = [", ".join(where), what]
        if "errors" in row:
            name = max(row["errors"], key=row["errors"].get)
            wrong = "" if row["right"] else " **wrong**"
            cells += [f"{row['errors'][name]:.1e}{wrong}", name, f"{row['bound']:g}"]
        else:
            cells += [f"failed: {row['failed']}", "", ""]
        lines.append(cells)
    head = ("device, dtype, revision", "check", "largest relative error", "of", "allowed")
    return "\n".join(table(head, lines, left=range(5)))


def _amount(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:.0f}"


def _shape(row: dict) -> tuple:
    return tuple(
        row[k] for k in ("device", "dtype", "revision", "width", "state", "batch", "problem", "mode")
    )


def _cells(row: dict, ours: float | None) -> list[str]:
    return [
        *(str(row[name]) for name in ("width", "state", "batch", "problem", "mode", "contender")),
        f"{row['applications']:.1f}",
        f"{row['us']:.1f} ({row['us_20']:.1f}, {row['us_80']:.1f})",
        f"{row['copy_percent']:.0f}",
        f"{row['matrix_percent']:.0f}",
        row["how"],
        f"{row['eager_us']:.1f}",
        f"{row['host_us']:.1f}",
        _amount(row.get("peak_bytes")),
        _amount(row.get("saved_bytes")),
        f"{row['us'] / ours:.1f}" if ours else "",
    ]


def markdown(rows: list[dict]) -> str:
    """A table per device and revision: one line per contender and shape, beside it ours as a multiple."""
    timed = [row for row in rows if row.get("kind") == "time" and "us" in row]
    right = checked(rows)
    if not timed:
        return "\n\n".join(filter(None, [NOTHING, right]))
    timed = list({(*_shape(row), row["contender"]): row for row in timed}.values())  # the newest of each
    ours = {_shape(row): row["us"] for row in timed if row["contender"] == OURS}
    groups: dict[tuple, list[dict]] = {}
    for row in timed:
        groups.setdefault(tuple(row[k] for k in ("device", "dtype", "revision")), []).append(row)
    parts = [right] if right else []
    for (device, dtype, revision), group in groups.items():
        ceilings = [r for r in rows if r.get("kind") == "ceilings" and r["revision"] == revision]
        ceilings = [r for r in ceilings if r["device"] == device]
        text = (
            f"{device}, {dtype}, revision {revision}, torch {group[0]['torch']}, Triton {group[0]['triton']}."
        )
        if ceilings:
            roof = ceilings[0]
            text += f" Measured: copy {roof['copy'] / 1e12:.2f} TB/s, bf16 {roof['bf16'] / 1e12:.0f} TFLOP/s,"
            text += f" tf32 {roof['tf32'] / 1e12:.0f} TFLOP/s."
        lines = [
            _cells(row, ours.get(_shape(row))) for row in sorted(group, key=lambda r: (_shape(r), r["us"]))
        ]
        parts.append("\n".join([text, "", *table(HEAD, lines, left=range(len(HEAD)))]))
    return "\n\n".join(parts)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="table.py", description=__doc__.splitlines()[0])
    parser.add_argument("--docs", type=Path, default=ROOT / "docs" / "kernels.md")
    options = parser.parse_args(argv)
    write_between(options.docs, MARKERS, markdown(committed_rows(ROOT)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
