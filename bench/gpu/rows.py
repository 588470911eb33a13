"""The rows of the GPU run: where they were taken, their file, and when to stop.

A row counts as known to a later run on the same device with the same versions and the same code, wherever
its file lies: in the folder of this run or among the committed results. The code is `CODE`, so committing
rows or documents does not make them unknown. A failed row is known to the run that it failed in, and tried
again by the next.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT), str(ROOT / "kernels")]

from lion_fast.studies.environment import context, git_revision  # noqa: E402
from lion_fast.studies.rows import Store, read_rows  # noqa: E402

RESULTS = ROOT / "bench" / "results"
CODE = ("kernels", "lion_fast", "bench/gpu")
# Begins the name of code that has no history.
DIGEST = "files-"
# The exit status of a process that a CUDA error has left unable to go on, as that of `lion-fast bench`;
# another process may go on.
LOST_DEVICE = 4
# What makes rows comparable; a row of others is another measurement.
SAME = ("device", "dtype", "torch", "cuda", "triton", "revision")
DTYPES = ("bf16", "fp16", "fp32")


def revision() -> str:
    """The last commit that touched `CODE`, with a mark where its files differ from it.

    LION_FAST_REVISION names it for a copy without history; where nothing does it is a digest of the files,
    so that rows of other code are not taken for rows of this one.
    """
    found = git_revision(ROOT, CODE)
    if found["git_code"] is None:
        digest = hashlib.sha256()
        for path in sorted(path for place in CODE for path in (ROOT / place).rglob("*.py")):
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
        return f"{DIGEST}{digest.hexdigest()[:12]}"
    if found["git_changed"] is None:
        return found["git_code"]
    return found["git_code"][:12] + ("-changed" if found["git_changed"] else "")


def environment(device: str, dtype: str) -> dict[str, object]:
    """What every row says about where it was taken."""
    where = context(torch.device(device))
    return {
        "device": where["device_name"] if device == "cuda" else "cpu",
        "dtype": dtype,
        **where["versions"],
        "revision": revision(),
        # Those that one call of the driver starts share it.
        "run": os.environ.get("LION_FAST_RUN") or time.strftime("%Y%m%dT%H%M%SZ", time.gmtime()),
    }


class Rows:
    """A `Store` that is appended to, and the rows known from it and from `earlier` folders."""

    def __init__(self, folder: Path, common: dict[str, object], earlier: tuple[Path, ...] = (RESULTS,)):
        slug = re.sub(r"[^a-z0-9]+", "-", str(common["device"]).lower()).strip("-")
        self.store = Store(folder / f"gpu-{slug}-{common['dtype']}.jsonl")
        self.path, self.common = self.store.path, common
        places = {p.resolve(): p for place in (*earlier, folder) for p in sorted(place.glob("gpu-*.jsonl"))}
        found = [row for path in places.values() for row in read_rows(path)]
        self.rows = [row for row in found if all(row.get(k) == common[k] for k in SAME)]
        self.begun = self.path.with_suffix(".begun")
        if self.begun.exists():
            left = json.loads(self.begun.read_text(encoding="utf-8") or "{}")
            for key in left["keys"] if left.get("run") == common["run"] else ():
                self.add({**key, "failed": "the process died of it"})
            self.begun.unlink()

    def add(self, row: dict) -> None:
        """Keep a row; it is on disk when this returns."""
        row = {**row, **self.common, "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        self.store.add(row)
        self.rows.append(row)

    @contextlib.contextmanager
    def attempt(self, *keys: dict) -> Iterator[None]:
        """Work on rows with these keys. Where the process dies of it, the next one of the run has them as
        failed and leaves them alone; an exception, an interrupt too, is the caller's.
        """
        self.begun.write_text(json.dumps({"run": self.common["run"], "keys": keys}), encoding="utf-8")
        try:
            yield
        finally:
            self.begun.unlink(missing_ok=True)

    def matching(self, **wanted) -> list[dict]:
        """The rows with these values."""
        return [r for r in self.rows if all(r.get(k) == v for k, v in wanted.items())]

    def known(self, **wanted) -> dict | None:
        """The newest row with these values that need not be tried again, or None."""
        run = self.common["run"]
        for row in reversed(self.matching(**wanted)):
            # What could not be captured is tried again as an eager call.
            if "failed" not in row or (row["run"] == run and not row.get("uncaptured")):
                return row
        return None


class Deadline:
    """When to begin nothing more: after `minutes`, or, to rehearse, once `rows` more rows are there."""

    def __init__(self, rows: Rows, minutes: float, new_rows: int | None = None):
        self.rows = rows
        self.end = time.monotonic() + 60 * minutes
        self.most = None if new_rows is None else len(rows.rows) + new_rows
        self.left_out: list[str] = []

    def passed(self, what: str) -> bool:
        """Whether `what` is left out for time; kept in `left_out` then."""
        over = time.monotonic() > self.end or (self.most is not None and len(self.rows.rows) >= self.most)
        if over:
            self.left_out.append(what)
        return over


def arguments(summary: str) -> argparse.ArgumentParser:
    """The options that all stages have."""
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="folder of the rows (default bench/results)"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--minutes", type=float, default=7, help="begin nothing after so long (default 7)")
    parser.add_argument("--rest", action="store_true", help="everything, not only what matters first")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes; never into bench/results")
    parser.add_argument(
        "--new-rows", type=int, help="of a dry run: stop after so many rows, as if time was up"
    )
    return parser


def refuse_no_result(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End with an error where a CPU is to be measured, or a dry run to write among the results."""
    if options.device == "cpu" and not options.dry_run:
        parser.error("a CPU's times are no results; use --dry-run")
    if options.dry_run and RESULTS.resolve() in (options.out.resolve(), *options.out.resolve().parents):
        parser.error("a dry run does not write to bench/results; give another --out")


def begin(
    parser: argparse.ArgumentParser, argv: list[str] | None
) -> tuple[argparse.Namespace, Rows, Deadline]:
    """The options, the rows and the deadline of a stage; refuses what would give no result."""
    options = parser.parse_args(argv)
    refuse_no_result(parser, options)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("this machine's torch sees no CUDA device; `--dry-run --device cpu` tries the program")
    torch.manual_seed(0)
    common = environment(options.device, options.dtype)
    if options.dry_run:
        common["dry_run"] = True
    print(json.dumps(common), flush=True)
    rows = Rows(options.out, common)
    return options, rows, Deadline(rows, options.minutes, options.new_rows)


def end(rows: Rows, deadline: Deadline, wrong: int = 0) -> int:
    """Say what there is, and let others write; the exit status."""
    rows.store.close()
    print(
        f"{len(rows.rows)} rows known, {rows.path.name}; {len(deadline.left_out)} left out for time",
        flush=True,
    )
    return 1 if wrong else 0


def reason(error: BaseException) -> str:
    """An error in a line; a compiler's says in its second what its first announces."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}"[:300]


def leave_if_lost(device: str) -> None:
    """End the process where a CUDA error has made its context useless: all that followed would fail."""
    if device != "cuda":
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        leave(error)


def leave(error: BaseException) -> None:
    """End the process, which can do nothing more on its device."""
    print(f"the device is lost to this process: {reason(error)}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(LOST_DEVICE)  # the interpreter's own end would touch the device again
