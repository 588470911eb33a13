"""`lion-fast bench`: run a plan, write rows, table, report and plots, compare with earlier rows."""

import argparse
import sys
from pathlib import Path

from lion_fast.errors import DataError, OptionError

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
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... [cuda where there is one]")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="interleaved rounds [7]")
    parser.add_argument("--minutes", type=float, metavar="M", help="begin nothing new after so long")
    parser.add_argument(
        "--again", action="store_true", default=False, help="measure also what --out holds already"
    )
    parser.add_argument(
        "--rows-only", action="store_true", default=False, help="write rows, no table, report or plots"
    )
    parser.add_argument(
        "--report-only",
        action="store_true",
        default=False,
        help="write table, report and plots of the rows in --out, measure nothing",
    )
    parser.add_argument(
        "--list", action="store_true", default=False, help="say what would be measured, and stop"
    )
    parser.add_argument("--compare", metavar="OLD", help="rows to compare with: their folder or file")
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.1,
        metavar="X",
        help="rise of a time that is a regression [0.1]",
    )
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, help="[on a terminal]")


_OWN_PLAN = (
    "backbones",
    "modes",
    "batch_sizes",
    "dtypes",
    "engines",
    "memory",
    "lengths",
    "methods",
    "img_size",
)


def make_plan(args: argparse.Namespace):
    """The plan that the options ask for."""
    from lion_fast.studies.cost import plan as plans

    own = {name: getattr(args, name) for name in _OWN_PLAN if getattr(args, name, None) is not None}
    named = getattr(args, "plan", None)
    if named and own:
        given = ", ".join("--" + n.replace("_", "-") for n in own)
        raise OptionError(f"--plan {named} is a plan of its own; leave out {given}")
    if not own:
        return plans.PLANS[named or "small"]()
    return plans.custom(own.pop("backbones", ["vit_tiny_patch16_224"]), **own)


def run(args: argparse.Namespace) -> dict:
    """Measure, write, compare.

    The dict has "failed" and "regressions", lists that should be empty, and "lost", the contender that lost
    the device, or None.
    """
    import torch

    from lion_fast.studies.cost import plan as plans
    from lion_fast.studies.cost.compare import compare
    from lion_fast.studies.cost.report import write
    from lion_fast.studies.cost.run import run as measure
    from lion_fast.studies.cost.setting import keys
    from lion_fast.studies.rows import Store

    if args.rounds < 1:
        raise OptionError(f"--rounds must be at least 1; got {args.rounds}")
    if args.rows_only and args.report_only:
        raise OptionError("--rows-only and --report-only exclude each other")
    if args.report_only:
        return _report_only(args)
    name = getattr(args, "device", None) or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise OptionError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    plan = make_plan(args)
    if args.list:
        for line in plans.describe(plan):
            print(line)
        return {"plan": plans.describe(plan)}
    plans.check_device(plan, device)
    old = _rows_of(args.compare) if getattr(args, "compare", None) else None  # before an hour is spent
    out, store = Path(args.out), Store(args.out)
    shown = getattr(args, "progress", None)
    shown = sys.stderr.isatty() if shown is None else shown
    try:
        told = measure(
            plan,
            store,
            device=device,
            rounds=args.rounds,
            minutes=getattr(args, "minutes", None),
            again=args.again,
            say=_say if shown else lambda text: None,
        )
    except KeyboardInterrupt as error:
        if store.rows and not args.rows_only:
            write(store.rows, out)
        error.args = ("interrupted",)
        error.hint = f"what was measured is in {out}; the same command goes on from there"
        raise
    finally:
        store.close()
    if not args.rows_only:
        write(store.rows, out)
    failed = [row["key"] for row in store.rows if row["status"] == "failed"]
    result = told | {"out": str(out), "failed": failed, "regressions": []}
    if not args.json:
        left = f", {told['left']} settings left for another time" if told["left"] else ""
        written = store.path if args.rows_only else out / "report.md"
        print(f"{told['measured']} rows measured, {told['held']} held{left}: {written}")
        for row in store.rows:
            if row["status"] == "failed":
                print(f"failed: {row['key']}: {row['reason']}")
    if told["lost"]:
        print(
            f"the device failed in {told['lost']} and can do nothing more in this process; rows are written: "
            "run the same command again to go on with the others",
            file=sys.stderr,
        )
    if old is not None:
        mine = {key for setting, wanted in plan for key in keys(setting, wanted)}
        worse, remarks = compare(
            [r for r in old if r["key"] in mine], [r for r in store.rows if r["key"] in mine], args.threshold
        )
        result |= {"regressions": worse, "remarks": remarks}
        if not args.json:
            for line in remarks:
                print(line)
            for line in worse:
                print(f"regression: {line}")
            if not worse:
                print("no regressions")
    return result


def exit_code(result: dict) -> int:
    """4: the device was lost, a new process goes on. 1: something failed or got worse. Else 0."""
    if result.get("lost"):
        return EXIT_LOST
    return 1 if result.get("failed") or result.get("regressions") else 0


def _report_only(args: argparse.Namespace) -> dict:
    from lion_fast.studies.cost.report import write

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


def _say(text: str) -> None:
    end = "\r" if sys.stderr.isatty() else "\n"
    print(f"{text[:118]:<118}", end=end, file=sys.stderr, flush=True)
