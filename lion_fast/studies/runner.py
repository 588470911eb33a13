"""Running an experiment: what is left to do, in which order, by how many processes; rows written at once."""

import itertools
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch

from lion_fast.errors import DataError, LionError, OptionError, check_choice
from lion_fast.studies.grid import STAGES, Grid, Item, same_options
from lion_fast.studies.rows import RowFile
from lion_fast.studies.work import Workshop, draw_key

Only = Mapping[str, Sequence[str]]
# Of several workers' runs; with more, something is wrong with all of them
MOST_BROKEN = 5


class ExperimentError(LionError, RuntimeError):
    """A run that could not be done, with the reason; rows written before are kept."""


@dataclass
class Told:
    """What a call did: runs done, found done, left for another time, and failed (diverged) of those done."""

    done: int = 0
    held: int = 0
    left: int = 0
    failed: int = 0


def run(
    grid: Grid,
    out: str | os.PathLike,
    *,
    workers: int = 1,
    minutes: float | None = None,
    only: Only | None = None,
    stage: str = "all",
    say: Callable[[str], None] = lambda text: None,
) -> Told:
    """Do what is left of the grid's runs and append their rows to `rows.jsonl` in `out`.

    Tuning comes first, the cheap methods before the dear ones; then the final runs, every method with the
    first seed before any with the second, so that a stop leaves an even table. What the grid names as `first`
    goes through both before the rest.

    workers: processes; 1 runs here. On a GPU they share the device. Where a run breaks in one of several,
    the others go on, a new process in its place, until `MOST_BROKEN` runs broke.
    minutes: begin no run after so long. only: {"method" | "set" | "backbone": labels}.
    stage: "tune", "final" (of cells that are tuned) or "all".

    Raises:
        OptionError: A label or a setting that does not exist, a method that does not fit a backbone, or an
            `out` that cannot be written.
        DataError: Images that are others than those of the rows in `out`.
        ExperimentError: Runs ended by something else than divergence, or a worker died.
    """
    check_choice("stage", stage, (*STAGES, "all"))
    if workers < 1:
        raise OptionError(f"workers must be at least 1; got {workers}")
    began = time.monotonic()
    cells = select(grid, only or {})
    home = Workshop(grid)
    with RowFile(out) as file:
        images = check(home, cells)
        plan = _Plan(grid, cells, file, home, stage, images)
        told = Told(held=plan.held())
        say(f"{grid.name}: {plan.count_left()} runs to do, {told.held} are there")

        def late() -> bool:
            return minutes is not None and time.monotonic() - began > 60 * minutes

        def keep(item: Item, row: dict) -> None:
            plan.done(item, row)
            told.done += 1
            told.failed += bool(row["failed"])
            say(f"{told.done} done, {plan.count_left()} left: {item}: {_result(row)}")

        do = _here if workers == 1 else _in_processes
        try:
            do(plan, home, workers, late, keep)
        finally:
            told.left = plan.count_left()
    return told


def select(grid: Grid, only: Only) -> list[tuple[str, str, str]]:
    """The cells (backbone, set, method) that `only` asks for."""
    valid = {"backbone": grid.backbones, "set": grid.sets, "method": grid.methods}
    for name, labels in only.items():
        check_choice("only", name, valid)
        for label in labels:
            check_choice(f"only {name}", label, valid[name])
    wanted = [only.get(name) or list(valid[name]) for name in valid]
    return [cell for cell in grid.cells() if all(x in some for x, some in zip(cell, wanted, strict=True))]


def check(home: Workshop, cells: Iterable[tuple[str, str, str]]) -> dict[str, int]:
    """Load every set and backbone and build every model once, before hours are spent on the others.

    Returns the number of training images of each set; raises what is wrong with a setting.
    """
    grid, images = home.grid, {}
    for backbone, set_label, label in cells:
        if set_label not in images:
            splits = home.splits(set_label, grid.seeds[0])
            for part in ("val", "test"):
                if getattr(splits, part) is None:
                    raise OptionError(f"the set {set_label} has no {part} images; give {part} or n_{part}")
            images[set_label] = len(splits.train)
            home.fingerprint(set_label, grid.seeds[0])  # while the images are at hand
        method = grid.methods[label]
        for index in range(len(method.configurations)):
            options = grid.settings(set_label, label, index)[0]
            try:
                home.resolved(backbone, method.method, options)
            except LionError as error:
                raise OptionError(f"{label} on {backbone}: {error}") from error
    return images


class _Plan:
    """Which runs are there, under way and left, in the order they are given out."""

    def __init__(self, grid: Grid, cells, file: RowFile, home: Workshop, stage: str, images) -> None:
        self.grid, self.file, self.home, self.stage, self.cells = grid, file, home, stage, cells
        self.images = images
        there = {row["key"]: row for row in file.rows}
        self.keys = set(there)
        self.rows: dict[str, dict] = {}  # by run, where weights and defaults are those of now
        self.under_way: set[str] = set()
        self.tunes: dict[str, Item] = {}
        self.drawn: dict[tuple[str, int], str] = {}  # fingerprints of the images, by set and seed
        for set_label, seed in itertools.product(images, {grid.seeds[0], *grid.tuning_seeds[:1]}):
            self.drawn[set_label, seed] = home.fingerprint(set_label, seed)
        for cell in cells:
            self.tunes |= {item.run: item for item in grid.tuning(*cell)}
        for item in grid.everything(cells):
            row = there.get(self.home.key(item))
            if row is not None and grid.is_current(item, row) and self._is_same_model(item, row):
                self._check_images(item, row)
                self.rows[item.run] = row

    def _is_same_model(self, item: Item, row: Mapping) -> bool:
        """Whether what the method makes today of options left to it is what the row was taken with."""
        options, _ = self.grid.settings(item.set, item.label, item.index)
        made = self.home.resolved(item.backbone, self.grid.methods[item.label].method, options)
        return same_options(row["options"], made)

    def _check_images(self, item: Item, row: Mapping) -> None:
        """Refuse to put rows of other images beside each other: they would be compared as if of the same."""
        found = row["data"]["fingerprint"]
        if self.drawn.setdefault((item.set, item.seed), found) != found:
            raise DataError(
                f"the set {item.set} has other images by now than those of the rows in {self.file.path}: "
                "restore them, or choose another --out"
            )

    def _wanted(self) -> tuple[dict[str, Item], int]:
        """The runs of this call that are known, and how many wait for a choice."""
        known = dict(self.tunes) if self.stage != "final" else {}
        waiting = 0
        for cell in self.cells if self.stage != "tune" else ():
            index = self.grid.choose(*cell, self.rows)
            if index is None:
                waiting += len(self.grid.seeds)
            else:
                known |= {item.run: item for item in self.grid.final(*cell, index)}
        return known, waiting

    def _order(self, item: Item) -> tuple:
        first, block = self.grid.first, (item.backbone, item.set)
        place = first.index(block) if block in first else len(first)
        config = self.grid.config(item.set, item.label, item.index, item.seed)
        cheap = self.grid.methods[item.label].method != "probe"
        turn = self.grid.seeds.index(item.seed) if item.stage == "final" else 0
        return place, item.stage == "final", turn, cheap, config.epochs * self.images[item.set]

    def held(self) -> int:
        """Wanted runs that were there already."""
        return sum(run in self.rows for run in self._wanted()[0])

    def count_left(self) -> int:
        """Runs of this call without a row; those that wait for a choice counted."""
        known, waiting = self._wanted()
        return sum(run not in self.rows for run in known) + waiting

    def next(self) -> Item | None:
        """The run to begin now; None where there is none, or none before another ends."""
        known, _ = self._wanted()
        ready = [i for run, i in known.items() if run not in self.rows and run not in self.under_way]
        if not ready:
            return None
        item = min(ready, key=self._order)
        self.under_way.add(item.run)
        return item

    def done(self, item: Item, row: dict) -> None:
        """Write the row, and what its draw of images was where it is the first."""
        self._check_images(item, row)
        draw = draw_key(item.stage, row["data"]["fingerprint"])
        if draw not in self.keys:
            self.file.add(self.home.draw_row(item))
            self.keys.add(draw)
        self.file.add(row)
        self.keys.add(row["key"])
        self.rows[item.run] = row
        self.under_way.discard(item.run)


Late, Keep = Callable[[], bool], Callable[[Item, dict], None]


def _here(plan: _Plan, home: Workshop, workers: int, late: Late, keep: Keep) -> None:
    while not late() and (item := plan.next()) is not None:
        try:
            row = home.run(item)
        except LionError as error:
            raise ExperimentError(f"{item}: {error}") from error
        keep(item, row)


def _in_processes(plan: _Plan, home: Workshop, workers: int, late: Late, keep: Keep) -> None:
    spawn = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
    threads = _threads(workers)
    team: dict[Connection, multiprocessing.process.BaseProcess] = {}
    busy: dict[Connection, Item] = {}
    broken: list[str] = []

    def more() -> Item | None:
        return None if late() or len(broken) >= MOST_BROKEN else plan.next()

    try:
        while True:
            while len(busy) < workers and (item := more()) is not None:
                mine = next((c for c in team if c not in busy), None)
                if mine is None:
                    mine, theirs = spawn.Pipe()
                    process = spawn.Process(target=_serve, args=(theirs, plan.grid, threads), daemon=True)
                    process.start()
                    theirs.close()
                    team[mine] = process
                mine.send(item)
                busy[mine] = item
            if not busy:
                break
            for connection in wait(list(busy)):
                item = busy.pop(connection)
                try:
                    row, fault = connection.recv()
                except EOFError:
                    team[connection].join(10)
                    fault = (
                        f"its process died (exit code {team[connection].exitcode}); out of memory is the "
                        "usual reason: run again with fewer workers. Rows written before are kept"
                    )
                if fault:
                    broken.append(f"{item}: {fault}")
                    # a device that failed fails every later run of the process
                    _end({connection: team.pop(connection)})
                else:
                    keep(item, row)
    finally:
        _end(team)
    if broken:
        more_of_them = f"\n{len(broken) - 1} more runs broke:\n" if len(broken) > 1 else ""
        raise ExperimentError(broken[0] + more_of_them + "\n".join(broken[1:]))


def _end(team: Mapping[Connection, multiprocessing.process.BaseProcess]) -> None:
    for process in team.values():
        process.terminate()
    for connection, process in team.items():
        process.join(5)
        if process.is_alive():  # in a long step, where a request to stop is only noted
            process.kill()
            process.join()
        connection.close()


def _serve(connection: Connection, grid: Grid, threads: int) -> None:
    """A worker: runs come in, (row, None) or (None, what went wrong) goes out; ends with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends workers
    torch.set_num_threads(threads)
    home = Workshop(grid)
    try:
        while True:
            item = connection.recv()
            try:
                answer = (home.run(item), None)
            except LionError as error:
                answer = (None, str(error))
            except Exception:
                answer = (None, traceback.format_exc())
            connection.send(answer)
    except (EOFError, OSError, KeyboardInterrupt):
        pass


def _threads(workers: int) -> int:
    """Threads of each worker: its share of the cores, or what OMP_NUM_THREADS says."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdigit() and int(asked):
        return int(asked)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // workers)


def _result(row: Mapping) -> str:
    if row["failed"]:
        return f"failed: {row['failed']}"
    part = "test" if row["test"] else "val"
    return (
        f"{part} {row['monitor'].replace('_', ' ')} {row[part][row['monitor']]:.4f}, {row['seconds']:.1f} s"
    )


def default_out(grid: Grid) -> Path:
    """Where an experiment goes that names no folder."""
    return Path("runs") / "experiments" / grid.name
