"""The equilibrium as a function: one autograd.Function around the two operators."""

from collections.abc import Callable

import torch
from torch import Tensor

from lion_fast.equilibrium.solve import (
    SolveInfo,
    SolveOptions,
    apply_policy,
    check_tensor,
    default_tol,
    record_backward,
    takes_solve_options,
)
from lion_fast.equilibrium.solvers import final, refuse_transforms, series
from lion_fast.errors import check_choice
from lion_kernels import ops
from lion_kernels.reference import ACTIVATIONS, accumulate_dtype, unit_rows


class _Equilibrium(torch.autograd.Function):
    """Saves the tokens, the R-wide pre-activation and the parameters, whatever the iterations."""

    @staticmethod
    def forward(
        ctx, x, A, W, b, V, c, activation, max_iter, tol, damping, adjoint, residual, backend, save, told
    ):
        out, p, change, count = ops.solve(
            x, A, W, b, V, c, activation, max_iter, tol, damping, residual, save, backend
        )
        ctx.save_for_backward(x, p, A, W, V, b)
        ctx.c_dtype = c.dtype
        ctx.options = (activation, *adjoint, residual, backend)
        ctx.told, ctx.tol = told, tol
        ctx.mark_non_differentiable(change, count)
        return out, change, count

    @staticmethod
    def backward(ctx, grad_out, _change, _count):
        x, p, A, W, V, b = ctx.saved_tensors
        with torch.no_grad():
            dx, dA, dW, db, dV, dc, change, count = ops.adjoint(
                grad_out.contiguous(), x, p, A, W, V, *ctx.options
            )
        if ctx.told is not None:
            ctx.told(SolveInfo(change, count, ctx.tol), grad_out, p, W, V)
        grads = (dx, dA.to(A.dtype), dW.to(W.dtype), db.to(b.dtype), dV.to(V.dtype), dc.to(ctx.c_dtype))
        return *final(grads, grad_out, x, A, W, V, b), *[None] * 9


def check_input(x: Tensor, width: int) -> None:
    """Raise ValueError unless x is [..., width], TypeError unless it is of a float type of `TOLERANCES`."""
    check_tensor(x)
    if x.ndim == 0 or x.shape[-1] != width:
        raise ValueError(
            f"the last dimension of x must be the layer's width {width}; x has shape {tuple(x.shape)}"
        )


def _check_shapes(A: Tensor, W: Tensor, b: Tensor, V: Tensor, c: Tensor) -> None:
    for name, tensor in zip("AWbVc", (A, W, b, V, c), strict=True):
        check_tensor(tensor, name)
    if A.ndim != 2:
        raise ValueError(f"A must be a matrix [R, D]; got shape {tuple(A.shape)}")
    state, width = A.shape
    expected = {"W": (state, state), "b": (state,), "V": (width, state), "c": (width,)}
    for (name, shape), tensor in zip(expected.items(), (W, b, V, c), strict=True):
        if tensor.shape != shape:
            raise ValueError(
                f"{name} must have shape {shape} for A {tuple(A.shape)}; got {tuple(tensor.shape)}"
            )


@takes_solve_options()
def equilibrium(
    x: Tensor, A: Tensor, W: Tensor, b: Tensor, V: Tensor, c: Tensor,
    *, activation: str = "relu", residual: bool = True, return_info: bool = False, **solve,
) -> Tensor | tuple[Tensor, SolveInfo]:  # fmt: skip
    """out = x + Z V^T + c with the equilibrium Z = phi(Z W^T + x A^T + b), token by token.

    x [..., D] of any float dtype and leading shape; A [R, D], W [R, R], b [R], V [D, R], c [D]. W is
    taken as it is: it must be a contraction, Lip(phi) ||W|| < 1 (see `contraction.bounded`), or the
    iteration may not converge, which the info says. out has x's shape and dtype; state and sums are
    float32 (float64 for float64), inside autocast too. `residual=False` leaves the `x +` away.

    tol is the relative residual per token; None takes 1e-2 for half types, 1e-4 for float32 and 1e-8
    for float64; 0 always makes `max_iter` applications. `backward` is the gradient: "neumann" with
    `neumann_terms` terms after the first, at most max_iter - 1, "jfb" without, "exact" to `tol`, "phantom".
    max_iter=1 is phi(x A^T + b), with its own gradient. Nothing synchronises with the device, unless
    `on_failure` is "warn" or "raise", which look at the solve and at its gradient. Second derivatives,
    torch.vmap and torch.func raise RuntimeError.

    Raises ValueError on shapes and options that do not fit, TypeError on tensors that are no floats,
    RuntimeError where `backend="triton"` cannot run.

    >>> x, A, V = torch.randn(2, 7, 6), torch.randn(4, 6), torch.randn(6, 4)
    >>> out, info = equilibrium(x, A, 0.5 * torch.eye(4), torch.zeros(4), V, torch.zeros(6), return_info=True)
    >>> out.shape, info.residual.shape, info.reason
    (torch.Size([2, 7, 6]), torch.Size([2, 7]), 'converged')
    """
    check_choice("activation", activation, ACTIVATIONS)
    options = SolveOptions(**solve)
    _check_shapes(A, W, b, V, c)
    check_input(x, A.shape[-1])
    found = solve_tokens(x, A, W, b, V, c, activation, options, residual=residual, return_info=return_info)
    return found if return_info else found[0]


def solve_tokens(
    x: Tensor, A: Tensor, W: Tensor, b: Tensor, V: Tensor, c: Tensor,
    activation: str, options: SolveOptions, *, residual: bool = True, return_info: bool = False,
    contracts: bool = False, hint: Callable[[], str] = str,
) -> tuple[Tensor, SolveInfo | None]:  # fmt: skip
    """`equilibrium` of checked tensors and options, with its info where `return_info` asks for it.

    `hint` says what to do about a failure that `on_failure` tells. `contracts`: W is known to be a
    contraction, so that the series of a gradient shrinks and need not be looked at.
    """
    refuse_transforms()
    if options.max_iter == 1:
        W = W * 0  # it stands in no result, so it gets no gradient
    for weight in (A, W, b, V, c):
        default_tol(weight.dtype)
        if weight.device != x.device:
            raise ValueError(f"x is on {x.device} and the weights on {weight.device}: move one with .to()")
    tol = options.tolerance(x.dtype)
    backend = ops.resolve_backend(options.backend, x.device, x.dtype, A.shape[0])
    save = torch.is_grad_enabled() and any(t.requires_grad for t in (x, A, W, b, V, c))
    adjoint, compiling = options.adjoint(tol), torch.compiler.is_compiling()
    inspect = options.on_failure != "ignore" and not compiling
    watched = (return_info or inspect) and save and options.max_iter > 1 and not compiling
    told, tell = backward_record(activation, options, tol, contracts, hint)
    out, change, count = _Equilibrium.apply(
        x.reshape(-1, x.shape[-1]).contiguous(), A, W, b, V, c, activation, options.max_iter, tol,
        options.damping, adjoint, residual, backend, save, tell if watched else None,
    )  # fmt: skip
    out = out.reshape(x.shape)
    if not (return_info or inspect):
        return out, None
    info = SolveInfo(change.reshape(x.shape[:-1]), count.reshape(x.shape[:-1]), tol)
    told.append(info)
    if inspect:
        apply_policy(info, options.on_failure, hint)
    return out, info


def backward_record(
    activation: str, options: SolveOptions, tol: float, contracts: bool, hint: Callable[[], str]
) -> tuple[list[SolveInfo], Callable[[SolveInfo, Tensor, Tensor, Tensor, Tensor], None]]:
    """A list for the info of a forward, and tell(record, grad_out, p, W, V), by which its backward joins it.

    `contracts` and `hint` as in `solve_tokens`.
    """
    told: list[SolveInfo] = []
    adjoint = options.adjoint(tol)

    def tell(record: SolveInfo, grad_out: Tensor, p: Tensor, W: Tensor, V: Tensor) -> None:
        if options.backward != "exact":
            if contracts and adjoint[0] == 0:
                return  # no series, and nothing to say about it
            if contracts:
                record.grows = torch.zeros_like(record.residual, dtype=torch.bool)
            else:
                finite = torch.isfinite(record.residual)
                record = _series_record(grad_out, p, W, V, activation, adjoint, tol)
                if adjoint[0]:  # without terms the kernels measured nothing
                    record.residual = record.residual.where(finite, torch.inf)
        record_backward(told[0], record, grad_out, options.on_failure, hint)

    return told, tell


def _series_record(
    grad_out: Tensor, p: Tensor, W: Tensor, V: Tensor, activation: str, adjoint: tuple, tol: float
) -> SolveInfo:
    """The record of a truncated gradient whose W may expand: the kernels do not compare its terms."""
    acc = accumulate_dtype(p.dtype)
    W, slope = W.to(acc), ACTIVATIONS[activation].grad(p.to(acc))
    terms, _, damping = adjoint
    with torch.autocast(p.device.type, enabled=False):
        g, _ = unit_rows(grad_out.to(acc) @ V.to(acc))
        return series(lambda y: g + (slope * y) @ W, g, terms, damping, tol, torch.finfo(acc).eps)[1]
