"""What is run: a method, its configurations on each task, seeds; the same for every task and every resume."""

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from math import inf
from typing import Any, ClassVar

from lion_fast.errors import OptionError, refuse_unknown
from lion_fast.methods import available, method_options
from lion_fast.studies.grid import Grid, Item, make_grid, read_seeds
from lion_fast.studies.vtab import DECIDED, SEEDS
from lion_fast.training.config import FREE_ON_RESUME, TrainConfig
from lion_fast.training.presets import TASKS, Preset, preset

# A preset's own grid is searched up to this size; VPT's has 240 configurations.
LARGEST_GRID = 12
# Else these multiples of the preset's own values.
SMALL_GRID = {"lr": (0.25, 1.0, 4.0), "weight_decay": (0.1, 1.0)}


@dataclass(frozen=True)
class TaskGrid(Grid):
    """A method on one task: tuned on its 800 and 200 images, trained on the 1,000, then tested."""

    protocol: Mapping[str, Any] = field(default_factory=dict)
    opens_late: ClassVar[bool] = True

    def named(self, set_label: str) -> dict[str, Any]:
        return {"vtab": set_label}  # wherever its folder is

    def draw(self, stage: str, set_label: str, seed: int) -> dict[str, Any]:
        # test=0: no test image is so much as opened before the choice is made. The seed draws nothing
        return {**self.sets[set_label].data, **({"test": 0} if stage == "tune" else {"val": 0})}

    def about(self, item: Item) -> dict[str, Any]:
        return {"protocol": self.protocol}

    def rank(self, rows: Sequence[Mapping[str, Any]], monitor: str) -> tuple[float, ...]:
        (row,) = rows
        return (-inf,) if row["failed"] else (row["val"]["accuracy"], -row["val"]["loss"])

    def choose(self, backbone: str, set_label: str, label: str, rows: Mapping[str, Mapping]) -> int | None:
        """As of a grid, with the lower loss before the earlier of equals; None where every one failed."""
        index = super().choose(backbone, set_label, label, rows)
        tuned = self.tuning(backbone, set_label, label)
        failed = index is not None and bool(tuned) and all(rows[item.run]["failed"] for item in tuned)
        return None if failed else index


@dataclass(frozen=True)
class Protocol:
    """A method on VTAB-1k.

    Args:
        method: Name of the method.
        preset: "common": one training setting and six configurations of learning rate and weight decay,
            alike for every method. "paper": as published, with values by task where they are known.
        grid: Values by the name of a method option or training setting, all combinations of which are tried;
            None: the preset's grid where that has at most `LARGEST_GRID` configurations, else `SMALL_GRID`
            around the preset's values. Names that `options` or `train` fix are left out of it.
        options: Method options that hold for every configuration, over the preset's.
        train: Training settings likewise.
        seeds: Seeds of the final runs. The first one is also the seed of the tuning runs.

    Raises:
        OptionError: An unknown method, preset or name, a value out of range, a name both fixed and in
            `grid`, or one that the protocol decides.

    >>> grid = Protocol("probe", train={"lr": 0.1}).on("cifar", "vtab-1k/cifar")
    >>> grid.methods["probe"].configurations
    [{'train.weight_decay': 0.0001}, {'train.weight_decay': 0.01}]
    """

    method: str
    preset: str = "common"
    grid: Mapping[str, Sequence] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    seeds: Sequence[int] = SEEDS

    def __post_init__(self) -> None:
        preset(self.method, self.preset)
        known = list(method_options(available()[self.method]))
        settings = [name for name in TrainConfig.__dataclass_fields__ if name not in DECIDED]
        for name in (*(self.grid or {}), *self.train):
            if name in DECIDED:
                raise OptionError(f"VTAB-1k's protocol decides {name}: {DECIDED[name]}")
        refuse_unknown(dict(self.grid or {}), known + settings, f"name in the grid of {self.method}:")
        refuse_unknown(dict(self.options), known, f"option of {self.method}")
        refuse_unknown(dict(self.train), settings, "training option")
        for name, values in (self.grid or {}).items():
            if name in self.options or name in self.train:
                raise OptionError(f"{name} is both fixed and in the grid; give it once")
            if isinstance(values, (str, bytes)) or not isinstance(values, Sequence) or not values:
                raise OptionError(f"the grid needs values for {name}, as {name}=V1,V2; got {values!r}")
            repeated = [v for i, v in enumerate(values) if v in list(values)[:i]]
            if repeated:
                raise OptionError(f"the grid has {name}={repeated[0]} twice")
        read_seeds({"seeds": list(self.seeds)}, "seeds")

    def source(self, task: str) -> Preset:
        """The preset with the values of the task where it has such."""
        by_task = self.preset == "paper" and self.method in TASKS
        return preset(self.method, self.preset, task if by_task else None)

    def on(
        self,
        task: str,
        folder: str | os.PathLike,
        backbone: Mapping[str, Any] | None = None,
        **reading: Any,
    ) -> TaskGrid:
        """The grid of a task: every configuration that is tried, checked, in the order in which it is.

        backbone: what stands for it in rows, with its "name". reading: `check`, `strict` and `duplicates` of
        `load_data`.
        """
        base = self.source(task)
        options = dict(base.options) | dict(self.options)
        train = dict(base.train) | dict(self.train) | {"keep": "last"}
        train.pop("seed", None)  # published seeds were chosen; ours are given
        fixed = {*self.options, *self.train}
        grid = self.grid
        if grid is None:
            grid = {name: values for name, values in base.grid.items() if name not in fixed}
            if not 1 < len(list(itertools.product(*grid.values()))) <= LARGEST_GRID:
                grid = {
                    name: tuple(dict.fromkeys(float(f"{train[name] * m:.6g}") for m in multiples))
                    for name, multiples in SMALL_GRID.items()
                    if name not in fixed
                }
        known = method_options(available()[self.method])
        named = {("options." if k in known else "train.") + k: list(values) for k, values in grid.items()}
        backbone = dict(backbone or {"name": "backbone"})
        made = make_grid(
            {
                "name": f"vtab-{self.method}",
                "backbones": {backbone["name"]: backbone},
                "sets": {task: {"source": str(folder), **reading}},
                "seeds": list(self.seeds),
                "tuning_seeds": list(self.seeds[:1]),
                "methods": {self.method: {"options": options, "train": train, "grid": named or None}},
            }
        )
        given = {f.name: getattr(made, f.name) for f in fields(made) if f.name != "_items"}
        return TaskGrid(**given, protocol={"protocol": self.describe(), "backbone": backbone})

    def describe(self) -> dict[str, Any]:
        """What must agree for two runs to share rows; JSON-able. More seeds or tasks may follow."""
        return {
            "method": self.method,
            "preset": self.preset,
            "grid": None if self.grid is None else {k: list(v) for k, v in self.grid.items()},
            "options": dict(self.options),
            "train": {k: v for k, v in self.train.items() if k not in FREE_ON_RESUME},
            # what nobody gave decides numbers too, and may be another thing in a later version
            "defaults": {
                "options": method_options(available()[self.method]),
                "train": TrainConfig().to_fingerprint(),
            },
            "tuning_seed": self.seeds[0],
        }
