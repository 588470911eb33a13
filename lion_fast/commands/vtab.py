"""`lion-fast vtab`: its options, and the protocol they make."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lion_fast.options import key_lists
from lion_fast.studies.vtab import SEEDS


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


def make_protocol(args: argparse.Namespace, method: str, options: Mapping[str, Any], train):
    """The `Protocol` of a command line."""
    from lion_fast.studies.vtab.protocol import Protocol

    grid = key_lists(args.grid, "--grid") if "grid" in args else None
    return Protocol(method, args.preset, grid, dict(options), dict(train), tuple(args.seeds))


def default_out(method: str) -> Path:
    """Where rows go when nothing is said."""
    return Path("runs") / f"vtab-{method}"
