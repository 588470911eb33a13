"""Measure what methods cost: time, memory, products, parameters.

examples:
  lion-fast bench                                 every method on a ViT-Ti, minutes on a CPU
  lion-fast bench --full --minutes 25             the plan for a GPU, as much as fits; again to go on
  lion-fast bench --plan first --rows-only        a GPU's first minutes; exit code 4: run again to go on
  lion-fast bench --backbones resnet50 --modes infer --batch-sizes 1 16 --out runs/bench-resnet
  lion-fast bench --compare old                   exit code 1 if something got slower or larger

Rows that --out holds already (same versions, device and revision) are not measured again.
"""

import argparse
from contextlib import closing
from pathlib import Path

from lion_fast.commands import common
from lion_fast.errors import DataError, OptionError, check_number, check_whole

DEFAULT_OUT = "runs/bench"
EXIT_LOST = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "--out", default=DEFAULT_OUT, help=f"folder of rows, report and plots [{DEFAULT_OUT}]"
    )
    parser.add_argument(
        "--plan",
        choices=("small", "first", "full"),
        help="small: minutes on a CPU; first: a GPU's first minutes, ViT-B; full: for a GPU, ViT-Ti/S/B/L, "
        "Swin-B, ResNet-50 [small]",
    )
    parser.add_argument(
        "--full", action="store_const", const="full", dest="plan", help="short for --plan full"
    )
    parser.add_argument("--backbones", nargs="+", metavar="NAME", help="a plan of one's own: timm names")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="only these")
    parser.add_argument("--modes", nargs="+", metavar="MODE", help="infer, train [both]")
    parser.add_argument("--batch-sizes", nargs="+", type=int, metavar="N", help="[8]")
    parser.add_argument("--dtypes", nargs="+", metavar="DTYPE", help="fp32, bf16, fp8 [fp32]")
    parser.add_argument("--engines", nargs="+", metavar="ENGINE", help="eager, compile, graphs [eager]")
    parser.add_argument("--memory", nargs="+", metavar="HOW", help="plain, save [plain]")
    parser.add_argument("--img-size", type=int, metavar="PIXELS", help="[what the backbone is made for]")
    parser.add_argument("--lengths", nargs="+", type=int, metavar="P", help="prompts per layer [10]")
    common.add_device(parser)
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="interleaved rounds [7]")
    parser.add_argument("--minutes", type=float, metavar="M", help="begin nothing new after so long")
    parser.add_argument("--again", action="store_true", help="measure also what --out holds already")
    parser.add_argument("--rows-only", action="store_true", help="write rows, no table, report or plots")
    parser.add_argument(
        "--report-only",
        action="store_true",
        help="write table, report and plots of the rows in --out, measure nothing",
    )
    parser.add_argument("--list", action="store_true", help="say what would be measured, and stop")
    parser.add_argument("--compare", metavar="OLD", help="rows to compare with: their folder or file")
    parser.add_argument(
        "--threshold", type=float, default=0.1, metavar="X", help="rise of a time that is a regression [0.1]"
    )
    common.add_progress(parser)


_OWN_PLAN = (
    "backbones", "modes", "batch_sizes", "dtypes", "engines", "memory", "lengths", "methods", "img_size",
)  # fmt: skip


def make_plan(args: argparse.Namespace):
    """The plan that the options ask for."""
    from lion_fast.studies.cost import plan as plans

    own = {name: getattr(args, name) for name in _OWN_PLAN if getattr(args, name) is not None}
    if args.plan and own:
        raise OptionError(
            f"--plan {args.plan} is a plan of its own; leave out {', '.join(map(common.flag, own))}"
        )
    if not own:
        return plans.PLANS[args.plan or "small"]()
    return plans.custom(own.pop("backbones", ["vit_tiny_patch16_224"]), **own)


def run(args: argparse.Namespace) -> dict:
    """Measure, write, compare.

    The dict has "failed" and "regressions", lists that should be empty, and "lost", the contender that lost
    the device, or None.
    """
    from lion_fast.studies.cost import plan as plans
    from lion_fast.studies.cost.report import write
    from lion_fast.studies.cost.run import run as measure
    from lion_fast.studies.rows import Store, of_rows

    check_whole("--rounds", args.rounds)
    check_number("--threshold", args.threshold, least=0)
    if args.minutes is not None:
        check_number("--minutes", args.minutes, least=0)
    if args.rows_only and args.report_only:
        raise OptionError("--rows-only and --report-only exclude each other")
    if args.report_only:
        return _report_only(args)
    device, plan = common.find_device(args.device), make_plan(args)
    if args.list:
        told = plans.describe(plan)
        if not args.json:
            print("\n".join(told))
        return {"plan": told}
    plans.check_device(plan, device)
    old = _rows_of(args.compare) if args.compare else None  # before an hour is spent
    how = {name: getattr(args, name) for name in ("rounds", "minutes", "again")}
    with (
        common.interruptible(f"what was measured is in {args.out}; the same command goes on from there"),
        closing(Store(args.out)) as store,
    ):
        try:
            told = measure(plan, store, device=device, say=common.progress_line(args), **how)
        except KeyboardInterrupt:
            if store.rows and not args.rows_only:
                write(store.rows, args.out)
            raise
        with of_rows(args.out):
            if not args.rows_only:
                write(store.rows, args.out)
            failed = [row for row in store.rows if row["status"] == "failed"]
    result = told | {"out": args.out, "failed": [row["key"] for row in failed], "regressions": []}
    if not args.json:
        left = f", {told['left']} settings left for another time" if told["left"] else ""
        written = store.path if args.rows_only else Path(args.out) / "report.md"
        print(f"{told['measured']} rows measured, {told['held']} held{left}: {written}")
        for row in failed:
            print(f"failed: {row['key']}: {row['reason']}")
    if told["lost"]:
        common.say(
            f"the device failed in {told['lost']} and can do nothing more in this process; rows are written: "
            "run the same command again to go on with the others"
        )
    return result if old is None else result | _compare(args, plan, old, store.rows)


def _compare(args: argparse.Namespace, plan, old: list[dict], rows: list[dict]) -> dict:
    """What got worse than in old rows, of what the plan measures."""
    from lion_fast.studies.cost.compare import compare
    from lion_fast.studies.cost.setting import keys
    from lion_fast.studies.rows import of_rows

    mine = {key for setting, wanted in plan for key in keys(setting, wanted)}
    with of_rows(args.compare):
        both = ([row for row in some if row["key"] in mine] for some in (old, rows))
        worse, remarks = compare(*both, args.threshold)
    if not args.json:
        for line in [*remarks, *(f"regression: {line}" for line in worse)] + ["no regressions"] * (not worse):
            print(line)
    return {"regressions": worse, "remarks": remarks}


def exit_code(result: dict) -> int:
    """4: the device was lost, a new process goes on. 1: something failed or got worse. Else 0."""
    if result.get("lost"):
        return EXIT_LOST
    return 1 if result.get("failed") or result.get("regressions") else 0


def _report_only(args: argparse.Namespace) -> dict:
    from lion_fast.studies.cost.report import write
    from lion_fast.studies.rows import of_rows

    with of_rows(args.out):
        path = write(_rows_of(args.out), args.out)
    if not args.json:
        print(path)
    return {"out": str(args.out), "report": str(path)}


def _rows_of(path: str) -> list[dict]:
    from lion_fast.studies.rows import read_rows

    rows = read_rows(path)
    if not rows:
        raise DataError(f"there are no rows at {path}; measure some with lion-fast bench")
    return rows
