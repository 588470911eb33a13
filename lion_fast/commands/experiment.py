"""Compare methods' accuracy, tuned alike, over seeds.

examples:
  lion-fast experiment bench/accuracy/smoke.yaml --out runs/smoke
  lion-fast experiment grid.yaml --workers 8 --minutes 25       exit code 3: run again to go on
  lion-fast experiment grid.yaml --only method=lion,probe set=digits --stage tune
  lion-fast experiment grid.yaml --report-only

Every run's row is written at once; runs whose row is there are not done again.
"""

import argparse
from pathlib import Path

from lion_fast.commands.common import interruptible, say
from lion_fast.errors import OptionError, check_number, check_whole
from lion_fast.files import refuse_overwriting

EXIT_LEFT = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("grid", metavar="GRID.yaml", help="the experiment, see docs/experiments.md")
    parser.add_argument("--out", help="folder of rows, report and plots [runs/experiments/NAME]")
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes that share the device [1]"
    )
    parser.add_argument("--minutes", type=float, metavar="M", help="begin no run after so long")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME=LABEL,...", help="run only this method=, set= or backbone="
    )
    parser.add_argument("--stage", choices=("tune", "final", "all"), default="all", help="[all]")
    parser.add_argument("--rows-only", action="store_true", help="write rows.jsonl, no report or plots")
    parser.add_argument(
        "--report-only", action="store_true", help="write the report of the rows, run nothing"
    )


def run(args: argparse.Namespace) -> dict:
    """Run and report. The dict has "left", the number of runs for another time."""
    from lion_fast.studies import experiment, report, runner
    from lion_fast.studies.grid import read_grid
    from lion_fast.studies.rows import NAME

    if args.rows_only and args.report_only:
        raise OptionError("--rows-only and --report-only exclude each other")
    if args.minutes is not None:
        check_number("--minutes", args.minutes, least=0)
    check_whole("--workers", args.workers)
    grid = read_grid(args.grid)
    out = Path(args.out or f"runs/experiments/{grid.name}")
    refuse_overwriting(out, [args.grid, *(spec.data.get("source") for spec in grid.sets.values())], [NAME])
    only = parse_only(args.only or [])
    told = runner.Told()
    if not args.report_only:
        how = {name: getattr(args, name) for name in ("workers", "minutes", "stage")}
        with interruptible(f"rows are in {out}; the same command goes on from there"):
            told = experiment.run(grid, out, only=only, say=say, **how)
    path = out / NAME if args.rows_only else report.write(grid, out)
    if not args.json:
        left = f", {told.left} left: run again to go on" if told.left else ""
        print(f"{told.done} runs done ({told.failed} failed), {told.held} were there{left}: {path}")
    return {"out": str(out), "report": None if args.rows_only else str(path), **vars(told)}


def exit_code(result: dict) -> int:
    """3 where time ran out before the plan was done, else 0."""
    return EXIT_LEFT if result.get("left") else 0


def parse_only(given: list[str]) -> dict[str, list[str]]:
    """{"method": [labels], ...} of method=a,b set=c."""
    only: dict[str, list[str]] = {}
    for text in given:
        name, equals, labels = text.partition("=")
        if not equals or not labels:
            raise OptionError(f"--only takes method=, set= or backbone= with labels; got {text!r}")
        only.setdefault(name, []).extend(label for label in labels.split(",") if label)
    return only
