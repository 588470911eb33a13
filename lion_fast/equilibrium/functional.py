"""The equilibrium as a function: one autograd.Function around the two operators."""

from collections.abc import Callable

import torch
from torch import Tensor

from lion_fast.equilibrium.solve import (
    SolveInfo,
    SolveOptions,
    apply_policy,
    default_tol,
    takes_solve_options,
)
from lion_fast.equilibrium.solvers import final
from lion_fast.errors import check_choice
from lion_kernels import ops
from lion_kernels.reference import ACTIVATIONS


class _Equilibrium(torch.autograd.Function):
    """Saves the tokens, the R-wide pre-activation and the parameters, whatever the iterations."""

    @staticmethod
    def forward(
        ctx, x, A, W, b, V, c, activation, max_iter, tol, damping, adjoint, residual, backend, save, sink
    ):
        out, p, change, count = ops.solve(
            x, A, W, b, V, c, activation, max_iter, tol, damping, residual, save, backend
        )
        ctx.save_for_backward(x, p, A, W, V, b)
        ctx.c_dtype = c.dtype
        ctx.options = (activation, *adjoint, residual, backend)
        ctx.sink, ctx.tol = sink, tol
        ctx.mark_non_differentiable(change, count)
        return out, change, count

    @staticmethod
    def backward(ctx, grad_out, _change, _count):
        x, p, A, W, V, b = ctx.saved_tensors
        with torch.no_grad():
            dx, dA, dW, db, dV, dc, change, count = ops.adjoint(
                grad_out.contiguous(), x, p, A, W, V, *ctx.options
            )
        if ctx.sink:
            ctx.sink[0].backward = SolveInfo(change, count, ctx.tol)
        grads = (dx, dA.to(A.dtype), dW.to(W.dtype), db.to(b.dtype), dV.to(V.dtype), dc.to(ctx.c_dtype))
        return *final(grads, grad_out, x, A, W, V, b), *[None] * 9


def check_input(x: Tensor, width: int) -> None:
    """Raise ValueError unless x is [..., width], TypeError unless it is of a float type of `TOLERANCES`."""
    if x.ndim == 0 or x.shape[-1] != width:
        raise ValueError(
            f"the last dimension of x must be the layer's width {width}; x has shape {tuple(x.shape)}"
        )
    default_tol(x.dtype)


def _check_shapes(A: Tensor, W: Tensor, b: Tensor, V: Tensor, c: Tensor) -> None:
    state, width = A.shape
    expected = {"W": (state, state), "b": (state,), "V": (width, state), "c": (width,)}
    for (name, shape), tensor in zip(expected.items(), (W, b, V, c), strict=True):
        if tensor.shape != shape:
            raise ValueError(
                f"{name} must have shape {shape} for A {tuple(A.shape)}; got {tuple(tensor.shape)}"
            )


@takes_solve_options("max_iter", "tol", "damping", "backward", "neumann_terms", "backend")
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
    max_iter=1 is phi(x A^T + b), with its own gradient. Nothing synchronises with the device. Second
    derivatives raise RuntimeError.

    Raises ValueError on shapes and options that do not fit, TypeError on tensors that are no floats,
    RuntimeError where `backend="triton"` cannot run.

    >>> x, A, V = torch.randn(2, 7, 6), torch.randn(4, 6), torch.randn(6, 4)
    >>> out, info = equilibrium(x, A, 0.5 * torch.eye(4), torch.zeros(4), V, torch.zeros(6), return_info=True)
    >>> out.shape, info.residual.shape, info.reason
    (torch.Size([2, 7, 6]), torch.Size([2, 7]), 'converged')
    """
    check_choice("activation", activation, ACTIVATIONS)
    options = SolveOptions(**solve)
    check_input(x, A.shape[-1])
    _check_shapes(A, W, b, V, c)
    found = solve_tokens(x, A, W, b, V, c, activation, options, residual=residual, return_info=return_info)
    return found if return_info else found[0]


def solve_tokens(
    x: Tensor, A: Tensor, W: Tensor, b: Tensor, V: Tensor, c: Tensor,
    activation: str, options: SolveOptions, *, residual: bool = True, return_info: bool = False,
    hint: Callable[[], str] = str,
) -> tuple[Tensor, SolveInfo | None]:  # fmt: skip
    """`equilibrium` of checked tensors and options, with its info where `return_info` asks for it.

    `hint` says what to do about a failure that `on_failure` tells.
    """
    if options.max_iter == 1:
        W = W * 0  # it stands in no result, so it gets no gradient
    for weight in (A, W, b, V, c):
        default_tol(weight.dtype)
    tol = options.tolerance(x.dtype)
    backend = ops.resolve_backend(options.backend, x.device, x.dtype, A.shape[0])
    save = torch.is_grad_enabled() and any(t.requires_grad for t in (x, A, W, b, V, c))
    adjoint, compiling = options.adjoint(tol), torch.compiler.is_compiling()
    sink = [] if return_info and save and adjoint[0] and not compiling else None
    out, change, count = _Equilibrium.apply(
        x.reshape(-1, x.shape[-1]).contiguous(), A, W, b, V, c,
        activation, options.max_iter, tol, options.damping, adjoint, residual, backend, save, sink,
    )  # fmt: skip
    out, inspect = out.reshape(x.shape), options.on_failure != "ignore" and not compiling
    if not (return_info or inspect):
        return out, None
    info = SolveInfo(change.reshape(x.shape[:-1]), count.reshape(x.shape[:-1]), tol)
    if sink is not None:
        sink.append(info)
    if inspect:
        apply_policy(info, options.on_failure, hint())
    return out, info
