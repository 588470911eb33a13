"""Real weights, real images, grey and colour: LION, VPT-deep and the linear probe side by side.

examples:
  lion-fast demo                                  real weights, real images, three methods, a few minutes
  lion-fast demo --data photos/                   your own pictures in place of the checkout's furniture
  LION_FAST_OFFLINE=1 lion-fast demo              a second time, from the cache
"""

import argparse
from pathlib import Path

from lion_fast.commands.common import add_progress, interruptible, shows_progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which colour pictures, where to write, and the seed."""
    parser.add_argument(
        "--data",
        help="colour pictures: a folder or a CSV file, 17 or more a class [the checkout's furniture]",
    )
    parser.add_argument("--out", default="runs/demo", help="output folder [runs/demo]")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split and the training [0]")
    add_progress(parser)


def run(args: argparse.Namespace) -> dict:
    """The demonstration."""
    from lion_fast.studies.demo import run

    with interruptible("a demonstration is timed as a whole: run it again, and it begins anew"):
        shown = {"progress": shows_progress(args), "quiet": args.json}
        return run(Path(args.out), seed=args.seed, data=args.data, **shown)
