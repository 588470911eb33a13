"""The protocol, run task by task: what has a row is not run again, and every row is written at once."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lion_fast.backbones import Backbone
from lion_fast.errors import DataError, OptionError
from lion_fast.methods.files import describe_images
from lion_fast.studies import experiment
from lion_fast.studies.grid import Item
from lion_fast.studies.rows import Store, of_rows, read_rows
from lion_fast.studies.runner import tell
from lion_fast.studies.vtab import old, report, tasks
from lion_fast.studies.vtab.protocol import Protocol, TaskGrid
from lion_fast.studies.work import Workshop


def run(
    folders: Mapping[str, Path],
    backbone: Backbone,
    protocol: Protocol,
    out: str | os.PathLike,
    *,
    resume: bool = False,
    check: str = "header",
    strict: bool = False,
    duplicates: str = "content",
    progress: bool = False,
) -> dict[str, Any]:
    """Run a protocol on task folders; returns the summary, see `report.summarize`.

    Of each task: every configuration is trained on the 800 images and judged on the 200 at its last epoch;
    the best one (by accuracy, then loss, then order) is trained anew on the 1,000 images with every seed,
    and each of these models reads the test images once. A task with one configuration is not tuned.

    Args:
        folders: Folder of each task, see `tasks.find_tasks`.
        backbone: The frozen backbone; its `resize` should be "direct".
        protocol: Method, configurations and seeds.
        out: Folder of `rows.jsonl` (every run), `report.md`, `accuracy.png`, `adapters/TASK-seedN` and
            `runs/` (the curves of each run).
        resume: Go on from the rows and checkpoints in `out`.
        check: What is checked of every image file, see `load_data`.
        strict: An image that is unreadable, or stands in two parts or classes, is an error.
        duplicates: What is looked for as standing in two, see `load_data`.
        progress: Show progress bars on stderr.

    Raises:
        OptionError: A configuration that the backbone cannot take; rows in `out` that are not resumed, or are
            of another protocol.
        DataError: A list or image that cannot be used, or other images than those of the rows.
        KeyboardInterrupt: Asked to stop; the rows are kept and the run at hand has a checkpoint.
    """
    out = Path(out)
    about = {
        "name": backbone.name,
        "weights_source": backbone.weights_source,
        "sha256": backbone.weights_sha256,
        "precision": backbone.precision,
        **describe_images(backbone),
    }
    there = _rows_there(out, resume)
    reading = {"check": check, "strict": strict, "duplicates": duplicates}
    grids = {task: protocol.on(task, folder, about, **reading) for task, folder in folders.items()}
    if there:
        here = {"protocol": protocol.describe(), "backbone": about}
        with of_rows(out):
            _check_same(out, there[0]["protocol"], json.loads(json.dumps(here)))
    made: dict = {}  # what one task's check built, the next need not
    homes = {task: _workshop(grid, backbone, out, progress, made) for task, grid in grids.items()}
    for home in homes.values():
        experiment.check_models(home, home.grid.cells())
    if before := [row for row in there if "phase" in row]:
        with Store(out) as store, of_rows(out):
            new = (old.modern(row, protocol, about) for row in before)
            store.add(*(row for row in new if row["key"] not in store))
    tell(f"{protocol.method} on {backbone.name}: {len(folders)} of 19 tasks, seeds {list(protocol.seeds)}")
    if missing := tasks.absent(folders):
        tell(f"not run: {', '.join(missing)}")
    try:
        for number, (task, grid) in enumerate(grids.items(), 1):
            place = f"[{number}/{len(grids)}] "
            told = experiment.run(grid, out, home=homes[task], say=lambda text, p=place: tell(p + text))
            if told.left:
                tell(f"{task}: no configuration could be trained; there is no test")
            if told.done:
                _tell_skipped(out, task)
                report.write(out, plot=False)
    except KeyboardInterrupt as error:
        error.args = error.args or ("interrupted",)
        error.hint = f"the rows so far are in {out}; the same command with --resume goes on from there"
        raise
    return report.write(out)


def _rows_there(out: Path, resume: bool) -> list[dict]:
    rows = [row for row in read_rows(out) if row.get("stage") != "draw"]
    if rows and not resume:
        raise OptionError(
            f"{out} holds rows of an earlier command: go on from them (--resume), or choose another output "
            "folder (--out)"
        )
    if not all("protocol" in row for row in rows):
        raise DataError(f"{out} holds rows that are not of VTAB-1k; choose another --out")
    return rows


def _check_same(path: Path, there: Mapping[str, Any], here: Mapping[str, Any], within: str = "") -> None:
    for name in sorted(there.keys() | here.keys(), key=lambda name: (name == "defaults", name)):  # last
        a, b = there.get(name), here.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            _check_same(path, a, b, f"{within}{name}.")
        elif a != b:
            raise OptionError(
                f"{path} holds rows of another protocol: {within}{name} is {json.dumps(a)} there and "
                f"{json.dumps(b)} here. Give what was given then, or another --out"
            )


def _workshop(grid: TaskGrid, backbone: Backbone, out: Path, progress: bool, made: dict) -> Workshop:
    def folder(item: Item) -> Path:
        name = f"tune-{item.index + 1:02d}" if item.stage == "tune" else f"final-seed{item.seed}"
        return out / "runs" / item.set / name

    return Workshop(
        grid,
        {backbone.name: backbone},
        folder=folder,
        adapter=lambda item: out / "adapters" / f"{item.set}-seed{item.seed}",
        progress=progress,
        made=made,
    )


def _tell_skipped(out: Path, task: str) -> None:
    for row in read_rows(out):
        skipped = row["description"]["skipped"] if row.get("for") and row["set"] == task else {}
        if skipped.get("count"):
            named = ", ".join(entry["file"] for entry in skipped["files"][:5])
            tell(f"{task}: {skipped['count']} unreadable images are skipped: {named}")
