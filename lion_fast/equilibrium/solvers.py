"""Fixed points of any f: Picard, Anderson and Broyden, their info record and the implicit gradient.

The first dimension of a state counts independent rows (samples); the residual, the stop and the
state kept are a row's own, so a row's result does not depend on its batch-mates.
"""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lion_fast.errors import (
    ConvergenceError,
    OptionError,
    check_choice,
    check_number,
    check_whole,
    names_options,
)
from lion_kernels.reference import ADJOINT_FLOOR, STATE_FLOOR, accumulate_dtype, iterate, relative_change

BACKWARDS = ("neumann", "jfb", "exact", "phantom")
POLICIES = ("ignore", "warn", "raise")
TOLERANCES = {torch.bfloat16: 1e-2, torch.float16: 1e-2, torch.float32: 1e-4, torch.float64: 1e-8}
PHANTOM_DAMPING = 0.5
# An exact backward may take this many times the forward's iterations.
EXACT_FACTOR = 4


def default_tol(dtype: torch.dtype) -> float:
    """The relative residual that is asked for when `tol` is None, by the tokens' dtype."""
    if dtype not in TOLERANCES:
        raise TypeError(f"an equilibrium needs a floating-point input; got {dtype}")
    return TOLERANCES[dtype]


@dataclass
class SolveInfo:
    """How a solve ended, one entry a row, on the device until somebody reads it.

    `residual` is |f(z) - z| / (|f(z)| + 1e-3) of the un-damped map, root mean squares, at the last
    application (inf where it was not finite); `iterations` counts applications of f; `tol` is what
    was asked for. `backward` is the record of the backward solve, once it has run (eager mode).
    """

    residual: Tensor
    iterations: Tensor
    tol: float
    backward: "SolveInfo | None" = None

    @property
    def converged(self) -> Tensor:
        """Bool per row, on the device."""
        return self.residual <= self.tol

    @property
    def reason(self) -> str:
        """Why the worst row stopped: converged, max_iter or non_finite. Reads the device."""
        if not torch.isfinite(self.residual).all():
            return "non_finite"
        return "converged" if self.converged.all() else "max_iter"

    def summary(self) -> dict[str, float | str]:
        """Plain numbers over all rows, for a log. Reads the device."""
        if self.residual.numel() == 0:
            return {
                "converged": 1.0,
                "iterations": 0.0,
                "max_iterations": 0,
                "residual": 0.0,
                "reason": self.reason,
            }
        return {
            "converged": self.converged.float().mean().item(),
            "iterations": self.iterations.float().mean().item(),
            "max_iterations": int(self.iterations.max()),
            "residual": self.residual.max().item(),
            "reason": self.reason,
        }


def check_solve_options(
    *,
    max_iter: int,
    tol: float | None,
    damping: float,
    backward: str = "neumann",
    neumann_terms: int = 0,
    on_failure: str = "ignore",
) -> None:
    """Raise `OptionError` on a value outside its range; shared by every layer and call."""
    check_choice("backward", backward, BACKWARDS)
    check_choice("on_failure", on_failure, POLICIES)
    check_whole("max_iter", max_iter)
    check_whole("neumann_terms", neumann_terms, 0)
    if tol is not None:
        check_number("tol", tol)
    check_number("damping", damping)
    if tol is not None and not 0 <= tol < 1:
        raise OptionError(f"tol must be in [0, 1) (0: always max_iter iterations) or None; got {tol!r}")
    if not 0 < damping <= 1:
        raise OptionError(f"damping must be in (0, 1]; got {damping!r}")


def apply_policy(info: SolveInfo, on_failure: str, hint: str = "") -> None:
    """Warn or raise when a row did not converge; reads the device unless `on_failure` is ignore."""
    if on_failure == "ignore" or (reason := info.reason) == "converged":
        return
    failed = int((~info.converged).sum())
    message = (
        f"{failed} of {info.residual.numel()} rows did not reach their equilibrium ({reason}): "
        f"worst residual {info.residual.max().item():.3g} against tol {info.tol:.3g} after "
        f"{int(info.iterations.max())} iterations. "
        f"{hint or 'Raise max_iter or tol, or make the map contract more.'}"
    )
    if on_failure == "raise":
        raise ConvergenceError(message)
    warnings.warn(message, stacklevel=3)


@names_options
def picard(
    f: Callable[[Tensor], Tensor],
    z0: Tensor,
    *,
    max_iter: int = 50,
    tol: float | None = None,
    damping: float = 1.0,
    early_exit: bool | None = None,
) -> tuple[Tensor, SolveInfo]:
    """z <- z + damping (f(z) - z) per row until |f(z) - z| <= tol |f(z)|; returns the last f(z).

    z0 [B, ...] in any float dtype; `max_iter=1` is one application of f. `early_exit` None stops
    early on a CPU only; True does so on a GPU too, at the price of one host synchronisation a step.

    >>> z, info = picard(lambda z: 0.5 * z + 1, torch.zeros(3, 4))
    >>> bool((z - 2).abs().max() < 1e-3), info.reason
    (True, 'converged')
    """
    check_solve_options(max_iter=max_iter, tol=tol, damping=damping)
    tol = default_tol(z0.dtype) if tol is None else tol
    flat = _flatten(f, z0)

    def step(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
        new = flat(z)
        return new, new

    start = _rows(z0)
    floor = STATE_FLOOR * start.shape[1] ** 0.5
    z, new, change, count = iterate(step, start, max_iter, tol, damping, floor, early_exit=early_exit)
    z = torch.where(torch.isfinite(change), new, z)
    return z.to(z0.dtype).reshape(z0.shape), SolveInfo(change[:, 0], count[:, 0], tol)


@names_options
def anderson(
    f: Callable[[Tensor], Tensor],
    z0: Tensor,
    *,
    max_iter: int = 50,
    tol: float | None = None,
    damping: float = 1.0,
    window: int = 5,
    ridge: float = 1e-6,
    early_exit: bool | None = None,
) -> tuple[Tensor, SolveInfo]:
    """Anderson mixing over the last `window` steps, per row; arguments and result as `picard`.

    The Gram system is solved in float32 (float64 for float64) with a ridge relative to its trace, so
    half-precision states work. Pays for slow maps (rate 0.5 and above); for fast ones use `picard`.
    Source: Walker and Ni, "Anderson acceleration for fixed-point iterations", 2011.
    """
    check_solve_options(max_iter=max_iter, tol=tol, damping=damping)
    if window < 1:
        raise OptionError(f"window must be at least 1; got {window!r}")
    tol = default_tol(z0.dtype) if tol is None else tol
    flat = _flatten(f, z0)
    states: list[Tensor] = []
    values: list[Tensor] = []

    def propose(z: Tensor, value: Tensor) -> Tensor:
        states.append(z)
        values.append(value)
        if len(states) > window:
            states.pop(0), values.pop(0)
        Z, Y = torch.stack(states, 1), torch.stack(values, 1)  # [B, m, N]
        G = Y - Z
        gram = G @ G.mT  # [B, m, m]
        trace = gram.diagonal(dim1=1, dim2=2).sum(-1)[:, None, None]
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        weights, _ = torch.linalg.solve_ex(gram + ridge * trace * eye, torch.ones_like(gram[..., :1]))
        weights = weights / weights.sum(1, keepdim=True)
        return (weights * (Z + damping * G)).sum(1)

    return _accelerated(flat, z0, propose, max_iter, tol, early_exit)


@names_options
def broyden(
    f: Callable[[Tensor], Tensor],
    z0: Tensor,
    *,
    max_iter: int = 50,
    tol: float | None = None,
    damping: float = 1.0,
    memory: int = 10,
    early_exit: bool | None = None,
) -> tuple[Tensor, SolveInfo]:
    """Broyden's good method on f(z) - z, per row, restarted after `memory` updates; else as `picard`.

    The inverse Jacobian is -I + U V^T with at most `memory` columns, so its cost does not grow.
    Source: Broyden, "A class of methods for solving nonlinear simultaneous equations", 1965.
    """
    check_solve_options(max_iter=max_iter, tol=tol, damping=damping)
    if memory < 1:
        raise OptionError(f"memory must be at least 1; got {memory!r}")
    tol = default_tol(z0.dtype) if tol is None else tol
    flat = _flatten(f, z0)
    left: list[Tensor] = []
    right: list[Tensor] = []
    last: list[Tensor] = []

    def inverse(v: Tensor, us: list[Tensor], vs: list[Tensor]) -> Tensor:
        """(-I + U V^T) v per row."""
        out = -v
        for u, w in zip(us, vs, strict=True):
            out = out + u * (w * v).sum(1, keepdim=True)
        return out

    def propose(z: Tensor, value: Tensor) -> Tensor:
        g = value - z
        if last:
            dz, dg = z - last[0], g - last[1]
            if len(left) == memory:
                left.clear(), right.clear()
            v = inverse(dz, right, left)
            slope = (v * dg).sum(1, keepdim=True)
            u = (dz - inverse(dg, left, right)) / slope
            left.append(torch.where(torch.isfinite(u), u, 0.0))
            right.append(v)
        last[:] = [z, g]
        return z - damping * inverse(g, left, right)

    return _accelerated(flat, z0, propose, max_iter, tol, early_exit)


SOLVERS = {"picard": picard, "anderson": anderson, "broyden": broyden}


def _rows(z: Tensor) -> Tensor:
    if z.ndim == 0:
        raise ValueError("the state needs a first dimension that counts its rows; got a scalar")
    default_tol(z.dtype)
    return z.detach().reshape(z.shape[0], z[0].numel() if z.shape[0] else 1).to(accumulate_dtype(z.dtype))


def _flatten(f: Callable[[Tensor], Tensor], z0: Tensor) -> Callable[[Tensor], Tensor]:
    """f on rows [B, N] in the accumulation dtype; f itself sees z0's shape and dtype."""

    def flat(z: Tensor) -> Tensor:
        value = f(z.to(z0.dtype).reshape(z0.shape))
        if value.shape != z0.shape:
            raise ValueError(
                f"f must keep the state's shape {tuple(z0.shape)}; it returned {tuple(value.shape)}"
            )
        return value.reshape(z.shape).to(z.dtype)

    return flat


def _accelerated(
    f: Callable[[Tensor], Tensor],
    z0: Tensor,
    propose: Callable[[Tensor, Tensor], Tensor],
    max_iter: int,
    tol: float,
    early_exit: bool | None,
) -> tuple[Tensor, SolveInfo]:
    """The loop of the accelerated solvers: `propose` gives the next state from z and f(z).

    Such a sequence need not improve at each step, so each row keeps the f(z) of its least residual,
    and a proposal that is not finite is replaced by the plain step.
    """
    state = _rows(z0)
    floor = STATE_FLOOR * state.shape[1] ** 0.5
    best = state
    best_change = state.new_full((state.shape[0], 1), torch.inf)
    active = torch.ones_like(best_change, dtype=torch.bool)
    count = torch.zeros_like(active, dtype=torch.int32)
    failed = torch.zeros_like(active)
    if early_exit is None:
        early_exit = state.device.type == "cpu"

    for k in range(1, max_iter + 1):
        value = f(state)
        change = relative_change(value, state, floor)
        count += active
        better = active & (change < best_change)
        best = torch.where(better, value, best)
        best_change = torch.where(better, change, best_change)
        failed = failed | (active & ~torch.isfinite(change))
        active = active & torch.isfinite(change) & (change > tol)
        if k == max_iter or (early_exit and not active.any()):
            break
        with torch.autocast(state.device.type, enabled=False):
            proposal = propose(state, value)
        proposal = torch.where(torch.isfinite(proposal).all(1, keepdim=True), proposal, value)
        state = torch.where(active, proposal, state)
    residual = torch.where(failed, torch.inf, best_change)
    return best.to(z0.dtype).reshape(z0.shape), SolveInfo(residual[:, 0], count[:, 0], tol)


class _Final(torch.autograd.Function):
    """The identity on a gradient that depends on `sources`; differentiating it raises."""

    @staticmethod
    def forward(ctx, grad: Tensor, *sources: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "trying to differentiate the implicit gradient of an equilibrium twice: its derivative is not "
            "known. Leave create_graph=True away, or differentiate an unrolled loop"
        )


def final(grads: tuple[Tensor | None, ...], *sources: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients whose second derivative raises, whatever of `sources` it is asked for.

    `once_differentiable` raises only where the upstream gradient has a graph and the engine comes by:
    beside another path to the same tensor it leaves a term out without a word.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return grads
    return tuple(grad if grad is None else _Final.apply(grad, *sources) for grad in grads)


class _OnceOnly(torch.autograd.Function):
    """The identity on a z that stands for the equilibrium, with a gradient that is final."""

    @staticmethod
    def forward(ctx, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z.view_as(z)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return final((grad,), grad, *ctx.saved_tensors)[0]


class _ImplicitGradient(torch.autograd.Function):
    """The identity on z = f(z*, x), whose backward turns g into y = g + J^T y with J = df/dz at z*.

    The gradients of parameters and x then flow through the one recorded application of f.
    """

    @staticmethod
    def forward(ctx, applied: Tensor, z: Tensor, x: Tensor | None, f, solve_adjoint, *parameters: Tensor):
        # The parameters are saved for their version counters: an in-place change before the
        # backward, which evaluates f again, is then an error and not a wrong gradient.
        ctx.save_for_backward(applied, z, *(() if x is None else (x,)), *parameters)
        ctx.has_x, ctx.f, ctx.solve_adjoint = x is not None, f, solve_adjoint
        kind = applied.device.type
        ctx.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        return applied.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        recorded, z, *rest = ctx.saved_tensors
        x = rest[0].detach() if ctx.has_x else None
        kind, dtype, enabled = ctx.autocast
        with (
            torch.enable_grad(),
            torch.autocast(kind, dtype=dtype, enabled=True) if enabled else nullcontext(),
        ):
            z = z.detach().requires_grad_()
            applied = ctx.f(z, x)

        def transposed(y: Tensor) -> Tensor:
            (jy,) = torch.autograd.grad(applied, z, y.to(applied.dtype), retain_graph=True, allow_unused=True)
            return grad if jy is None else grad + jy

        with torch.no_grad():
            solved = ctx.solve_adjoint(transposed, grad)
        return *final((solved,), grad, recorded), *([None] * (4 + len(rest) - ctx.has_x))


def _once_only(z: Tensor) -> Tensor:
    return z if torch.compiler.is_compiling() else _OnceOnly.apply(z)


def implicit(
    f: Callable[[Tensor, Tensor | None], Tensor],
    x: Tensor | None,
    z0: Tensor,
    *,
    solver: str = "picard",
    max_iter: int = 50,
    tol: float | None = None,
    damping: float = 1.0,
    backward: str = "neumann",
    neumann_terms: int = 8,
    early_exit: bool | None = None,
) -> tuple[Tensor, SolveInfo]:
    """The equilibrium z = f(z, x) from z0 and its info, with an implicit gradient for x and parameters.

    `backward`: "neumann" sums `neumann_terms` + 1 terms of the series; "jfb" one (Jacobian-free);
    "exact" iterates to `tol`; "phantom" unrolls `neumann_terms` steps damped by 0.5.
    Whatever `solver`, only one application of f is recorded (phantom: its steps). Picard with max_iter=1 is
    f(z0, x), with its own gradient.
    Source: Bai et al., "Deep equilibrium models", 2019; Fung et al., "JFB", 2022; Geng et al., "On
    training implicit models", 2021.
    """
    check_choice("solver", solver, SOLVERS)
    check_solve_options(
        max_iter=max_iter, tol=tol, damping=damping, backward=backward, neumann_terms=neumann_terms
    )
    tol = default_tol(z0.dtype) if tol is None else tol
    with torch.no_grad():
        z, info = SOLVERS[solver](
            lambda z: f(z, x), z0, max_iter=max_iter, tol=tol, damping=damping, early_exit=early_exit
        )
    if not torch.is_grad_enabled():
        return z, info
    single = max_iter == 1 and solver == "picard"  # no equilibrium
    if backward == "phantom" and not single:
        for _ in range(max(neumann_terms, 1)):
            z = z + PHANTOM_DAMPING * (f(z, x) - z)
        return _once_only(z), info
    applied = f(z0 if single else z, x)
    if not applied.requires_grad:
        return z, info
    finite = torch.isfinite(info.residual).reshape(-1, *[1] * (z.ndim - 1))
    applied = torch.where(finite, applied, z)
    if single or backward == "jfb" or neumann_terms == 0 and backward == "neumann":
        return _once_only(applied), info

    def solve_adjoint(transposed: Callable[[Tensor], Tensor], grad: Tensor) -> Tensor:
        steps = neumann_terms if backward == "neumann" else EXACT_FACTOR * max_iter
        flat = _flatten(transposed, grad)
        y, new, change, count = iterate(
            lambda y, _: (flat(y),) * 2,
            _rows(grad),
            steps,
            0.0 if backward == "neumann" else tol,
            1.0,
            ADJOINT_FLOOR,
            early_exit=early_exit,
        )
        info.backward = SolveInfo(change[:, 0], count[:, 0], tol)
        return torch.where(torch.isfinite(change), new, y).to(grad.dtype).reshape(grad.shape)

    parameters = tuple(f.parameters()) if isinstance(f, nn.Module) else ()
    return _ImplicitGradient.apply(applied, z, x, f, solve_adjoint, *parameters), info


class ImplicitLayer(nn.Module):
    """The equilibrium z = f(z, x) of any f as a layer; options as `implicit`.

    f is any callable or module; z0 gives the state's shape [B, ...] and start, zeros like x by
    default. `on_failure` "warn" and "raise" look at the result and so synchronise with the device.

    >>> W, U = nn.Linear(4, 4), nn.Linear(4, 4)
    >>> _ = nn.init.orthogonal_(W.weight, 0.5)
    >>> layer = ImplicitLayer(lambda z, x: torch.tanh(W(z) + U(x)))
    >>> layer(torch.randn(3, 4)).shape
    torch.Size([3, 4])
    """

    @names_options
    def __init__(
        self,
        f: Callable[[Tensor, Tensor | None], Tensor],
        *,
        solver: str = "picard",
        max_iter: int = 50,
        tol: float | None = None,
        damping: float = 1.0,
        backward: str = "neumann",
        neumann_terms: int = 8,
        early_exit: bool | None = None,
        on_failure: str = "ignore",
    ) -> None:
        super().__init__()
        check_choice("solver", solver, SOLVERS)
        self.options = {
            "max_iter": max_iter,
            "tol": tol,
            "damping": damping,
            "backward": backward,
            "neumann_terms": neumann_terms,
        }
        check_solve_options(**self.options, on_failure=on_failure)
        self.f = f
        self.solver, self.early_exit, self.on_failure = solver, early_exit, on_failure

    def forward(
        self, x: Tensor, z0: Tensor | None = None, return_info: bool = False
    ) -> Tensor | tuple[Tensor, SolveInfo]:
        z0 = torch.zeros_like(x) if z0 is None else z0
        z, info = implicit(self.f, x, z0, solver=self.solver, early_exit=self.early_exit, **self.options)
        apply_policy(info, self.on_failure)
        return (z, info) if return_info else z

    def extra_repr(self) -> str:
        return f"solver={self.solver!r}, " + ", ".join(f"{k}={v!r}" for k, v in self.options.items())
