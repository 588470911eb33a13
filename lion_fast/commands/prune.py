"""Prune a saved adapter in one shot and save it packed, or compacted.

examples:
  lion-fast prune runs/photos --keep 0.3                       the largest weights of its ends
  lion-fast prune runs/photos --keep 0.5 --granularity unit --compact

One shot, without training. To train while pruning: lion-fast finetune photos/ --prune 0.5
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

from lion_fast.commands.common import add_adapter, add_device, load_run
from lion_fast.options import BLOCKS, GRANULARITIES, SCOPES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is kept, and where to write."""
    add_adapter(parser)
    parser.add_argument("--keep", type=float, required=True, help="share of the entries to keep, in (0, 1]")
    parser.add_argument("--out", metavar="FOLDER", help="where to write [ADAPTER-pruned]")
    parser.add_argument("--granularity", choices=GRANULARITIES, default="element", help="[element]")
    parser.add_argument("--block", type=int, choices=BLOCKS, default=32, help="side of the blocks [32]")
    parser.add_argument(
        "--criterion", choices=("magnitude", "random"), default="magnitude", help="[magnitude]"
    )
    parser.add_argument("--scope", choices=SCOPES, default="global", help="[global]")
    parser.add_argument("--seed", type=int, default=0, help="of --criterion random [0]")
    parser.add_argument("--compact", action="store_true", help="take dead hidden units out for good")
    add_device(parser)


def run(args: argparse.Namespace) -> dict:
    """Prune a saved adapter in one shot; write it beside the settings it was trained with."""
    from lion_fast import pruning
    from lion_fast.adapters import TENSORS
    from lion_fast.data.record import RECORD
    from lion_fast.inspection import parameter_counts

    model, _, folder = load_run(args.adapter, args.device, args.weights)
    how = {name: getattr(args, name) for name in ("criterion", "granularity", "block", "scope", "seed")}
    pruning.prune_once(model, args.keep, **how)
    shares = pruning.kept_shares(model)
    units = pruning.compact_model(model) if args.compact else {}
    given = Path(args.adapter)
    out = Path(args.out) if args.out else given.with_name(given.name + "-pruned")
    model.save_adapter(out / "adapter")
    for name in ("config.yaml", "splits.json", RECORD):
        if (folder.parent / name).is_file():
            shutil.copyfile(folder.parent / name, out / name)
    result: dict[str, Any] = {
        "adapter": str(out / "adapter"),
        "kept_shares": shares,
        "units": {name: {"before": before, "now": now} for name, (before, now) in units.items()},
        "parameters": parameter_counts(model),
        "bytes_before": (folder / TENSORS).stat().st_size,
        "bytes": (out / "adapter" / TENSORS).stat().st_size,
    }
    if not args.json:
        for name, share in shares.items():
            print(f"{name}: {share:.1%} kept")
        for name, (before, now) in units.items():
            print(f"{name}: {now} of {before} hidden units left")
        counts = result["parameters"]
        print("parameters  dense {dense:,}, kept {kept:,}, with head {with_head:,}".format(**counts))
        print(f"adapter: {result['adapter']}, {result['bytes']:,} bytes ({result['bytes_before']:,} before)")
    return result
