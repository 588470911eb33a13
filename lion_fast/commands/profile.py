"""`lion-fast profile`: its options, and what it says."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lion_fast.errors import DataError, check_whole

DEFAULT_OUT = "runs/profile"
BATCH_SIZE, NUM_CLASSES = 8, 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that are the command's own."""
    parser.add_argument(
        "model", metavar="MODEL", help="output folder of finetune, adapter folder, or a backbone's name"
    )
    parser.add_argument("--out", default=DEFAULT_OUT, help=f"folder of report and plots [{DEFAULT_OUT}]")
    parser.add_argument("--mode", choices=("train", "infer"), help="only this one [both]")
    parser.add_argument(
        "--batch-size", type=int, default=BATCH_SIZE, metavar="N", help=f"images of a step [{BATCH_SIZE}]"
    )
    parser.add_argument(
        "--images", nargs="+", metavar="IMAGE", help="measure on these images [on random ones]"
    )
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="timed steps of a kind [10]")
    parser.add_argument("--warmup", type=int, default=3, metavar="N", help="steps before them [3]")
    parser.add_argument("--mixed-precision", choices=("no", "bf16", "fp16"), default="no", help="[no]")
    parser.add_argument("--optimizer", choices=("adamw", "sgd"), help="[a run's own, else adamw]")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... [the accelerator that is there, else cpu]")
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, help="[on a terminal]")


def is_run(given: str) -> bool:
    """Whether the MODEL given is a folder, and not a backbone's name; `DataError` for a path to nothing."""
    if Path(given).is_dir():
        return True
    if ("/" in given or "\\" in given) and ":" not in given:
        raise DataError(
            f"there is no folder {given}; give a run of finetune, an adapter, or a backbone's name"
        )
    return False


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot be measured or written before a model is built."""
    check_whole("--batch-size", args.batch_size)
    check_whole("--steps", args.steps)
    check_whole("--warmup", args.warmup, 0)
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise DataError(f"cannot write to {out}: {error.strerror}; give another --out") from error


def run(args: argparse.Namespace, model, images, images_are: str, optimizer: str, say: Callable) -> dict:
    """Measure, write and tell."""
    # torch's profiler says on stderr when it starts, and that there is no GPU
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from lion_fast.studies.profiling import profile_model

    try:
        found = profile_model(
            model,
            images,
            modes=(args.mode,) if "mode" in args else ("train", "infer"),
            steps=args.steps,
            warmup=args.warmup,
            mixed_precision=args.mixed_precision,
            optimizer=optimizer,
            out=args.out,
            images_are=images_are,
            say=say,
        )
    except KeyboardInterrupt as error:
        error.args = ("interrupted",)
        error.hint = f"what was measured is in {args.out}"
        raise
    if not args.json:
        for line in summary(found):
            print(line)
        print(f"report, plots and traces: {args.out}")
    return found | {"out": args.out}


def tell(text: str) -> None:
    """A line that the next one takes the place of."""
    print(f"{text:<60}", end="\r" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)


def summary(found: dict[str, Any]) -> list[str]:
    """A line for each end and each kind of step."""
    lines = [
        f"{name} end: iterations {end['iterations']:.1f} (at most {end['max_iterations']:.0f}), "
        f"residual {end['residual']:.1e}, {end['converged']:.1%} of rows converged, "
        f"certified bound {end['certified']:.4f}"
        for name, end in found["ends"].items()
    ]
    for kind, told in found["modes"].items():
        parts: dict[str, float] = {}
        for inside in told["parts"].values():
            for part, spread in inside.items():
                parts[part] = parts.get(part, 0.0) + spread["share"]
        shares = ", ".join(
            f"{part} {share:.1%}" for part, share in sorted(parts.items(), key=lambda item: -item[1])
        )
        lines.append(f"{kind}: {1e3 * told['seconds']:.2f} ms a step: {shares}")
    return lines
