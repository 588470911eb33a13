"""Classify images and write CSV: path, class, probability.

examples:
  lion-fast predict runs/photos holiday/ > classes.csv
  lion-fast predict runs/photos a.jpg b.jpg --top-k 3 --out classes.csv
"""

import argparse
import csv
import io
import sys
from pathlib import Path

from lion_fast.commands.common import (
    NAMES,
    add_adapter,
    add_running,
    find_images,
    find_record,
    load_run,
    running,
    say,
    tell_trained,
)
from lion_fast.errors import DataError, check_whole
from lion_fast.files import refuse_overwriting


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is classified, and where to write."""
    add_adapter(parser)
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE", help="image files and folders (searched in depth)"
    )
    parser.add_argument("--out", default="-", metavar="FILE.csv", help="where to write; - is stdout [-]")
    parser.add_argument("--top-k", type=int, default=1, metavar="K", help="classes per image [1]")
    parser.add_argument(
        "--strict", action="store_true", help="an unreadable image is an error and not skipped"
    )
    add_running(parser)


def run(args: argparse.Namespace) -> dict:
    """Classify images; unreadable ones are skipped, counted and named."""
    from lion_fast.training import predict_files

    check_whole("--top-k", args.top_k)
    model, settings, folder = load_run(args.adapter, args.device, args.weights)
    paths = find_images(args.images)
    if args.out != "-":
        refuse_overwriting(args.out, [*paths, args.weights, *folder.iterdir()])
    trained = tell_trained(find_record(folder.parent), settings, args.images, [str(path) for path in paths])
    read, probabilities, failed = predict_files(model, paths, strict=args.strict, **running(args))
    classes = model.classes or [str(i) for i in range(model.num_classes)]
    k = min(args.top_k, len(classes))
    suffixes = [""] + [f"_{i}" for i in range(2, k + 1)]
    rows = []
    if read:
        values, places = probabilities.topk(k, dim=1)
        for path, row, where in zip(read, values.tolist(), places.tolist(), strict=True):
            rows.append({"path": str(path)})
            for suffix, value, place in zip(suffixes, row, where, strict=True):
                rows[-1] |= {f"class{suffix}": classes[place], f"probability{suffix}": round(value, 6)}
    if args.out != "-" or not args.json:
        names = ["path", *(name + suffix for suffix in suffixes for name in ("class", "probability"))]
        _write_csv(args.out, names, rows)
    if failed:
        say(f"{len(failed)} of {len(paths)} images could not be read and were skipped:")
        for path, reason in failed:
            say(f"  {reason}" if str(path) in reason else f"  {path}: {reason}")
    if paths and not read:
        raise DataError("none of the images could be read")
    return {
        "adapter": str(folder),
        "images": len(paths),
        "training_images": trained,
        "skipped": [{"path": str(path), "reason": reason} for path, reason in failed],
        "predictions": rows,
    }


def _write_csv(out: str, names: list[str], rows: list[dict]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    if out == "-":
        sys.stdout.write(text.getvalue())
        return
    try:
        Path(out).write_text(text.getvalue(), encoding="utf-8", errors=NAMES, newline="")
    except OSError as error:
        raise DataError(f"cannot write {out}: {error.strerror}; give another --out") from error
