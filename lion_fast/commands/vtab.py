"""The VTAB-1k protocol: tune, choose, train on the 1,000, test, report.

examples:
  lion-fast vtab --root vtab-1k --backbone vit_base_patch16_224.augreg_in21k
  lion-fast vtab --root vtab-1k --method vpt --preset paper --grid lr=0.25,0.625 length=10,50 --seeds 42 43 44
  lion-fast vtab --root vtab-1k --tasks cifar kitti --epochs 50 --out runs/two --resume

Each task: configurations trained on train800 and judged on val200, the best trained on all 1,000 images, the
test images read once. Rows are written run by run; --resume goes on after an interruption, or adds tasks and
seeds. Settings given here hold for every configuration; docs/data.md has the folder layout.
"""

import argparse
from pathlib import Path

from lion_fast.commands.common import add_progress, add_settings, given_settings, processes, shows_progress
from lion_fast.errors import OptionError
from lion_fast.files import output_folder, refuse_overwriting
from lion_fast.options import key_lists
from lion_fast.studies.vtab import DECIDED, SEEDS
from lion_fast.training.config import TrainConfig
from lion_fast.training.settings import DataSettings, ModelSettings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Tasks, configurations, seeds; the settings that hold for every configuration."""
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
    parser.add_argument("--resume", action="store_true", help="go on from the rows in --out")
    add_progress(parser)
    names = set(ModelSettings.names()) - {"preset"}
    add_settings(
        parser.add_argument_group("model"), ModelSettings, names, resize="direct, as the protocol says"
    )
    add_settings(parser.add_argument_group("data"), DataSettings, ("check", "strict", "duplicates"))
    names = set(TrainConfig.names()) - DECIDED.keys()
    add_settings(
        parser.add_argument_group("training, for every configuration"),
        TrainConfig,
        names,
        **dict.fromkeys(names, "the preset's"),
    )


def run(args: argparse.Namespace) -> dict:
    """Run, or go on with, the protocol on the tasks asked for."""
    from lion_fast.studies.vtab import report, runner, tasks
    from lion_fast.studies.vtab.protocol import Protocol

    if processes() > 1:
        raise OptionError("vtab runs in one process; start one for some --tasks each, with an --out each")
    given = {"resize": "direct"} | given_settings(args, ModelSettings)
    model = ModelSettings.from_dict(given)
    grid = key_lists(args.grid, "--grid") if args.grid else None
    train = given_settings(args, TrainConfig)
    protocol = Protocol(model.method, args.preset, grid, model.options, train, tuple(args.seeds))
    folders = tasks.find_tasks(args.root, args.tasks)
    out = Path(args.out or f"runs/vtab-{model.method}")
    refuse_overwriting(out, [args.root])
    backbone = model.load_backbone(protocol.seeds[0])
    with output_folder(out):
        summary = runner.run(
            folders,
            backbone,
            protocol,
            out,
            resume=args.resume,
            progress=shows_progress(args),
            **given_settings(args, DataSettings),
        )
    if not args.json:
        print(report.table(summary))
        print(f"\nreport, rows, plot and adapters: {out}")
    return {"out": str(out)} | summary
