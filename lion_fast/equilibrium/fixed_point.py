"""The solvers of z = f(z): Picard, Anderson and Broyden.

The first dimension of a state counts independent rows (samples); the residual, the stop and the
state kept are a row's own, so a row's result does not depend on its batch-mates: on a CPU bit for bit, where
those of f do not and a row has less than 32,768 numbers (a longer one, alone, is summed by several threads).
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lion_fast.equilibrium.solve import SolveInfo, SolveOptions, default_tol, takes_solve_options
from lion_fast.errors import check_number, check_whole
from lion_kernels.reference import STATE_FLOOR, accumulate_dtype, iterate, relative_change

# What a solver alone takes, and the check of it.
OWN_OPTIONS: dict[str, dict[str, Callable]] = {
    "picard": {},
    "anderson": {"window": check_whole, "ridge": partial(check_number, least=0)},
    "broyden": {"memory": check_whole},
}


def check_own(solver: str, **given: object) -> None:
    """Raise `OptionError` unless these values of options that `solver` alone takes are in range."""
    for name, value in given.items():
        OWN_OPTIONS[solver][name](name, value)


@takes_solve_options("max_iter", "tol", "damping")
def picard(
    f: Callable[[Tensor], Tensor],
    z0: Tensor,
    *,
    floor: float = STATE_FLOOR,
    early_exit: bool | None = None,
    **solve,
) -> tuple[Tensor, SolveInfo]:
    """z <- z + damping (f(z) - z) per row until |f(z) - z| <= tol |f(z)|; returns the last f(z).

    z0 [B, ...] in any float dtype; `max_iter=1` is one application of f. A state whose root mean square is
    under `floor` counts as that large in the residual. `early_exit` None stops early on a CPU only; True does
    so on a GPU too, at the price of one host synchronisation a step.

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

    start = rows_of(z0)
    floor = floor * max(start.shape[1], 1) ** 0.5
    z, new, change, count = iterate(step, start, max_iter, tol, damping, floor, early_exit=early_exit)
    return _result(torch.where(torch.isfinite(change), new, z), z0, change, count, tol)


@takes_solve_options("max_iter", "tol", "damping")
def anderson(
    f: Callable[[Tensor], Tensor],
    z0: Tensor,
    *,
    window: int = 5,
    ridge: float = 1e-6,
    floor: float = STATE_FLOOR,
    early_exit: bool | None = None,
    **solve,
) -> tuple[Tensor, SolveInfo]:
    """Anderson mixing over the last `window` steps, per row; arguments and result as `picard`.

    The Gram system is solved in float32 (float64 for float64) with a ridge relative to its trace, so
    half-precision states work. Pays for slow maps (rate 0.5 and above); for fast ones use `picard`.
    Source: Walker and Ni, "Anderson acceleration for fixed-point iterations", 2011.
    """
    options = SolveOptions(**solve)
    check_own("anderson", window=window, ridge=ridge)
    damping, flat = options.damping, _flatten(f, z0)
    states: list[Tensor] = []
    values: list[Tensor] = []
    gram = rows_of(z0).new_zeros(len(z0), 0, 0)  # [B, m, m]

    def propose(z: Tensor, value: Tensor) -> Tensor:
        nonlocal gram
        if len(states) == window:
            states.pop(0), values.pop(0)
            gram = gram[:, 1:, 1:]
        states.append(z)
        values.append(value)
        Z, Y = torch.stack(states, 1), torch.stack(values, 1)  # [B, m, N]
        G = Y - Z
        new = (G * G[:, -1:]).sum(-1)  # [B, m]; a matrix product would round by the size of the batch
        gram = torch.cat([torch.cat([gram, new[:, None, :-1]], 1), new[..., None]], 2)
        trace = gram.diagonal(dim1=1, dim2=2).sum(-1)[:, None, None]
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        weights, _ = torch.linalg.solve_ex(gram + ridge * trace * eye, torch.ones_like(gram[..., :1]))
        weights = weights / weights.sum(1, keepdim=True)
        return (weights * (Z + damping * G)).sum(1)

    return _accelerated(flat, z0, propose, options, floor, early_exit)


@takes_solve_options("max_iter", "tol", "damping")
def broyden(
    f: Callable[[Tensor], Tensor],
    z0: Tensor,
    *,
    memory: int = 10,
    floor: float = STATE_FLOOR,
    early_exit: bool | None = None,
    **solve,
) -> tuple[Tensor, SolveInfo]:
    """Broyden's good method on f(z) - z, per row, restarted after `memory` updates; else as `picard`.

    The inverse Jacobian is -I + U V^T with at most `memory` columns, so its cost does not grow.
    torchdeq keeps one for every iteration: `memory=max_iter` does that here.
    Source: Broyden, "A class of methods for solving nonlinear simultaneous equations", 1965.
    """
    options = SolveOptions(**solve)
    check_own("broyden", memory=memory)
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

    return _accelerated(flat, z0, propose, options, floor, early_exit)


def rows_of(z: Tensor) -> Tensor:
    """The state [B, ...] as rows [B, N] in the accumulation dtype, detached."""
    if z.ndim == 0:
        raise ValueError("the state needs a first dimension that counts its rows; got a scalar")
    default_tol(z.dtype)
    return z.detach().reshape(z.shape[0], z[0].numel() if z.shape[0] else 1).to(accumulate_dtype(z.dtype))


def version_of(t: Tensor) -> int:
    """How often t was changed in place, as far as torch counts it."""
    return 0 if torch.compiler.is_compiling() or t.is_inference() else t._version


def _flatten(f: Callable[[Tensor], Tensor], z0: Tensor) -> Callable[[Tensor], Tensor]:
    """f on rows [B, N] in the accumulation dtype; f itself sees z0's shape and dtype."""

    def flat(z: Tensor) -> Tensor:
        before = version_of(z)
        value = f(z.to(z0.dtype).reshape(z0.shape))
        if version_of(z) != before:
            raise ValueError("f must not change its z in place: the residual compares f(z) with z")
        if not isinstance(value, Tensor) or not value.is_floating_point():
            found = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"f must return a tensor of real floating-point numbers; it returned {found}")
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
    floor: float,
    early_exit: bool | None,
) -> tuple[Tensor, SolveInfo]:
    """The loop of the accelerated solvers: `propose` gives the next state from z and f(z).

    Such a sequence need not improve at each step, so each row keeps the f(z) of its least residual,
    and a proposal that is not finite is replaced by the plain step.
    """
    max_iter, tol = options.max_iter, options.tolerance(z0.dtype)
    state = rows_of(z0)
    floor = floor * max(state.shape[1], 1) ** 0.5
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
    return _result(best, z0, residual, count, tol)


def _result(z: Tensor, z0: Tensor, residual: Tensor, count: Tensor, tol: float) -> tuple[Tensor, SolveInfo]:
    """The state in z0's shape and dtype with its record; one that overflows this dtype is not finite."""
    z = z.to(z0.dtype)
    residual = torch.where(torch.isfinite(z).all(1), residual[:, 0], torch.inf)
    return z.reshape(z0.shape), SolveInfo(residual, count[:, 0], tol)


SOLVERS = {"picard": picard, "anderson": anderson, "broyden": broyden}
