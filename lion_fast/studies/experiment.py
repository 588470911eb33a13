"""An experiment on accuracy: which runs there are, in which order, and doing what is left of them."""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence

from lion_fast.errors import DataError, LionError, OptionError, check_choice
from lion_fast.studies import runner
from lion_fast.studies.grid import STAGES, Grid, Item, same_options
from lion_fast.studies.rows import Store, of_rows
from lion_fast.studies.work import Workshop, draw_key

Only = Mapping[str, Sequence[str]]


def run(
    grid: Grid,
    out: str | os.PathLike,
    *,
    workers: int = 1,
    minutes: float | None = None,
    only: Only | None = None,
    stage: str = "all",
    home: Workshop | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> runner.Told:
    """Do what is left of the grid's runs and append their rows to `rows.jsonl` in `out`.

    Tuning comes first, the cheap methods before the dear ones; then the final runs, every method with the
    first seed before any with the second, so that a stop leaves an even table. What the grid names as `first`
    goes through both before the rest.

    workers, minutes: see `runner.run`; on a GPU workers share the device.
    only: {"method" | "set" | "backbone": labels}.
    stage: "tune", "final" (of cells that are tuned) or "all".
    home: where the runs are done; None: a `Workshop` that keeps nothing but rows.

    Raises:
        OptionError: A label or a setting that does not exist, a method that does not fit a backbone, or an
            `out` that cannot be written.
        DataError: Images that are others than those of the rows in `out`.
        ExperimentError: Runs ended by something else than divergence, or a worker died.
    """
    check_choice("stage", stage, (*STAGES, "all"))
    cells = select(grid, only or {})
    home = home or Workshop(grid)
    with Store(out) as store:
        plan = Plan(grid, cells, store, home, stage, check(home, cells))
        say(f"{grid.name}: {plan.left()} runs to do, {plan.held} are there")
        return runner.run(plan, home.run, minutes=minutes, workers=workers, say=say, result=_result)


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
    for _, set_label, _ in cells:
        if set_label not in images:
            stage, seed = ("tune", grid.tuning_seeds[0]) if grid.opens_late else ("final", grid.seeds[0])
            splits = home.splits(stage, set_label, seed)
            for part in ("val",) if grid.opens_late else ("val", "test"):
                if getattr(splits, part) is None:
                    raise OptionError(f"the set {set_label} has no {part} images; give {part} or n_{part}")
            images[set_label] = len(splits.train)
            home.fingerprint(stage, set_label, seed)  # while the images are at hand
    check_models(home, cells)
    return images


def check_models(home: Workshop, cells: Iterable[tuple[str, str, str]]) -> None:
    """Build every model once; `OptionError` for an option that a method or backbone cannot take."""
    grid = home.grid
    for backbone, set_label, label in cells:
        method = grid.methods[label]
        for index in range(len(method.configurations)):
            options = grid.settings(set_label, label, index)[0]
            try:
                home.resolved(backbone, method.method, options)
            except LionError as error:
                raise OptionError(f"{label} on {backbone}: {error}") from error


class Plan(runner.Plan[Item]):
    """Which runs are there, under way and left, in the order they are given out."""

    def __init__(self, grid: Grid, cells, store: Store, home: Workshop, stage: str, images) -> None:
        self.grid, self.store, self.home, self.stage, self.cells = grid, store, home, stage, cells
        self.images = images
        self.rows: dict[str, dict] = {}  # by run, where weights and defaults are those of now
        self.under_way: set[str] = set()
        self.tunes: dict[str, Item] = {}
        self.drawn: dict[str, str] = {}  # fingerprints of the images, by what draws them
        for set_label in images:
            self._check_images("tune", set_label, grid.tuning_seeds[0])
            if not grid.opens_late:
                self._check_images("final", set_label, grid.seeds[0])
        for cell in cells:
            self.tunes |= {item.run: item for item in grid.tuning(*cell)}
        with of_rows(store.path):
            for item in grid.everything(cells):
                row = store.get(home.key(item))
                if row is not None and grid.is_current(item, row) and self._is_same_model(item, row):
                    self._check_images(item.stage, item.set, item.seed, row)
                    self.rows[item.run] = row
            self._wanted()
        self.held = sum(run in self.rows for run in self._wanted()[0])

    def _is_same_model(self, item: Item, row: Mapping) -> bool:
        """Whether what the method makes today of options left to it is what the row was taken with."""
        options, _ = self.grid.settings(item.set, item.label, item.index)
        made = self.home.resolved(item.backbone, self.grid.methods[item.label].method, options)
        return same_options(row["options"], made)

    def _check_images(self, stage: str, set_label: str, seed: int, row: Mapping | None = None) -> None:
        """Refuse to put rows of other images beside each other: they would be compared as if of the same."""
        found = row["data"]["fingerprint"] if row else self.home.fingerprint(stage, set_label, seed)
        named = json.dumps(self.grid.draw(stage, set_label, seed), sort_keys=True)
        if self.drawn.setdefault(named, found) != found:
            raise DataError(
                f"the set {set_label} has other images by now than those of the rows in {self.store.path}: "
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

    def left(self) -> int:
        """Runs of this call without a row; those that wait for a choice counted."""
        known, waiting = self._wanted()
        return sum(run not in self.rows for run in known) + waiting

    def next(self) -> tuple[str, Item] | None:
        known, _ = self._wanted()
        ready = [i for run, i in known.items() if run not in self.rows and run not in self.under_way]
        if not ready:
            return None
        item = min(ready, key=self._order)
        if self.grid.opens_late:
            self._check_images(item.stage, item.set, item.seed)
        self.under_way.add(item.run)
        return item.run, item

    def done(self, key: str, item: Item, row: dict) -> None:
        """Keep the row, and what its draw of images was where it is the first."""
        self._check_images(item.stage, item.set, item.seed, row)
        draw = draw_key(item.stage, row["data"]["fingerprint"])
        self.store.add(*([] if draw in self.store else [self.home.draw_row(item)]), row)
        self.home.done(item)
        self.rows[item.run] = row
        self.under_way.discard(item.run)


def _result(row: Mapping) -> str:
    if row["failed"]:
        return f"failed: {row['failed']}"
    part = "test" if row["test"] else "val"
    metric = row["monitor"]
    return f"{part} {metric.replace('_', ' ')} {row[part][metric]:.4f}, {row['seconds']:.1f} s"
