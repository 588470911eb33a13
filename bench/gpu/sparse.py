"""Time and memory of the sparse forms against sparsity, by granularity and width.

    PYTHONPATH=.:kernels python3 bench/gpu/sparse.py --out DIR [--rest] [--minutes 1.5]

For each width, sparsity and granularity all contenders solve the same problem, with weights that are zero
off the masks, beside the dense fused solve of these weights. Every one is checked against dense-with-zeros
in float64 before it is timed. Rows are of kind "sparse".
"""

import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass

import contenders
import problems
import rows as stage
import timing
import torch
from contenders import Contender, NotInstalled, Ready
from problems import ACTIVATION, MAX_ITER, NEUMANN_TERMS, TOL, Problem
from torch import Tensor
from torch.autograd.function import once_differentiable

from lion_fast.equilibrium import SolveOptions
from lion_fast.pruning import two_of_four
from lion_fast.pruning.blocksparse import _BlockSparseEquilibrium
from lion_fast.pruning.masks import expand_blocks, unit_mask
from lion_kernels import launch_step, reference
from lion_kernels.blocks import BLOCKS, find_pattern

MODES = ("forward", "backward")
SPARSITIES = (0.75, 0.5, 0.9, 0.25, 0.95, 0.0)
# (D, R), the most important first; the narrow states show where sparsity buys nothing.
WIDTHS = ((768, 768), (1024, 1024), (512, 512), (256, 256), (768, 128), (768, 64))
# In the first minutes: widths and sparsities.
FIRST = (((768, 768),), (0.75, 0.5, 0.9))
BATCH = 64
RATE = 0.9
DENSE = "dense fused"


@dataclass(frozen=True)
class Case:
    """One problem: R and D, the granularity ("block", "unit", "element", "2:4"), and the share of zeros."""

    width: int
    state: int
    granularity: str
    sparsity: float
    block: int | None = None

    @property
    def form(self) -> str:
        """The granularity with its block, as "block 64"."""
        return self.granularity if self.block is None else f"{self.granularity} {self.block}"


@dataclass
class SparseProblem(Problem):
    """A problem whose free weights are zero off the masks of A, W and V; it has no tied weights."""

    case: Case
    masks: dict[str, Tensor]


def cases(widths=WIDTHS, sparsities=SPARSITIES) -> list[Case]:
    """All cases: R = D = 768 at 75 % first, then its other sparsities, then the other widths."""
    found = []
    for (width, state), sparsity in itertools.product(widths, sparsities):
        found += [Case(width, state, "block", sparsity, block) for block in sorted(BLOCKS, reverse=True)]
        found += [Case(width, state, name, sparsity) for name in ("unit", "element")]
        if sparsity == 0.5:
            found.append(Case(width, state, "2:4", sparsity))
    return found


def draw_masks(case: Case, generator: torch.Generator) -> dict[str, Tensor]:
    """Random masks of A, W and V that drop round(sparsity n) of the n groups of each; one is left."""
    R, D = case.state, case.width
    shapes = {"A": (R, D), "W": (R, R), "V": (D, R)}

    def keep(*size: int) -> Tensor:
        total = torch.Size(size).numel()
        mask = torch.zeros(total, dtype=torch.bool)
        kept = max(1, total - round(case.sparsity * total))
        mask[torch.randperm(total, generator=generator)[:kept]] = True
        return mask.view(size)

    if case.granularity == "unit":
        units = keep(R)
        return {name: unit_mask(name, units, torch.Size(shape)) for name, shape in shapes.items()}
    if case.granularity == "2:4":
        fours = {name: torch.rand(n, k // 4, 4, generator=generator) for name, (n, k) in shapes.items()}
        return {name: (t.argsort(2) < 2).view(shapes[name]) for name, t in fours.items()}
    if case.granularity == "element":
        return {name: keep(*shape) for name, shape in shapes.items()}
    size = case.block
    return {
        name: expand_blocks(keep(-(-n // size), -(-k // size)), size, torch.Size((n, k)))
        for name, (n, k) in shapes.items()
    }


def build(case: Case, shape: problems.Shape, tokens) -> SparseProblem:
    """The masked problem on given tokens; the masked W has 2-norm RATE, so every sparsity contracts alike."""
    generator = torch.Generator().manual_seed(0)
    device, (R, D) = tokens[0][0].device, (case.state, case.width)
    masks = draw_masks(case, generator)
    A, W, V = (torch.randn(mask.shape, generator=generator) * mask for mask in masks.values())
    A, V = (t / t.square().sum().sqrt() * R**0.5 for t in (A, V))
    W = W * (RATE / torch.linalg.matrix_norm(W, 2))
    b, c = torch.randn(R, generator=generator), 0.1 * torch.randn(D, generator=generator)
    free = tuple(t.to(device) for t in (A, W, b, V, c))
    x = tokens[0][0].float()
    count = reference.solve(x, *free, ACTIVATION, MAX_ITER, TOL, 1.0, True)[3]
    return SparseProblem(
        shape,
        *tokens,
        free,
        (),
        {"free": count.float().mean().item()},
        {"free": int(count.max())},
        case,
        {name: mask.to(device) for name, mask in masks.items()},
    )


def _block_sparse(problem: SparseProblem) -> Ready:
    A, W, b, V, c = problem.free
    x, block = problem.x[0], problem.case.block
    if x.is_cuda and (reason := launch_step.why_not(x.dtype, problem.case.state)):
        raise NotInstalled(reason)
    patterns = tuple(find_pattern(problem.masks[name], block) for name in "AWV")
    values = [p.gather(t).contiguous() for p, t in zip(patterns, (A, W, V), strict=True)]
    leaves = contenders._leaves((values[0], values[1], b, values[2], c), torch.float32)
    solve = SolveOptions(max_iter=MAX_ITER, neumann_terms=NEUMANN_TERMS)
    options = (ACTIVATION, MAX_ITER, TOL, 1.0, solve.adjoint(TOL), None)
    return Ready(lambda x: _BlockSparseEquilibrium.apply(x, *leaves, patterns, *options)[0], leaves)


def _compacted(problem: SparseProblem) -> Ready:
    A, W, b, V, c = problem.free
    # A dropped unit's column of V is zero: it reaches no output, and leaves without a trace.
    kept = problem.masks["V"].any(0).nonzero().squeeze(1)
    smaller = (A[kept], W[kept][:, kept], b[kept], V[:, kept], c)
    return contenders._ours(dataclasses.replace(problem, free=tuple(t.contiguous() for t in smaller)))


class _Loop(torch.autograd.Function):
    """The recurrence with the tokens as columns, as torch's sparse products want their dense operand.

    The weights' gradients are dense products, torch having no sampled ones for all of these formats.
    """

    @staticmethod
    def forward(ctx, x, A, W, b, V, c, operands, product, steps):
        xt = x.T.contiguous()
        q = product(operands["A"], xt, b[:, None].expand(-1, len(x)))
        p = q
        for _ in range(steps - 1):
            p = product(operands["W"], torch.relu(p), q)
        ctx.save_for_backward(x, p)
        ctx.operands, ctx.product = operands, product
        out = product(operands["V"], torch.relu(p), c[:, None].expand(-1, len(x)))
        return x + out.T

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, p = ctx.saved_tensors
        operands, product = ctx.operands, ctx.product
        slope, gt = (p > 0).to(p.dtype), grad.T.contiguous()
        g = product(operands["V.T"], gt, torch.zeros_like(p))
        y = g
        for _ in range(NEUMANN_TERMS):
            y = product(operands["W.T"], slope * y, g)
        t, z = slope * y, torch.relu(p)
        dx = grad + product(operands["A.T"], t, torch.zeros_like(gt)).T
        return dx, t @ x, t @ z.T, t.sum(1), gt @ z.T, grad.sum(0), None, None, None


def _bsr(matrix: Tensor, block: int) -> Tensor:
    n, k = matrix.shape
    if n % block or k % block:
        raise NotInstalled(f"torch's BSR needs multiples of {block}, not {n} x {k}")
    return matrix.to_sparse_bsr((block, block))


def _add_bsr(operand: Tensor, z: Tensor, add: Tensor) -> Tensor:
    """operand z + add; on CUDA by torch's Triton kernel, elsewhere by torch's own product."""
    if not z.is_cuda:
        return add + operand @ z
    from torch.sparse._triton_ops import bsr_dense_addmm

    return bsr_dense_addmm(add.contiguous(), operand, z)


def _add_csr(operand: Tensor, z: Tensor, add: Tensor) -> Tensor:
    return torch.addmm(add, operand, z)


def _add_two_of_four(operand: Tensor, z: Tensor, add: Tensor) -> Tensor:
    return torch.mm(operand, z) + add


def _loop(problem: SparseProblem, compress: Callable, product: Callable, backward: bool = True) -> Ready:
    x = problem.x[0]
    if not x.is_cuda and x.dtype != torch.float32:
        raise NotInstalled(f"torch on a CPU has no sparse product in {x.dtype}")
    A, _, _, V, _ = leaves = contenders._leaves(problem.free, x.dtype)
    W = leaves[1]
    operands = {}
    with torch.no_grad():
        for name, matrix in (("A", A), ("W", W), ("V", V)):
            operands[name] = compress(matrix.detach())
            if backward:
                operands[f"{name}.T"] = compress(matrix.detach().T.contiguous())
    steps = problem.steps["free"]
    return Ready(lambda x: _Loop.apply(x, *leaves, operands, product, steps), leaves)


def _bsr_loop(problem: SparseProblem) -> Ready:
    return _loop(problem, lambda matrix: _bsr(matrix, problem.case.block), _add_bsr)


def _csr_loop(problem: SparseProblem) -> Ready:
    return _loop(problem, torch.Tensor.to_sparse_csr, _add_csr)


def _two_of_four_reason(problem: SparseProblem) -> None:
    x = problem.x[0]
    for name, mask in problem.masks.items():
        if reason := two_of_four.why_not(x.device, x.dtype, tuple(mask.shape)):
            raise NotInstalled(f"{name}: {reason}")


def _torch_two_of_four(problem: SparseProblem) -> Ready:
    _two_of_four_reason(problem)
    return _loop(problem, two_of_four.compress, _add_two_of_four, backward=False)


def _our_two_of_four(problem: SparseProblem) -> Ready:
    _two_of_four_reason(problem)
    A, W, b, V, c = problem.free
    A, W, V = (two_of_four.compress(t.to(problem.x[0].dtype)) for t in (A, W, V))

    def call(x: Tensor) -> Tensor:
        return two_of_four._solve(x, A, W, b, V, c, ACTIVATION, MAX_ITER, TOL, 1.0)[0]

    return Ready(call, [])


def chosen(case: Case, rest: bool = True) -> list[Contender]:
    """Who competes in a case: the dense ones always, and those that its pattern is for. Without `rest`
    torch's own products of blocks stay away, whose kernels are compiled first or take milliseconds.
    """
    found = [
        Contender(DENSE, contenders._ours, note="with zeros"),
        Contender("dense loop", contenders._state_space, note="with zeros, count known"),
    ]
    note = "count known, weight gradients dense"
    csr = Contender("CSR loop", _csr_loop, captured=False, note=note)
    if case.granularity == "block":
        found.append(Contender("block-sparse fused", _block_sparse))
        return [*found, Contender("BSR loop", _bsr_loop, note=note), csr] if rest else found
    if case.granularity == "unit":
        return [*found, Contender("compacted", _compacted)]
    if case.granularity == "2:4":
        note = "inference, stops itself, host syncs"
        found.append(Contender("2:4 form", _our_two_of_four, captured=False, note=note))
        return [*found, Contender("2:4 loop", _torch_two_of_four, note="inference, count known")]
    return [*found, csr]


def describe(problem: SparseProblem, mode: str) -> dict:
    """What is known of a row before measuring. `dead` is the share of zeros of W, of blocks or entries."""
    case, applications = problem.case, problem.applications["free"]
    T = problem.shape.rows
    entries = {name: int(mask.sum()) for name, mask in problem.masks.items()}
    ends = entries["A"] + entries["V"]
    operations = {
        "forward": 2 * T * (ends + entries["W"] * (applications - 1)),
        "backward": 2 * T * (2 * ends + entries["W"] * (NEUMANN_TERMS + 1)),
    }[mode]
    if case.granularity == "block":
        dead = find_pattern(problem.masks["W"], case.block).sparsity
    elif case.granularity == "unit":
        dead = 1 - problem.masks["V"].any(0).float().mean().item()
    else:
        dead = 1 - entries["W"] / problem.masks["W"].numel()
    return {
        "dead": dead,
        "kept": sum(entries.values()),
        "applications": applications,
        "operations": round(operations),
    }


def measure_case(case, shape, tokens, bench: timing.Bench, rest: bool) -> None:
    """All contenders of a case, forward and backward; rows that are known are left alone.

    tokens() -> x and upstream gradients in rotation.
    """
    problem = functools.cache(lambda: build(case, shape, tokens()))
    for mode in MODES:
        known = {"kind": "sparse", "mode": mode, "batch": shape.batch, "tokens": shape.tokens, **asdict(case)}
        # 2:4 is for inference here.
        competing = [c for c in chosen(case, rest) if mode == "forward" or not c.name.startswith("2:4")]
        bench.time(known, competing, problem, lambda c, p, mode=mode: describe(p, mode))


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = stage.arguments(__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.12, help="per contender, mode and case")
    options, rows, deadline = stage.begin(parser, argv)
    bench = timing.Bench(rows, options.device, options.seconds)
    dtype, device = problems.DTYPES[options.dtype], options.device
    todo = cases() if options.rest else cases(*FIRST)
    if options.dry_run:
        todo = cases(widths=((64, 64),), sparsities=(0.5,))
    batch, count = (2, 9) if options.dry_run else (BATCH, problems.TOKENS_PER_IMAGE)

    @functools.lru_cache(maxsize=1)
    def tokens(shape: problems.Shape):
        return problems.draw_tokens(shape, dtype, device, problems.cache_bytes(device))

    for case in todo:
        if deadline.passed(str(case)):
            continue
        shape = problems.Shape(batch, case.width, case.state, "sparse", tokens=count)
        measure_case(case, shape, functools.partial(tokens, shape), bench, options.rest or options.dry_run)
        if device == "cuda":
            torch.cuda.empty_cache()
    return stage.end(rows, deadline)


if __name__ == "__main__":
    sys.exit(main())
