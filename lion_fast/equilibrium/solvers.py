"""Fixed points of any f, and the implicit gradient through them.

The first dimension of a state counts independent rows (samples); the residual, the stop and the
state kept are a row's own, so a row's result does not depend on its batch-mates.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from lion_fast.equilibrium.fixed_point import (
    OWN_OPTIONS,
    SOLVERS,
    anderson,
    broyden,
    check_own,
    picard,
    rows_of,
    version_of,
)
from lion_fast.equilibrium.solve import (
    EXACT_FACTOR,
    PHANTOM_DAMPING,
    SolveInfo,
    SolveOptions,
    Solving,
    apply_policy,
    record_backward,
    takes_solve_options,
)
from lion_fast.errors import OptionError, check_choice, refuse_unknown
from lion_kernels.reference import ADJOINT_FLOOR, iterate, unit_rows

__all__ = ["ImplicitLayer", "anderson", "broyden", "implicit", "picard"]

# Anderson and Broyden find equilibria of maps that do not contract, where no series converges.
DEFAULT_BACKWARD = {"picard": "neumann", "anderson": "exact", "broyden": "exact"}


def refuse_transforms() -> None:
    """Raise RuntimeError inside a transform of torch.func, which no equilibrium can be part of."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "an equilibrium cannot be part of torch.vmap or torch.func (grad, vjp, jacrev, ...): give it the "
            "whole batch, and take its gradient by torch.autograd (backward, grad, functional.jacobian)"
        )


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


def series(
    step: Callable[[Tensor], Tensor],
    g: Tensor,
    terms: int,
    damping: float,
    tol: float,
    rounding: float,
    early_exit: bool | None = None,
) -> tuple[Tensor, SolveInfo]:
    """y = u_0 + ... + u_terms, u_0 = damping g, u_{k+1} = u_k + damping (J^T u_k - u_k), and its record.

    step(y) is g + J^T y, rows [B, N]. The record's `grows` compares the last two terms, and without terms
    the first one left away with u_0. A change within `tol` or a few times `rounding`, the relative rounding
    of J^T, counts as none.
    """
    sizes = [torch.linalg.vector_norm(g, dim=1)]

    def counted(y: Tensor, _: int) -> tuple[Tensor, Tensor]:
        new = step(y)
        sizes.append(torch.linalg.vector_norm(new - y, dim=1))
        return new, new

    y, new, change, count = iterate(
        counted, damping * g, max(terms, 1), 0.0, damping, ADJOINT_FLOOR, early_exit=early_exit
    )
    change = change[:, 0]
    if terms:
        new = new if damping == 1 else y + damping * (new - y)
        y = torch.where(torch.isfinite(change)[:, None], new, y)
    grows = ~(sizes[-1] < sizes[-2]) & torch.isfinite(change) & (change > max(tol, 4 * rounding))
    return y, SolveInfo(change, count[:, 0] if terms else 0 * count[:, 0], tol, grows=grows)


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
        rounding = max(torch.finfo(t).eps for t in (z.dtype, applied.dtype, dtype if enabled else z.dtype))

        with torch.no_grad():
            g, scale = unit_rows(rows_of(grad))

            def step(y: Tensor) -> Tensor:
                if not applied.requires_grad:  # f does not look at z
                    return g
                y = (scale * y).reshape(z.shape).to(applied.dtype)
                (jy,) = torch.autograd.grad(applied, z, y, retain_graph=True, allow_unused=True)
                return g if jy is None else g + rows_of(jy) / scale

            solved = scale * ctx.solve_adjoint(step, g, rounding)
            solved = solved.reshape(grad.shape).to(grad.dtype)
        return *final((solved,), grad, recorded), *([None] * (4 + len(rest) - ctx.has_x))


def _leaves(applied: Tensor, x: Tensor | None) -> tuple[Tensor, ...]:
    """The leaves that `applied` was made of, but for those behind x: what a plain function f closes over."""
    seen, found, nodes = {None if x is None else x.grad_fn, None}, [], [applied.grad_fn]
    while nodes and not torch.compiler.is_compiling():
        node = nodes.pop()
        if node not in seen:
            seen.add(node)
            found += [node.variable] if type(node).__name__ == "AccumulateGrad" else []
            nodes += [further for further, _ in node.next_functions]
    return tuple(found)


def _once_only(z: Tensor) -> Tensor:
    return z if torch.compiler.is_compiling() else _OnceOnly.apply(z)


def _own_options(solver: str, given: Mapping[str, float] | None) -> dict[str, float]:
    """`given` as a dict, once every name in it is an option of `solver` alone and its value is in range."""
    check_choice("solver", solver, SOLVERS)
    given = {} if given is None else given
    if not isinstance(given, Mapping):
        raise OptionError(f"solver_options must be names and values, or None; got {given!r}")
    refuse_unknown(given, OWN_OPTIONS[solver], f"option of solver {solver!r}")
    check_own(solver, **given)
    return dict(given)


def _solve_options(solver: str, given: Mapping[str, object]) -> SolveOptions:
    """Options with the defaults of a solver: a series beside one that needs no contraction is looked at."""
    backward = given.get("backward", DEFAULT_BACKWARD[solver])
    watched = solver != "picard" and backward != "exact" and given.get("max_iter") != 1
    on_failure = "warn" if watched else "ignore"
    return SolveOptions(**{"backward": backward, "on_failure": on_failure} | given)


@takes_solve_options("max_iter", "tol", "damping", "backward", "neumann_terms", "on_failure")
def implicit(
    f: Callable[[Tensor, Tensor | None], Tensor],
    x: Tensor | None,
    z0: Tensor,
    *,
    solver: str = "picard",
    solver_options: Mapping[str, float] | None = None,
    early_exit: bool | None = None,
    **solve,
) -> tuple[Tensor, SolveInfo]:
    """The equilibrium z = f(z, x) from z0 and its info, with an implicit gradient for x and parameters.

    `solver`: "picard", "anderson" or "broyden"; `solver_options`: what it alone takes, such as
    {"window": 5, "ridge": 1e-6} or {"memory": 10}. max_iter=1 is f(z0, x), with its own gradient.

    `backward`, of y = g + J^T y with J = df/dz at the equilibrium: "exact" solves it to `tol` by the same
    solver, in at most 4 `max_iter` steps; "neumann" sums `neumann_terms` + 1 terms of its series; "jfb" one
    (Jacobian-free); "phantom" is the gradient of `neumann_terms` steps damped by 0.5. The default is
    "neumann" for Picard and "exact" for Anderson and Broyden: these find equilibria where f does not
    contract, and there the series of the other modes need not converge. `info.backward`, there after the
    backward, tells it (`SolveInfo.grows`), and `on_failure` does so in the backward as in the forward: its
    default is "warn" for such a series beside Anderson or Broyden, and "ignore" else.

    Whatever `solver`, only one application of f is recorded. Not for torch.vmap or torch.func.
    Source: Bai et al., "Deep equilibrium models", 2019; Fung et al., "JFB", 2022; Geng et al., "On
    training implicit models", 2021.

    >>> x = torch.ones(2, 3)
    >>> z, info = implicit(lambda z, x: x - 1.5 * z.tanh(), x, torch.zeros_like(x), solver="broyden")
    >>> info.reason
    'converged'
    """
    own, options = _own_options(solver, solver_options), _solve_options(solver, solve)
    z, info = solve_implicit(f, x, z0, options, options.neumann_terms, solver, early_exit, own)
    apply_policy(info, options.on_failure)
    return z, info


def solve_implicit(
    f: Callable[[Tensor, Tensor | None], Tensor],
    x: Tensor | None,
    z0: Tensor,
    options: SolveOptions,
    terms: int,
    solver: str = "picard",
    early_exit: bool | None = None,
    own: Mapping[str, float] | None = None,
    *,
    return_info: bool = True,
    hint: Callable[[], str] = str,
) -> tuple[Tensor, SolveInfo]:
    """`implicit` by checked options, with `terms` in place of their `neumann_terms`.

    `on_failure` and `hint` are for the backward here; the caller applies the policy to the forward. A "jfb"
    gradient is looked at, by one product with J, where `return_info` or `on_failure` asks for it.
    """
    refuse_transforms()
    tol, backward, on_failure = options.tolerance(z0.dtype), options.backward, options.on_failure
    solve = partial(SOLVERS[solver], tol=tol, damping=options.damping, early_exit=early_exit, **own or {})
    if x is not None and not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor or None, and f may close over more; got {type(x).__name__}")
    before = 0 if x is None else version_of(x)
    with torch.no_grad():
        z, info = solve(lambda z: f(z, x), z0, max_iter=options.max_iter)
    if x is not None and version_of(x) != before:
        raise ValueError("f must not change its x in place: every application of f reads it")
    if not torch.is_grad_enabled():
        return z, info
    single, compiling = options.max_iter == 1, torch.compiler.is_compiling()  # single: no equilibrium
    watch = (return_info or on_failure != "ignore") and not compiling
    applied = f(z0 if single else z, x).to(z.dtype)
    if not applied.requires_grad:
        return z, info
    finite = torch.isfinite(info.residual) & torch.isfinite(rows_of(applied)).all(1)
    applied = torch.where(finite.reshape(-1, *[1] * (z.ndim - 1)), applied, z)
    terms = {"neumann": terms, "jfb": 0, "phantom": max(terms, 1) - 1}.get(backward, 0)
    damping = PHANTOM_DAMPING if backward == "phantom" else 1.0
    plain = backward == "jfb" or backward == "neumann" and terms == 0
    if single or plain and not watch:
        return _once_only(applied), info
    if (
        backward == "phantom" and compiling
    ):  # a backward that evaluates f cannot be traced: the steps themselves
        for _ in range(terms + 1):
            z = z + PHANTOM_DAMPING * (f(z, x) - z)
        return z, info

    def solve_adjoint(step: Callable[[Tensor], Tensor], g: Tensor, rounding: float) -> Tensor:
        if backward == "exact":
            y, record = solve(step, g, max_iter=EXACT_FACTOR * options.max_iter, floor=ADJOINT_FLOOR)
        else:
            y, record = series(step, g, terms, damping, tol, rounding, early_exit)
        record_backward(info, record, g, on_failure, hint)
        return y

    parameters = tuple(f.parameters()) if isinstance(f, nn.Module) else _leaves(applied, x)
    return _ImplicitGradient.apply(applied, z, x, f, solve_adjoint, *parameters), info


class ImplicitLayer(Solving, nn.Module):
    """The equilibrium z = f(z, x) of any f as a layer; options as `implicit`.

    f is any callable or module; z0 gives the state's shape [B, ...] and start, zeros like x by
    default. `on_failure` "warn" and "raise" look at the result, and in the backward at the gradient, and so
    synchronise with the device.

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
        solver_options: Mapping[str, float] | None = None,
        early_exit: bool | None = None,
        **solve,
    ) -> None:
        super().__init__()
        self.solver_options = _own_options(solver, solver_options)
        self.f, self.solve = f, _solve_options(solver, solve)
        self.solver, self.early_exit = solver, early_exit

    def forward(
        self, x: Tensor, z0: Tensor | None = None, return_info: bool = False
    ) -> Tensor | tuple[Tensor, SolveInfo]:
        z0 = torch.zeros_like(x) if z0 is None else z0
        z, info = solve_implicit(
            self.f, x, z0, self.solve, self.solve.neumann_terms, self.solver, self.early_exit,
            self.solver_options, return_info=return_info, hint=self._hint,
        )  # fmt: skip
        apply_policy(info, self.on_failure, self._hint)
        return (z, info) if return_info else z

    def _hint(self) -> str:
        other = ", or take solver='anderson' or 'broyden'" if self.solver == "picard" else ""
        return f"Raise max_iter or tol, make the map contract more{other}."

    def extra_repr(self) -> str:
        names = ("solver", "max_iter", "tol", "damping", "backward", "neumann_terms")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
