"""What an experiment is: backbones x sets x methods, the configurations of each, seeds; read from YAML."""

import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any, ClassVar

from lion_fast.errors import OptionError, check_choice, refuse_unknown, shown
from lion_fast.methods import available, method_options
from lion_fast.methods.base import check_kinds
from lion_fast.options import read_settings
from lion_fast.training.config import FREE_ON_RESUME, TrainConfig
from lion_fast.training.settings import DataSettings

STAGES = ("tune", "final")
CHOSEN = ("at", "grid", "pooled", "state_dim")
MONITORS = ("accuracy", "balanced_accuracy")
_GRID = [
    "name", "note", "backbones", "sets", "seeds", "tuning_seeds", "train", "methods", "first", "reference",
    "pairs",
]  # fmt: skip
_METHOD = ["method", "options", "train", "grid", "fixed", "fewer", "note"]
_DATA = ["source", "classes", *(name for name in DataSettings.names() if name not in ("data", "data_seed"))]
_TRAIN = [name for name in TrainConfig.names() if name not in ("seed", "monitor")]


@dataclass(frozen=True)
class SetSpec:
    """A data set: arguments of `load_data`, training settings of its own, the metric that chooses."""

    label: str
    data: Mapping[str, Any]
    train: Mapping[str, Any]
    monitor: str = "accuracy"


@dataclass(frozen=True)
class MethodSpec:
    """A method of the table and its configurations, dicts of "train.NAME" and "options.NAME"."""

    label: str
    method: str
    options: Mapping[str, Any]
    train: Mapping[str, Any]
    configurations: Sequence[Mapping[str, Any]]
    fewer: str = ""
    note: str = ""


@dataclass(frozen=True)
class Item:
    """One run: a configuration of a method on a set and a backbone with a seed. `run` identifies it up to
    the backbone's weights."""

    stage: str
    backbone: str
    set: str
    label: str
    index: int
    seed: int
    run: str

    def __str__(self) -> str:
        what = f"{self.label} on {self.set}, {self.backbone}, seed {self.seed}"
        return f"{self.stage} {what}" + (f", configuration {self.index + 1}" if self.stage == "tune" else "")


@dataclass(frozen=True)
class Grid:
    """A checked experiment; see docs/experiments.md for the file it is read from."""

    name: str
    backbones: Mapping[str, Mapping[str, Any]]
    sets: Mapping[str, SetSpec]
    seeds: Sequence[int]
    tuning_seeds: Sequence[int]
    train: Mapping[str, Any]
    methods: Mapping[str, MethodSpec]
    reference: str | None = None
    pairs: Sequence[tuple[str, str]] = field(default_factory=tuple)
    note: str = ""
    first: Sequence[tuple[str, str]] = field(default_factory=tuple)
    _items: dict = field(default_factory=dict, repr=False, compare=False)
    # whether the images of the final runs stay shut until a configuration is chosen
    opens_late: ClassVar[bool] = False

    def settings(self, set_label: str, label: str, index: int) -> tuple[dict, dict]:
        """(options of the method, training settings that are given) of a configuration.

        Later ones win: the grid's `train`, the set's, the method's, the configuration's.
        """
        images, method = self.sets[set_label], self.methods[label]
        options, train = dict(method.options), {"keep": "last", **self.train, **images.train, **method.train}
        for name, value in method.configurations[index].items():
            part, _, key = name.partition(".")
            (options if part == "options" else train)[key] = value
        return options, train | {"monitor": images.monitor}

    def config(self, set_label: str, label: str, index: int, seed: int) -> TrainConfig:
        """The training options of a run."""
        return TrainConfig.from_dict(self.settings(set_label, label, index)[1] | {"seed": seed})

    def item(self, stage: str, backbone: str, set_label: str, label: str, index: int, seed: int) -> Item:
        """The run with these settings; its `run` depends on settings, not on what they are called."""
        named = (stage, backbone, set_label, label, index, seed)
        if named not in self._items:
            options, train = self.settings(set_label, label, index)
            default = TrainConfig().to_dict()
            determines = {
                "stage": stage,
                "backbone": self.backbones[backbone],
                "data": self.named(set_label),
                "method": self.methods[label].method,
                "options": available()[self.methods[label].method].known_before(options),
                "train": {k: v for k, v in train.items() if k not in FREE_ON_RESUME and v != default[k]},
                "seed": seed,
            }
            self._items[named] = Item(*named, digest(determines))
        return self._items[named]

    def named(self, set_label: str) -> dict[str, Any]:
        """What stands for a set's images in a run's hash."""
        return {k: v for k, v in self.sets[set_label].data.items() if k not in ("cache", "duplicates")}

    def draw(self, stage: str, set_label: str, seed: int) -> dict[str, Any]:
        """The arguments of `load_data` for the runs of a stage with a seed."""
        return {**self.sets[set_label].data, "seed": seed}

    def about(self, item: Item) -> dict[str, Any]:
        """What a study of its own adds to the row of a run."""
        return {}

    def cells(self) -> list[tuple[str, str, str]]:
        """Every (backbone, set, method)."""
        return list(itertools.product(self.backbones, self.sets, self.methods))

    def tuning(self, backbone: str, set_label: str, label: str) -> list[Item]:
        """The runs that choose a cell's configuration; none where there is one configuration."""
        count = len(self.methods[label].configurations)
        return [
            self.item("tune", backbone, set_label, label, index, seed)
            for index in range(count if count > 1 else 0)
            for seed in self.tuning_seeds
        ]

    def final(self, backbone: str, set_label: str, label: str, index: int) -> list[Item]:
        """The runs of a cell that read the test images, with its chosen configuration."""
        return [self.item("final", backbone, set_label, label, index, seed) for seed in self.seeds]

    def everything(self, cells: Iterable[tuple[str, str, str]]) -> list[Item]:
        """Every run that could be asked for in these cells, whichever configurations are chosen."""
        found: list[Item] = []
        for cell in cells:
            found += self.tuning(*cell)
            for index in range(len(self.methods[cell[2]].configurations)):
                found += self.final(*cell, index)
        return found

    def is_current(self, item: Item, row: Mapping[str, Any]) -> bool:
        """Whether the row of a run was taken with the defaults of today; `run` knows what is given alone.

        A default that the row does not name counts as the same: options come with a value that changes
        nothing. What a method makes of None is compared where models are at hand.
        """
        options, train = self.settings(item.set, item.label, item.index)
        known = method_options(available()[self.methods[item.label].method])
        left = {k: v for k, v in known.items() if k not in options and v is not None}
        same = all(row["options"].get(k, v) == v for k, v in json.loads(json.dumps(left)).items())
        given = {*train, *FREE_ON_RESUME, "seed"}
        left = {k: v for k, v in TrainConfig().to_dict().items() if k not in given}
        return same and all(row["train"].get(k, v) == v for k, v in left.items())

    def choose(self, backbone: str, set_label: str, label: str, rows: Mapping[str, Mapping]) -> int | None:
        """The configuration best on the validation images, the earlier one of equals; None: not tuned yet.

        rows: by `run`. A configuration that failed with a tuning seed is the worst.
        """
        items = self.tuning(backbone, set_label, label)
        if not items:
            return 0
        if any(item.run not in rows for item in items):
            return None
        found: dict[int, list[Mapping]] = {}
        for item in items:
            found.setdefault(item.index, []).append(rows[item.run])
        ranks = {index: self.rank(some, self.sets[set_label].monitor) for index, some in found.items()}
        return max(ranks, key=lambda index: (ranks[index], -index))

    def rank(self, rows: Sequence[Mapping[str, Any]], monitor: str) -> tuple[float, ...]:
        """By what a configuration's tuning rows compare with another's: their mean, or minus infinity."""
        return (sum(-inf if row.get("failed") else row["val"][monitor] for row in rows) / len(rows),)


def same_options(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two models' options, as recorded, agree where both have a value.

    What `fit` chooses with reading="auto" is another in every run, and is left out.
    """
    chosen = CHOSEN if "auto" in (one.get("reading"), other.get("reading")) else ()
    names = (one.keys() & other.keys()).difference(chosen)
    both = (name for name in names if None not in (one[name], other[name]))
    return all(one[name] == other[name] for name in both)


def digest(value: object) -> str:
    """A short hash of something JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:24]


def read_grid(path: str | os.PathLike) -> Grid:
    """The grid of a YAML file; `OptionError` naming what it should not hold."""
    path = Path(path)
    return make_grid({"name": path.stem} | read_settings(path, "grid"))


def make_grid(given: Mapping[str, Any]) -> Grid:
    """A grid from the mapping a YAML file holds; `OptionError` naming what is wrong."""
    refuse_unknown(given, _GRID, "part of a grid")
    for part in ("backbones", "sets", "methods"):
        if not isinstance(given.get(part), dict) or not given[part]:
            raise OptionError(f"a grid needs {part}: a mapping of labels to settings")
    name = given.get("name", "experiment")
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name):
        raise OptionError(f"name must be letters, digits, '-', '_' or '.'; got {name!r}")
    train = _mapping(given, "train", "train")
    refuse_unknown(train, _TRAIN, "training setting in train")
    methods = {str(k): _method(str(k), v) for k, v in given["methods"].items()}
    grid = Grid(
        name=name,
        backbones={str(k): _backbone(str(k), v) for k, v in given["backbones"].items()},
        sets={str(k): _set(str(k), v) for k, v in given["sets"].items()},
        seeds=read_seeds(given, "seeds", [1, 2, 3, 4, 5]),
        tuning_seeds=read_seeds(given, "tuning_seeds", [0]),
        train=train,
        methods=methods,
        reference=given.get("reference"),
        pairs=_pairs(given.get("pairs") or [], "pairs must be a list of [method, method]"),
        note=str(given.get("note", "")),
        first=_pairs(given.get("first") or [], "first must be a list of [backbone, set]"),
    )
    for backbone, set_label in grid.first:
        check_choice("first: backbone", backbone, grid.backbones)
        check_choice("first: set", set_label, grid.sets)
    for label in [*([grid.reference] if grid.reference else []), *itertools.chain(*grid.pairs)]:
        check_choice("reference and pairs: method", label, methods)
    _check_equal(methods.values())
    for set_label, method in itertools.product(grid.sets, methods.values()):
        for index in range(len(method.configurations)):
            try:
                grid.config(set_label, method.label, index, 0)
                check_kinds(available()[method.method], grid.settings(set_label, method.label, index)[0])
            except OptionError as error:
                raise OptionError(f"{method.label} on {set_label}: {error}") from error
    return grid


def _check_equal(methods: Iterable[MethodSpec]) -> None:
    """Refuse a comparison that searches longer for one method than for another without saying so."""
    methods = list(methods)
    most = max(len(m.configurations) for m in methods)
    uneven = [m for m in methods if len(m.configurations) < most and not m.fewer]
    if uneven:
        told = ", ".join(f"{m.label} {len(m.configurations)}" for m in uneven)
        raise OptionError(
            f"every method must have the same number of configurations, {most} here; fewer have: {told}. "
            "Widen their grid, or give the reason as `fewer: reason`, which the report repeats"
        )


def _backbone(label: str, given: object) -> dict:
    given = _entry(f"backbones.{label}", given)
    if not isinstance(given.get("name"), str):
        raise OptionError(f"backbones.{label} needs a name: what load_backbone takes")
    if given.get("random") and (given.get("pretrained") or given.get("weights")):
        raise OptionError(f"backbones.{label}: random goes with neither pretrained nor weights")
    if not isinstance(given.get("random", False), bool):
        raise OptionError(f"backbones.{label}: random must be true or false; got {given['random']!r}")
    return {k: v for k, v in given.items() if k != "random" or v}


def _set(label: str, given: object) -> SetSpec:
    given = _entry(f"sets.{label}", given)
    refuse_unknown(given, [*_DATA, "monitor", *_TRAIN], f"setting in sets.{label}")
    if not isinstance(given.get("source"), (str, os.PathLike)):
        raise OptionError(f"sets.{label} needs a source: a folder, a CSV file or a built-in set")
    monitor = given.get("monitor", "accuracy")
    check_choice(f"sets.{label}: monitor", monitor, MONITORS)
    data = {k: v for k, v in given.items() if k in _DATA}
    try:
        DataSettings(data["source"], **{k: v for k, v in data.items() if k not in ("source", "classes")})
    except OptionError as error:
        raise OptionError(f"sets.{label}: {error}") from error
    return SetSpec(label, data, {k: v for k, v in given.items() if k in _TRAIN}, monitor)


def _method(label: str, given: object) -> MethodSpec:
    given = _entry(f"methods.{label}", given)
    refuse_unknown(given, _METHOD, f"setting in methods.{label}")
    method = given.get("method", label)
    check_choice(f"methods.{label}: method", method, available())
    options = _mapping(given, "options", f"methods.{label}.options")
    train = _mapping(given, "train", f"methods.{label}.train")
    known = method_options(available()[method])
    refuse_unknown(options, list(known), f"option of {method} in methods.{label}")
    refuse_unknown(train, _TRAIN, f"training setting in methods.{label}")
    if given.get("grid") is not None and given.get("fixed") is not None:
        raise OptionError(f"methods.{label}: give grid or fixed, not both")
    found = _configurations(label, given)
    names = [f"train.{n}" for n in _TRAIN] + [f"options.{n}" for n in known]
    for configuration in found:
        refuse_unknown(configuration, names, f"name in the grid of methods.{label}")
    if len({json.dumps(c, sort_keys=True) for c in found}) < len(found):
        raise OptionError(f"methods.{label}: two configurations of its grid are the same")
    fewer, note = str(given.get("fewer") or ""), str(given.get("note") or "")
    return MethodSpec(label, method, options, train, found, fewer, note)


def _configurations(label: str, given: Mapping[str, Any]) -> list[dict]:
    grid = given.get("grid")
    if grid is None:
        return [_mapping(given, "fixed", f"methods.{label}.fixed")]
    if isinstance(grid, list) and grid and all(isinstance(c, dict) for c in grid):
        return grid
    values_given = isinstance(grid, dict) and grid and all(isinstance(v, list) and v for v in grid.values())
    if not values_given:
        raise OptionError(
            f"methods.{label}.grid must map names to lists of values, or list configurations; got {grid!r}"
        )
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _entry(where: str, given: object) -> dict:
    if not isinstance(given, dict):
        raise OptionError(f"{where} must be a mapping of names to values; got {given!r}")
    return given


def _mapping(given: Mapping[str, Any], name: str, where: str) -> dict:
    return _entry(where, given[name]) if given.get(name) is not None else {}


def read_seeds(given: Mapping[str, Any], name: str, default: Sequence[int] = ()) -> list[int]:
    """The seeds of that name in a mapping; `OptionError` unless they are different and at least 0."""
    seeds = given.get(name, default)
    valid = isinstance(seeds, list) and seeds and len(set(map(repr, seeds))) == len(seeds)
    if not valid or any(type(s) is not int or not 0 <= s < 2**64 for s in seeds):
        raise OptionError(f"{name} must be different whole numbers from 0 to 2^64 - 1; got {shown(seeds)}")
    return seeds


def _pairs(given: object, rule: str) -> tuple[tuple[str, str], ...]:
    if not isinstance(given, list) or any(not isinstance(p, list) or len(p) != 2 for p in given):
        raise OptionError(f"{rule}; got {given!r}")
    return tuple((str(a), str(b)) for a, b in given)
