"""Fixed points of any f: Picard, Anderson and Broyden, and the implicit gradient.

The first dimension of a state counts independent rows (samples); the residual, the stop and the
state kept are a row's own, so a row's result does not depend on its batch-mates.
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from lion_fast.equilibrium.solve import (
    EXACT_FACTOR,
    PHANTOM_DAMPING,
    SolveInfo,
    SolveOptions,
    Solving,
    apply_policy,
    default_tol,
    takes_solve_options,
)
from lion_fast.errors import OptionError, check_choice
from lion_kernels.reference import ADJOINT_FLOOR, STATE_FLOOR, accumulate_dtype, iterate, relative_change


@takes_solve_options("max_iter", "tol", "damping")
def picard(
    f: Callable[[Tensor], Tensor],
    z0: Tensor,
    *,
    early_exit: bool | None = None,
    **solve,
) -> tuple[Tensor, SolveInfo]:
    """z <- z + damping (f(z) - z) per row until |f(z) - z| <= tol |f(z)|; returns the last f(z).

    z0 [B, ...] in any float dtype; `max_iter=1` is one application of f. `early_exit` None stops
    early on a CPU only; True does so on a GPU too, at the price of one host synchronisation a step.

    >>> z, info = picard(lambda z: 0.5 * z + 1, torch.zeros(3, 4))
    >>> bool((z - 2).abs().max() < 1e-3), info.reason
    (True, 'converged')
    """
    options = SolveOptions(**solve)
    max_iter, damping, tol = options.max_iter, options.damping, options.tolerance(z0.dtype)
    flat = _flatten(f, z0)

    def step(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
        new = flat(z)
        return new, new

    start = _rows(z0)
    floor = STATE_FLOOR * start.shape[1] ** 0.5
    z, new, change, count = iterate(step, start, max_iter, tol, damping, floor, early_exit=early_exit)
    z = torch.where(torch.isfinite(change), new, z)
    return z.to(z0.dtype).reshape(z0.shape), SolveInfo(change[:, 0], count[:, 0], tol)


@takes_solve_options("max_iter", "tol", "damping")
def anderson(
    f: Callable[[Tensor], Tensor],
    z0: Tensor,
    *,
    window: int = 5,
    ridge: float = 1e-6,
    early_exit: bool | None = None,
    **solve,
) -> tuple[Tensor, SolveInfo]:
    """Anderson mixing over the last `window` steps, per row; arguments and result as `picard`.

    The Gram system is solved in float32 (float64 for float64) with a ridge relative to its trace, so
    half-precision states work. Pays for slow maps (rate 0.5 and above); for fast ones use `picard`.
    Source: Walker and Ni, "Anderson acceleration for fixed-point iterations", 2011.
    """
    options = SolveOptions(**solve)
    if window < 1:
        raise OptionError(f"window must be at least 1; got {window!r}")
    damping, flat = options.damping, _flatten(f, z0)
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

    return _accelerated(flat, z0, propose, options, early_exit)


@takes_solve_options("max_iter", "tol", "damping")
def broyden(
    f: Callable[[Tensor], Tensor],
    z0: Tensor,
    *,
    memory: int = 10,
    early_exit: bool | None = None,
    **solve,
) -> tuple[Tensor, SolveInfo]:
    """Broyden's good method on f(z) - z, per row, restarted after `memory` updates; else as `picard`.

    The inverse Jacobian is -I + U V^T with at most `memory` columns, so its cost does not grow.
    Source: Broyden, "A class of methods for solving nonlinear simultaneous equations", 1965.
    """
    options = SolveOptions(**solve)
    if memory < 1:
        raise OptionError(f"memory must be at least 1; got {memory!r}")
    damping, flat = options.damping, _flatten(f, z0)
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

    return _accelerated(flat, z0, propose, options, early_exit)


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
    options: SolveOptions,
    early_exit: bool | None,
) -> tuple[Tensor, SolveInfo]:
    """The loop of the accelerated solvers: `propose` gives the next state from z and f(z).

    Such a sequence need not improve at each step, so each row keeps the f(z) of its least residual,
    and a proposal that is not finite is replaced by the plain step.
    """
    max_iter, tol = options.max_iter, options.tolerance(z0.dtype)
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


@takes_solve_options("max_iter", "tol", "damping", "backward", "neumann_terms")
def implicit(
    f: Callable[[Tensor, Tensor | None], Tensor],
    x: Tensor | None,
    z0: Tensor,
    *,
    solver: str = "picard",
    early_exit: bool | None = None,
    **solve,
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
    options = SolveOptions(**solve)
    return solve_implicit(f, x, z0, options, options.neumann_terms, solver, early_exit)


def solve_implicit(
    f: Callable[[Tensor, Tensor | None], Tensor],
    x: Tensor | None,
    z0: Tensor,
    options: SolveOptions,
    terms: int,
    solver: str = "picard",
    early_exit: bool | None = None,
) -> tuple[Tensor, SolveInfo]:
    """`implicit` by checked options, with `terms` in place of their `neumann_terms`."""
    max_iter, backward, tol = options.max_iter, options.backward, options.tolerance(z0.dtype)
    with torch.no_grad():
        z, info = SOLVERS[solver](
            lambda z: f(z, x),
            z0,
            max_iter=max_iter,
            tol=tol,
            damping=options.damping,
            early_exit=early_exit,
        )
    if not torch.is_grad_enabled():
        return z, info
    single = max_iter == 1 and solver == "picard"  # no equilibrium
    if backward == "phantom" and not single:
        for _ in range(max(terms, 1)):
            z = z + PHANTOM_DAMPING * (f(z, x) - z)
        return _once_only(z), info
    applied = f(z0 if single else z, x)
    if not applied.requires_grad:
        return z, info
    finite = torch.isfinite(info.residual).reshape(-1, *[1] * (z.ndim - 1))
    applied = torch.where(finite, applied, z)
    if single or backward == "jfb" or terms == 0 and backward == "neumann":
        return _once_only(applied), info

    def solve_adjoint(transposed: Callable[[Tensor], Tensor], grad: Tensor) -> Tensor:
        steps = terms if backward == "neumann" else EXACT_FACTOR * max_iter
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


class ImplicitLayer(Solving, nn.Module):
    """The equilibrium z = f(z, x) of any f as a layer; options as `implicit`.

    f is any callable or module; z0 gives the state's shape [B, ...] and start, zeros like x by
    default. `on_failure` "warn" and "raise" look at the result and so synchronise with the device.

    >>> W, U = nn.Linear(4, 4), nn.Linear(4, 4)
    >>> _ = nn.init.orthogonal_(W.weight, 0.5)
    >>> layer = ImplicitLayer(lambda z, x: torch.tanh(W(z) + U(x)))
    >>> layer(torch.randn(3, 4)).shape
    torch.Size([3, 4])
    """

    @takes_solve_options("max_iter", "tol", "damping", "backward", "neumann_terms", "on_failure")
    def __init__(
        self,
        f: Callable[[Tensor, Tensor | None], Tensor],
        *,
        solver: str = "picard",
        early_exit: bool | None = None,
        **solve,
    ) -> None:
        super().__init__()
        check_choice("solver", solver, SOLVERS)
        self.f, self.solve = f, SolveOptions(**solve)
        self.solver, self.early_exit = solver, early_exit

    def forward(
        self, x: Tensor, z0: Tensor | None = None, return_info: bool = False
    ) -> Tensor | tuple[Tensor, SolveInfo]:
        z0 = torch.zeros_like(x) if z0 is None else z0
        terms = self.solve.neumann_terms
        z, info = solve_implicit(self.f, x, z0, self.solve, terms, self.solver, self.early_exit)
        apply_policy(info, self.on_failure)
        return (z, info) if return_info else z

    def extra_repr(self) -> str:
        names = ("solver", "max_iter", "tol", "damping", "backward", "neumann_terms")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
