"""What the rows of an experiment say: cells, estimates and differences, for the report and the plots."""

import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lion_fast.studies.grid import Grid, same_options
from lion_fast.studies.rows import unpack_bits, unpack_integers
from lion_fast.studies.statistics import Estimate, accuracy, mean_over_sets, paired_difference


@dataclass
class Cell:
    """A method on a set and a backbone: the chosen configuration, and the final rows that are there."""

    chosen: int | None
    tried: int
    tuned: int
    tuning_failed: int
    planned: int
    validation: float | None = None
    rows: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    failed: int = 0

    def values(self, metric: str) -> list[float]:
        """The test metric with each seed that is there."""
        return [row["test"][metric] for row in self.rows.values()]

    @property
    def whole(self) -> bool:
        """Whether every planned seed is there."""
        return len(self.rows) == self.planned

    def mark(self) -> str:
        """What is missing, in words; empty where nothing is."""
        if self.whole:
            return ""
        told = f"{len(self.rows)} of {self.planned} seeds"
        return told + (f", {self.failed} failed" if self.failed else "")


class Results:
    """The cells of a grid, from rows; what rows of other experiments say in the same file is left alone."""

    def __init__(self, grid: Grid, rows: Sequence[Mapping[str, Any]]) -> None:
        self.grid = grid
        runs: dict[str, Mapping[str, Any]] = {}
        self.remarks: list[str] = []
        for row in (row for row in rows if row["stage"] != "draw"):
            earlier = runs.get(row["run"])
            if earlier is not None and earlier["key"] != row["key"]:
                self.remarks.append(
                    f"{row['backbone']}: rows with other weights are there too "
                    f"({earlier['backbone_settings']['weights_sha256'][:12]}); the later rows are shown"
                )
            runs.pop(row["run"], None)  # so that they stand in the order in which they were taken
            runs[row["run"]] = row
        for item in grid.everything(grid.cells()):
            if item.run in runs and not grid.is_current(item, runs[item.run]):
                del runs[item.run]
                self.remarks.append(f"{item.label}: rows taken with other defaults are not shown")
        self._keep_latest(
            runs,
            lambda item: (item.backbone,),
            lambda row, latest: _weights(row) == _weights(latest),
            "{0}: rows with other weights than the latest are not shown",
        )
        self._keep_latest(
            runs,
            lambda item: (item.label, item.backbone, str(grid.settings(item.set, item.label, item.index)[0])),
            lambda row, latest: same_options(row["options"], latest["options"]),
            "{0}: rows of what the method once made of an option left to it are not shown",
        )
        self.remarks = list(dict.fromkeys(self.remarks))
        self._seen: set[tuple[str, str]] = set()  # draws of images that tuning saw
        # resampling takes a while, and the report, the plots and the means ask for the same
        self.estimate, self.difference = functools.cache(self.estimate), functools.cache(self.difference)
        self.draws = [row for row in rows if row["stage"] == "draw"]
        self.cells = {cell: self._cell(cell, runs) for cell in grid.cells()}
        self.rows = [row for cell in self.cells.values() for row in cell.rows.values()]

    def _keep_latest(self, runs: dict, group: Callable, same: Callable, told: str) -> None:
        """Take out, with a remark, what is not the same as the latest row of its group."""
        items = {item.run: item for item in self.grid.everything(self.grid.cells()) if item.run in runs}
        latest = {group(items[run]): row for run, row in runs.items() if run in items}
        for run, item in items.items():
            if not same(runs[run], latest[group(item)]):
                del runs[run]
                self.remarks.append(told.format(*group(item)))

    def _cell(self, cell: tuple[str, str, str], runs: Mapping[str, Mapping]) -> Cell:
        grid, (_, set_label, label) = self.grid, cell
        tuning = grid.tuning(*cell)
        there = [runs[item.run] for item in tuning if item.run in runs]
        self._seen |= {(set_label, row["data"]["fingerprint"]) for row in there}
        found = Cell(
            chosen=grid.choose(*cell, runs),
            tried=len(grid.methods[label].configurations),
            tuned=len(there),
            tuning_failed=sum(bool(row["failed"]) for row in there),
            planned=len(grid.seeds),
        )
        if found.chosen is None:
            return found
        monitor = grid.sets[set_label].monitor
        best = [runs[i.run] for i in tuning if i.index == found.chosen]
        if best and not any(row["failed"] for row in best):
            found.validation = statistics.mean(row["val"][monitor] for row in best)
        for item in grid.final(*cell, found.chosen):
            row = runs.get(item.run)
            if row is not None and row["failed"]:
                found.failed += 1
            elif row is not None:
                found.rows[item.seed] = row
        return found

    def estimate(
        self, backbone: str, set_label: str, label: str, metric: str = "accuracy"
    ) -> Estimate | None:
        """The accuracy of a cell with its interval; None without rows."""
        rows = list(self.cells[backbone, set_label, label].rows.values())
        if not rows:
            return None
        correct, labels = [_correct(r) for r in rows], [_labels(r) for r in rows]
        return accuracy(correct, labels, metric=metric, seed=self._stream(set_label))

    def _stream(self, set_label: str) -> int:
        """A stream of resampling for each set: their mean takes them as independent."""
        return list(self.grid.sets).index(set_label)

    def difference(
        self, backbone: str, set_label: str, first: str, second: str, metric: str = "accuracy"
    ) -> tuple[Estimate, int] | None:
        """First minus second over the seeds that both have, and how many those are; None without any."""
        one, two = (self.cells[backbone, set_label, label].rows for label in (first, second))
        seeds = [seed for seed in one if seed in two]
        same = [s for s in seeds if one[s]["data"]["fingerprint"] == two[s]["data"]["fingerprint"]]
        if len(same) < len(seeds):
            self.remarks.append(
                f"{set_label}: {first} and {second} saw other images with some seeds, which are left out "
                "of their difference"
            )
        if not same:
            return None
        return (
            paired_difference(
                [_correct(one[s]) for s in same],
                [_correct(two[s]) for s in same],
                [_labels(one[s]) for s in same],
                metric=metric,
                seed=self._stream(set_label),
            ),
            len(same),
        )

    def mean_estimate(self, backbone: str, label: str, metric: str = "accuracy") -> Estimate | None:
        """The mean over sets of a method's accuracy; None unless every set has a row."""
        found = [self.estimate(backbone, s, label, metric) for s in self.grid.sets]
        return None if None in found else mean_over_sets(found)

    def mean_difference(
        self, backbone: str, first: str, second: str, metric: str = "accuracy"
    ) -> Estimate | None:
        """The mean over sets of the difference; None unless every set has a seed that both have."""
        found = [self.difference(backbone, s, first, second, metric) for s in self.grid.sets]
        return None if None in found else mean_over_sets([estimate for estimate, _ in found])

    def parameters(self, backbone: str, label: str, name: str) -> tuple[int, int] | None:
        """The fewest and the most trained parameters over the sets; None without rows."""
        found = [row["parameters"][name] for row in self._rows_of(backbone, label)]
        return (min(found), max(found)) if found else None

    def seconds(self, backbone: str, label: str) -> float | None:
        """Median seconds of training over all final runs of a method."""
        found = [row["training_seconds"] for row in self._rows_of(backbone, label)]
        return statistics.median(found) if found else None

    def _rows_of(self, backbone: str, label: str) -> list[Mapping[str, Any]]:
        return [row for s in self.grid.sets for row in self.cells[backbone, s, label].rows.values()]

    def shared_images(self, set_label: str) -> tuple[float | None, float | None]:
        """(share of a seed's test images that another seed tests too, share that tuning saw): means over
        the final seeds, None where it is not known."""
        wanted = {
            row["data"]["fingerprint"]
            for (_, s, _), cell in self.cells.items()
            if s == set_label
            for row in cell.rows.values()
        }
        # by fingerprint: what a set was called when they were made is no matter
        final = {
            d["seed"]: unpack_integers(d["images"])
            for d in self.draws
            if d["for"] == "final" and d["description"]["fingerprint"] in wanted
        }
        tuned = [
            unpack_integers(d["images"])
            for d in self.draws
            if d["for"] == "tune" and (set_label, d["description"]["fingerprint"]) in self._seen
        ]

        def shares(images, others):
            return float(np.isin(images, np.concatenate(others)).mean())

        among = [
            shares(images, [o for t, o in final.items() if t != seed])
            for seed, images in final.items()
            if len(final) > 1
        ]
        seen = [shares(images, tuned) for images in final.values() if tuned]
        return (float(np.mean(among)) if among else None, float(np.mean(seen)) if seen else None)


def _weights(row: Mapping[str, Any]) -> str:
    return row["backbone_settings"]["weights_sha256"]


def _correct(row: Mapping[str, Any]) -> np.ndarray:
    return unpack_bits(row["correct"], row["test"]["n"])


def _labels(row: Mapping[str, Any]) -> np.ndarray:
    return unpack_integers(row["labels"])
