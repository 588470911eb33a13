"""A small grid of experiments: one tiny backbone, one set, two methods of two configurations."""

import copy
from pathlib import Path

from lion_fast.studies.grid import Grid, make_grid

ARCHITECTURE = {
    "name": "vit_tiny_patch16_224", "img_size": 32, "depth": 1, "embed_dim": 32, "num_heads": 2,
}  # fmt: skip
TINY = ARCHITECTURE | {"random": True}
SIZES = {"n_val": 9, "n_test": 12}
TRAIN = {"epochs": 1, "batch_size": 8, "device": "cpu"}
PROBE = {"grid": {"train.lr": [1e-3, 1e-1]}}
LION = {"method": "lion", "options": {"state_dim": 8, "reading": "fixed"}, "grid": {"train.lr": [1e-3, 1e-2]}}
LION_CELL = ("tiny", "noise", "lion-8")


def small_grid(source: Path, **changes) -> dict:
    """What a YAML file would hold; every set of `changes` is of `source` unless it says another."""
    given = {
        "name": "small",
        "backbones": {"tiny": TINY},
        "sets": {"noise": SIZES},
        "seeds": [1, 2],
        "tuning_seeds": [0],
        "train": TRAIN,
        "methods": {"probe": PROBE, "lion-8": LION},
        "reference": "probe",
    } | changes
    given["sets"] = {label: {"source": str(source), **more} for label, more in given["sets"].items()}
    return copy.deepcopy(given)


def grid_of(source: Path, **changes) -> Grid:
    return make_grid(small_grid(source, **changes))
