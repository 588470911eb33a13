"""Accuracy against the share of kept entries, by criterion and granularity: lion_fast/studies/pruning.py.

    python bench/pruning_accuracy.py [--keep 0.5 0.2 ...] [--seeds 0 1 2] [--minutes 10] [--out FILE]
    python bench/pruning_accuracy.py --plot docs/images/pruning_accuracy.png

A row per setting goes to the .jsonl beside bench/results/pruning_accuracy.json as soon as it is known; rows
of either are not taken again, so a run that was stopped goes on.
"""

import argparse
import sys
from dataclasses import fields
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT, ROOT / "kernels"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from lion_fast.errors import OptionError  # noqa: E402
from lion_fast.pruning.masks import GRANULARITIES  # noqa: E402
from lion_fast.studies import pruning, runner  # noqa: E402
from lion_fast.studies.rows import Store, read_rows  # noqa: E402

OUT = ROOT / "bench" / "results" / "pruning_accuracy.json"


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0, or 3 where the time was over before the plan."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.2, 0.1, 0.05])
    parser.add_argument("--granularity", nargs="+", default=list(GRANULARITIES))
    parser.add_argument("--criterion", nargs="+", default=["saliency", "magnitude", "random"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    for one in fields(pruning.Settings):
        choices = ("states", "residual") if one.name == "form" else None
        flag = "--" + one.name.replace("_", "-")
        parser.add_argument(flag, type=type(one.default), default=one.default, choices=choices)
    parser.add_argument("--minutes", type=float, default=10.0, help="start no setting after so long [10]")
    parser.add_argument("--out", type=Path, default=OUT, help="its .jsonl is written [%(default)s]")
    parser.add_argument("--plot", type=Path, help="draw the rows that are there and measure nothing")
    options = parser.parse_args(argv)
    if options.plot is not None:
        if not (found := read_rows(options.out)):
            parser.error(f"there are no rows in {options.out}: run without --plot first")
        pruning.draw_curves(found, options.plot)
        return 0
    settings = pruning.Settings(**{one.name: getattr(options, one.name) for one in fields(pruning.Settings)})
    chosen = {name: getattr(options, name) for name in ("keep", "granularity", "criterion", "seeds")}
    with Store(options.out) as store:
        plan = runner.Plan(pruning.plan(settings, **chosen), store)
        print(f"{plan.left()} settings to measure, {plan.held} rows are there", flush=True)
        bench = pruning.Bench(settings) if plan.left() else None

        def measure(item: dict):
            try:
                return bench.measure(item)
            except OptionError as error:
                print(f"{item}: left out: {error}")
                return []

        told = runner.run(
            plan, measure, minutes=options.minutes, say=lambda text: print(text, flush=True), result=_words
        )
    if told.left:
        print(f"{options.minutes:g} minutes are over; run again to go on")
    return 3 if told.left else 0


def _words(row: dict) -> str:
    if not row:
        return "left out"
    return f"{row['test_accuracy']:.4f}, {row['parameters']['kept']:,} kept, {row['seconds']:.0f} s"


if __name__ == "__main__":
    sys.exit(main())
