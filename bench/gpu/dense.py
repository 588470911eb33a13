"""Times and memory of the dense solve and its gradient beside what torch and others make of it.

    PYTHONPATH=.:kernels python3 bench/gpu/dense.py --out DIR [--rest] [--minutes 2] [--compile-only]

First the device's ceilings: bytes a second of a copy, operations a second of matrix products. Then, shape by
shape, the most important first, every contender in the modes forward, backward and both. Rows are of the
kinds "ceilings" and "time". `--compile-only` fills the cache of torch's compiler for the shapes that its
contenders run on, and times nothing.
"""

import dataclasses
import functools
import gc
import sys

import contenders
import measure
import problems
import rows as stage
import timing
import torch

# Beside ours in the first minutes: its algebra in plain torch, compiled, and the formula with a stop test.
FIRST = ("lion-fast", "torch R-space, half", "torch R-space, compiled", "reference free")


def passes(rest: bool, dry: bool) -> list[tuple[problems.Shape, list[contenders.Contender]]]:
    """Shapes with their contenders, the important first."""
    if dry:
        eager = [c for c in contenders.ALL if not c.compiled]
        compiled = [contenders.ALL[0], next(c for c in contenders.ALL if c.compiled)]
        shapes = problems.Shape(2, 16, 8, "hard", tokens=5), problems.Shape(1, 16, 8, "easy", tokens=7)
        return [(shapes[0], eager), (shapes[1], compiled)]
    shapes = problems.shapes() if rest else problems.FIRST_SHAPES
    chosen = [c for c in contenders.ALL if rest or c.name in FIRST]
    found = [(shape, [c for c in chosen if not c.compiled]) for shape in shapes]
    # Last, beside ours again: a host's compiler may take longer than all the others together.
    compiled = [chosen[0], *(c for c in chosen if c.compiled)]
    return found + [(shape, compiled) for shape in shapes if problems.is_central(shape, rest)]


def describe(contender: contenders.Contender, problem: problems.Problem, mode: str, roof: dict) -> dict:
    """The part of a row that is known before measuring."""
    dtype = problem.x[0].dtype
    size, operations = problems.counts(problem.shape, dtype, problem.applications["free"])[mode]
    return {
        "recurrence": contender.recurrence,
        "applications": problem.applications[contender.recurrence],
        "bytes": size,
        "operations": operations,
        "copy_rate": roof["copy"],
        "matrix_rate": roof["tf32" if dtype == torch.float32 else "bf16"],
    }


def shares(row: dict) -> dict:
    """The percentages of the ceilings that a time reaches."""
    seconds = row["us"] / 1e6
    return {
        "copy_percent": 100 * row["bytes"] / seconds / row["copy_rate"],
        "matrix_percent": 100 * row["operations"] / seconds / row["matrix_rate"],
    }


def measure_shape(shape, chosen, bench: timing.Bench, roof: dict, dtype) -> None:
    """All chosen contenders of one shape, mode by mode; rows that are known are left alone."""
    cache = problems.cache_bytes(bench.device)
    problem = functools.cache(lambda: problems.build(shape, dtype, bench.device, cache))
    modes = measure.MODES
    if any(c.compiled for c in chosen):
        torch._dynamo.reset()
        # A host's compiler takes many seconds for each.
        modes = modes[:1] if bench.dry else modes
    for mode in modes:
        known = {"kind": "time", "mode": mode, **dataclasses.asdict(shape)}
        bench.time(known, chosen, problem, lambda c, p, mode=mode: describe(c, p, mode, roof), shares)
    problem.cache_clear()
    gc.collect()
    if bench.device == "cuda":
        torch.cuda.empty_cache()


def compile_all(todo, dtype, device: str, deadline: stage.Deadline) -> None:
    """Run every compiled contender once in every mode, so that a later process finds its code."""
    for shape, chosen in todo:
        compiled = [c for c in chosen if c.compiled]
        if not compiled or deadline.passed(str(shape)):
            continue
        problem = problems.build(shape, dtype, device, 0)
        torch._dynamo.reset()
        for contender in compiled:
            ready = contender.make(problem)
            for mode in ("forward", "both"):
                measure.Subject(ready, problem, mode, True, False, device).sample(1)
            print(f"compiled {contender.name} for {shape}", flush=True)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = stage.arguments(__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.12, help="per contender, mode and shape")
    parser.add_argument("--compile-only", action="store_true", help="fill the compiler's cache, time nothing")
    options, rows, deadline = stage.begin(parser, argv)
    device, dtype = options.device, problems.DTYPES[options.dtype]
    todo = passes(options.rest, options.dry_run)
    if options.compile_only:
        compile_all(todo, dtype, device, deadline)
        return stage.end(rows, deadline)
    if (roof := rows.known(kind="ceilings")) is None:
        rows.add({"kind": "ceilings", **measure.ceilings(device, small=options.dry_run)})
        roof = rows.known(kind="ceilings")
    print({name: f"{roof[name]:.3g}" for name in ("copy", "bf16", "tf32")}, f"device {rows.common['device']}")
    bench = timing.Bench(rows, device, options.seconds)
    for shape, chosen in todo:
        if not deadline.passed(str(shape)):
            measure_shape(shape, chosen, bench, roof, dtype)
    return stage.end(rows, deadline)


if __name__ == "__main__":
    sys.exit(main())
