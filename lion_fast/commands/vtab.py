"""`lion-fast vtab`: its options, and the protocol they make."""

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lion_fast.errors import OptionError
from lion_fast.options import numbers

# What the protocol decides, and so neither a grid nor a setting can.
DECIDED = {
    "seed": "--seeds gives them",
    "keep": "the last epoch is kept",
    "early_stop": "all epochs are run",
    "monitor": "the validation accuracy of the last epoch chooses",
}
SEEDS = (42,)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that only this command has."""
    parser.add_argument("--root", required=True, metavar="FOLDER", help="holds one folder per VTAB-1k task")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="[all of the 19 that are there]")
    parser.add_argument("--out", metavar="FOLDER", help="rows, report, plot, adapters [runs/vtab-METHOD]")
    parser.add_argument(
        "--preset",
        choices=("common", "paper"),
        default="common",
        help="common: six configurations for every method; paper: as published, by task where known [common]",
    )
    parser.add_argument(
        "--grid",
        nargs="+",
        action="extend",
        metavar="KEY=V1,V2",
        help="values of method options or training settings to choose among [the preset's]",
    )
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        default=list(SEEDS),
        metavar="N",
        help="of the final runs; tuning has the first [42]",
    )
    parser.add_argument("--resume", action="store_true", default=False, help="go on from the rows in --out")


def parse_grid(given: Sequence[str]) -> dict[str, tuple]:
    """{"lr": (0.001, 0.01)} of lr=1e-3,1e-2; values are YAML, so lists and words can be among them.

    >>> parse_grid(["lr=1e-3,0.01", "pool=[cls],mean"])
    {'lr': (0.001, 0.01), 'pool': (['cls'], 'mean')}
    """
    import yaml

    grid: dict[str, tuple] = {}
    for text in given:
        key, equals, values = text.partition("=")
        key = key.strip().replace("-", "_")
        try:
            found = yaml.safe_load(f"[{values}]") if equals and key else None
        except yaml.YAMLError:
            found = None
        if not found or None in found and not re.search(r"\b(null|none)\b|~", values, re.I):
            raise OptionError(f"--grid takes KEY=V1,V2; got {text!r}")
        if key in grid:
            raise OptionError(f"--grid names {key} twice; give all its values once, as {key}=V1,V2")
        grid[key] = tuple(numbers(found))
    return grid


def make_protocol(args: argparse.Namespace, method: str, options: Mapping[str, Any], train):
    """The `Protocol` of a command line."""
    from lion_fast.studies.vtab.protocol import Protocol

    grid = parse_grid(args.grid) if "grid" in args else None
    return Protocol(method, args.preset, grid, dict(options), dict(train), tuple(args.seeds))


def default_out(method: str) -> Path:
    """Where rows go when nothing is said."""
    return Path("runs") / f"vtab-{method}"
