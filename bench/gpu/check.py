"""Is it right? Every kernel against float64, and integers to the last bit: the first facts of a GPU run.

    PYTHONPATH=.:kernels python3 bench/gpu/check.py --out DIR [--rest] [--small]

One row (kind "check") for each kernel, shape and activation, with the errors of out, p and all six gradients
relative to their own norms. 131 rows leave ragged tiles and take the fused weight gradients; 12,608 rows, a
batch of 64 images, take the products. Exits with 1 where something is wrong. Nothing is timed here, and what
is timed later is judged by itself.
"""

import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import problems
import rows as stage
import sparse
import torch

from lion_fast.studies.measuring import distance
from lion_kernels import ops, present, reference
from lion_kernels.blocks import to_blocks
from lion_kernels.step import adjoint_wide, solve_wide

GRADIENTS = ("dx", "dA", "dW", "db", "dV", "dc")
# Relative errors that no kernel may exceed: roundings of the operands' dtype, amplified by the iteration.
BOUNDS = {"bf16": 2e-2, "fp16": 4e-3, "fp32": 1e-4}
FEW_ROWS, MANY_ROWS = 131, 12608
MAX_ITER, TERMS = 30, 8


@dataclass(frozen=True)
class Case:
    """`block` and `keep` make the weights block-sparse; `wide` asks for the step kernels."""

    rows: int
    width: int
    state: int
    activation: str
    damping: float = 1.0
    wide: bool = False
    block: int | None = None
    keep: float = 1.0

    def __str__(self) -> str:
        kernel = "wide step" if self.wide else "solve"
        if self.block:
            kernel = f"block-sparse {self.block} at {1 - self.keep:.0%}"
        damped = f" damping {self.damping}" if self.damping != 1 else ""
        return f"{kernel} D={self.width} R={self.state} {self.activation}{damped} rows={self.rows}"


def cases(rest: bool, small: bool = False) -> Iterator[Case]:
    """The cases, what the timed stages use first. `small`: what compute-sanitizer gets through in seconds."""
    if small:
        for rows, width, state in ((1, 33, 5), (130, 100, 24), (70, 192, 128), (65, 64, 200)):
            yield Case(rows, width, state, "gelu", 0.8)
        yield Case(70, 64, 320, "gelu", wide=True)
        yield Case(70, 64, 128, "gelu", block=32, keep=0.5)
        return
    for state in (64, 16, 128):
        for rows in (FEW_ROWS, MANY_ROWS):
            yield Case(rows, 768, state, "relu")
    for state in (64, 32):
        yield Case(FEW_ROWS, 768, state, "gelu")
        yield Case(FEW_ROWS, 768, state, "tanh")
    for rows in (FEW_ROWS, MANY_ROWS):
        yield Case(rows, 768, 768, "relu", wide=True)
        for block in (64, 32):
            yield Case(rows, 768, 768, "relu", block=block, keep=0.25)
    # A state layer's call: tokens of width R.
    yield Case(1024, 32, 32, "tanh")
    yield Case(FEW_ROWS, 100, 24, "gelu", 0.7)
    if rest:
        shapes = ((768, 256), (192, 512), (384, 128), (1024, 48), (256, 200))
        for (width, state), activation in itertools.product(shapes, reference.ACTIVATIONS):
            yield Case(FEW_ROWS, width, state, activation)
            yield Case(MANY_ROWS, width, state, activation, 0.7)
        for block, keep in itertools.product((64, 32, 16), (0.5, 0.1)):
            yield Case(FEW_ROWS, 768, 768, "gelu", 0.7, block=block, keep=keep)


def errors(case: Case, dtype: torch.dtype, device: str) -> dict[str, float]:
    """The relative errors of out - x, p and the six gradients against float64.

    Both sides make `MAX_ITER` applications, and both adjoints get the same p: where a relu's p lies near
    zero, another rounding would be another slope.
    """
    shape = problems.Shape(1, case.width, case.state, "hard", tokens=case.rows)
    tokens = problems.draw_tokens(shape, dtype, device, 0)
    x, upstream = tokens[0][0], tokens[1][0]
    patterns = {}
    if case.block:
        pruned = sparse.Case(case.width, case.state, "block", 1 - case.keep, case.block)
        problem = sparse.build(pruned, shape, tokens)
        A, W, b, V, c = problem.free
        blocks = {k: to_blocks(t, problem.masks[k], case.block) for k, t in (("A", A), ("W", W), ("V", V))}
        patterns = {f"d{name}": t.pattern for name, t in blocks.items()}
        weights = tuple(blocks.values())
    else:
        A, W, b, V, c = problems.weights(shape, device)[0]
        weights = (A, W, V)
    x_, A_, W_, b_, V_, c_ = (t.double() for t in (x, A, W, b, V, c))
    options = (case.activation, MAX_ITER, 0.0, case.damping, True)
    back = (case.activation, TERMS, 0.0, case.damping, True)
    out, p, _, _ = reference.solve(x_, A_, W_, b_, V_, c_, *options)
    given = p.to(dtype)
    right = reference.adjoint(upstream.double(), x_, given.double(), A_, W_, V_, *back)
    gA, gW, gV = weights
    if case.wide or case.block:
        got_out, got_p, _, _ = solve_wide(x, gA, gW, b, gV, c, *options)
        got = adjoint_wide(upstream, x, given, gA, gW, gV, *back)
    else:
        backend = _backend(device)
        got_out, got_p, _, _ = ops.solve(x, A, W, b, V, c, *options, True, backend)
        got = ops.adjoint(upstream, x, given, A, W, V, *back, backend)
    found = {"out": distance(got_out.double() - x_, out - x_), "p": distance(got_p, p)}
    for name, ours, target in zip(GRADIENTS, got, right, strict=False):
        found[name] = distance(ours, patterns[name].gather(target) if name in patterns else target)
    return found


def _backend(device: str) -> str:
    """On a CPU, in a dry run, the operators of torch stand in."""
    return "triton" if device == "cuda" or present.interpreted() else "torch"


def integers_exact(state: int, dtype: torch.dtype, device: str) -> dict[str, float]:
    """1.0 for every result of small integers that is wrong anywhere, else 0.0: sums below 256 are exact in
    every dtype, so a wrong fragment, a missed wait or a wrong mask shows as a wrong integer. The weights are
    float32, as a layer's are: these are the kernels that are timed later.
    """
    x, A, W, b, V, c = problems.integers(1000, 768, state, device)
    given = (x.to(dtype), *(t.float() for t in (A, W, b, V, c)))
    found = {}
    for steps in (1, 2, 3):
        options = ("relu", steps, 0.0, 1.0, True)
        out, p, _, _ = reference.solve(x, A, W, b, V, c, *options)
        got = ops.solve(*given, *options, True, _backend(device))
        for name, ours, right in zip(("out", "p"), got, (out, p), strict=False):
            found[f"{name} {steps}"] = float(not torch.equal(ours.double(), right))
    return found


def _check(rows, kind: str, what: str, work, bound: float) -> bool:
    """Add the row of one case; whether it is right."""
    try:
        with rows.attempt({"kind": kind, "what": what}):
            found = work()
    except Exception as error:  # of whatever kind: one kernel must not cost the others their rows
        reason = stage.reason(error)
        rows.add({"kind": kind, "what": what, "failed": reason})
        print(f"  FAILED {what}: {reason}", flush=True)
        return False
    wrong = {name: value for name, value in found.items() if not value <= bound}
    row = {"kind": kind, "what": what, "errors": found, "bound": bound, "right": not wrong}
    rows.add(row | ({"failed": f"off: {', '.join(wrong)}"} if wrong else {}))
    text = " ".join(f"{name} {value:.1e}" for name, value in found.items())
    print(f"  {'wrong ' if wrong else 'right '} {what}: {text}", flush=True)
    return not wrong


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = stage.arguments(__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="few small shapes, for compute-sanitizer")
    options, rows, deadline = stage.begin(parser, argv)
    dtype, bound = problems.DTYPES[options.dtype], BOUNDS[options.dtype]
    chosen, states = list(cases(options.rest, options.small)), (64, 16, 128)
    if options.dry_run:
        chosen, states = [Case(37, 40, 24, "relu"), Case(20, 16, 8, "tanh", 0.7)], (16,)
    todo = [(str(case), partial(errors, case, dtype, options.device), bound) for case in chosen]
    if not options.small:
        exact = [(f"integers R={R}", partial(integers_exact, R, dtype, options.device), 0.0) for R in states]
        todo = exact + todo
    wrong = 0
    # Under a sanitizer everything is run, whatever is known.
    kind = "sanitized" if options.small else "check"
    for what, work, limit in todo:
        if kind == "check" and (row := rows.known(kind=kind, what=what)) is not None:
            wrong += "failed" in row
        elif not deadline.passed(what):
            wrong += not _check(rows, kind, what, work, limit)
            stage.leave_if_lost(options.device)
    print(f"correctness: {f'{wrong} wrong' if wrong else 'green'}", flush=True)
    return stage.end(rows, deadline, wrong)


if __name__ == "__main__":
    sys.exit(main())
