"""Prune a saved adapter in one shot and save it packed, or compacted.

examples:
  lion-fast prune runs/photos --keep 0.3                       the largest weights of its ends
  lion-fast prune runs/photos --keep 0.5 --granularity unit --compact

One shot, without training. To train while pruning: lion-fast finetune photos/ --prune 0.5
"""

import argparse
from pathlib import Path
from typing import Any

from lion_fast.commands.common import adapter_folder, add_adapter, add_device, load_run
from lion_fast.errors import OptionError
from lion_fast.files import output_folder, refuse_overwriting, write_atomically
from lion_fast.options import BLOCKS, GRANULARITIES, RECORD, SCOPES

# Files of a run that its pruned adapter keeps
SETTINGS = ("config.yaml", "splits.json", RECORD)


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
    given = Path(args.adapter)
    folder = adapter_folder(args.adapter)
    named = given if given.name not in ("", "..") else given.resolve()
    if args.out is None and not named.name:
        raise OptionError(f"{args.adapter} has no name to make another of: give --out")
    out = Path(args.out) if args.out else named.with_name(named.name + "-pruned")
    reads = [folder, args.weights, *(folder.parent / name for name in SETTINGS)]
    refuse_overwriting(out, reads, ("adapter", *SETTINGS))
    if (out / "checkpoints").exists():
        raise OptionError(f"{out} holds a run of its own; choose another --out")
    with output_folder(out):
        return _prune(args, folder, out)


def _prune(args: argparse.Namespace, folder: Path, out: Path) -> dict:
    from lion_fast import pruning
    from lion_fast.adapters import TENSORS
    from lion_fast.equilibrium.layer import LionLayer
    from lion_fast.inspection import parameter_counts

    model, _, folder = load_run(args.adapter, args.device, args.weights)
    if args.compact and not any(isinstance(module, LionLayer) for module in model.modules()):
        raise OptionError(
            "--compact takes dead hidden units out of a LionLayer, and this model has none (of lion's "
            "form=states every state is an output): leave it out, what is pruned is saved packed"
        )
    how = {name: getattr(args, name) for name in ("criterion", "granularity", "block", "scope", "seed")}
    pruning.prune_once(model, args.keep, **how)
    shares = pruning.kept_shares(model)
    units = pruning.compact_model(model) if args.compact else {}
    model.save_adapter(out / "adapter")
    for name in SETTINGS:
        if (folder.parent / name).is_file():
            write_atomically(out / name, (folder.parent / name).read_bytes())
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
