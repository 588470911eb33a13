"""The operators in plain torch: the oracle of every kernel, and what runs where Triton does not.

All of them iterate in the R dimensions of the state. Products and state are float32, or float64
for float64 tokens; only the tokens, `out` and the saved pre-activation keep the tokens' dtype.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Root mean square under which a state counts as this large in the relative residual.
STATE_FLOOR = 1e-3
# The same for adjoint states, whose size is the loss's: only a true zero is floored.
ADJOINT_FLOOR = 1e-30
# Rows are padded to this many, so that a row's products do not depend on how many rows there are:
# below it the BLAS takes other code paths (a matrix-vector product for one row) that round differently.
ROW_TILE = 64

SQRT_HALF = 0.7071067811865476
INV_SQRT_2PI = 0.3989422804014327
SQRT_2_OVER_PI = 0.7978845608028654
GELU_CUBIC = 0.044715


def _gelu_grad(p: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(p * SQRT_HALF)) + p * INV_SQRT_2PI * torch.exp(-0.5 * p * p)


def _gelu_tanh_grad(p: Tensor) -> Tensor:
    t = torch.tanh(SQRT_2_OVER_PI * (p + GELU_CUBIC * p**3))
    return 0.5 * (1 + t) + 0.5 * p * (1 - t * t) * SQRT_2_OVER_PI * (1 + 3 * GELU_CUBIC * p * p)


def _silu_grad(p: Tensor) -> Tensor:
    s = torch.sigmoid(p)
    return s * (1 + p * (1 - s))


class Activation(NamedTuple):
    """An activation, its derivative and an upper bound of its Lipschitz constant."""

    phi: Callable[[Tensor], Tensor]
    grad: Callable[[Tensor], Tensor]
    lipschitz: float


# The maxima of |phi'| rounded up: gelu at sqrt(2), its tanh form near 1.4, silu near 2.4.
ACTIVATIONS = {
    "relu": Activation(F.relu, lambda p: (p > 0).to(p.dtype), 1.0),
    "tanh": Activation(torch.tanh, lambda p: 1 - torch.tanh(p) ** 2, 1.0),
    "gelu": Activation(F.gelu, _gelu_grad, 1.12891),
    "gelu_tanh": Activation(lambda p: F.gelu(p, approximate="tanh"), _gelu_tanh_grad, 1.12901),
    "silu": Activation(F.silu, _silu_grad, 1.09984),
}


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of state and sums for tokens of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _pad_rows(x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 0, -x.shape[0] % ROW_TILE)) if x.device.type == "cpu" else x


def _relative_change(new: Tensor, old: Tensor, floor: float) -> Tensor:
    """|new - old| / (|new| + floor) per row, root mean squares: [T, R] -> [T, 1]; not finite is inf."""
    scale = new.shape[-1] ** 0.5
    change = torch.linalg.vector_norm(new - old, dim=-1, keepdim=True)
    size = torch.linalg.vector_norm(new, dim=-1, keepdim=True)
    return torch.nan_to_num(change / (size + floor * scale), nan=torch.inf)


def _iterate(
    step: Callable[[Tensor, int], tuple[Tensor, Tensor]],
    state: Tensor,
    steps: int,
    tol: float,
    damping: float,
    floor: float,
    check_every: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows move by `damping` towards step(state) until their own change is within `tol`.

    A row that is done keeps its state, so later applications give it the same result again and it
    does not matter which rows it shares a batch with. The host looks at the rows only on a CPU.

    Returns the last state, what `step` derived from it (the pre-activation), the relative change
    of the last application [T, 1] (inf where it was not finite) and the applications used [T, 1].
    """
    active = state.new_ones(state.shape[0], 1, dtype=torch.bool)
    change = state.new_full((state.shape[0], 1), torch.inf)
    count = torch.zeros_like(active, dtype=torch.int32)
    on_host = state.device.type == "cpu"
    for k in range(1, steps + 1):
        new, pre = step(state, k)
        count += active
        change = torch.where(active, _relative_change(new, state, floor), change)
        active = active & torch.isfinite(change)
        if k % check_every == 0:
            active = active & (change > tol)
        if k == steps or (on_host and not active.any()):
            break
        state = torch.where(active, state + damping * (new - state), state)
    return state, pre, change, count


def solve(
    x: Tensor,
    A: Tensor,
    W: Tensor,
    b: Tensor,
    V: Tensor,
    c: Tensor,
    activation: str,
    max_iter: int,
    tol: float,
    damping: float,
    residual: bool,
    check_every: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The equilibrium z = phi(z W^T + x A^T + b) from z = 0, read out as (x +) z V^T + c.

    x [T, D], A [R, D], W [R, R] already masked and bounded, b [R], V [D, R], c [D].
    Returns out [T, D] and the pre-activation p [T, R] of the last application, both in x's dtype;
    the relative residual |f(z) - z| / (|f(z)| + 1e-3) of the un-damped map per row [T], inf where a
    row ceased to be finite; the applications of f per row [T], int32. The equilibrium is phi(p).
    A row that ceases to be finite keeps its last finite state.
    """
    acc = accumulate_dtype(x.dtype)
    phi = ACTIVATIONS[activation].phi
    A, W, b, V, c = (t.to(acc) for t in (A, W, b, V, c))
    rows = x.shape[0]
    q = torch.addmm(b, _pad_rows(x).to(acc), A.T)

    def step(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
        p = q if k == 1 else torch.addmm(q, z, W.T)
        return phi(p), p

    z, p, change, count = _iterate(
        step, torch.zeros_like(q), max_iter, tol, damping, STATE_FLOOR, check_every
    )
    p = torch.where(torch.isfinite(change), p, z).to(x.dtype)
    out = torch.addmm(c, phi(p.to(acc)), V.T)[:rows]
    out = x.to(acc) + out if residual else out
    return out.to(x.dtype), p[:rows].contiguous(), change[:rows, 0].float(), count[:rows, 0].contiguous()


def adjoint(
    grad_out: Tensor,
    x: Tensor,
    p: Tensor,
    A: Tensor,
    W: Tensor,
    V: Tensor,
    activation: str,
    terms: int,
    tol: float,
    damping: float,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `solve` by the adjoint iteration y <- y + damping (g + (phi'(p) y) W - y).

    It starts at y = damping g with g = grad_out V, makes at most `terms` steps and, where tol > 0,
    stops per row as `solve` does. damping 1 is the Neumann series (terms 0: Jacobian-free),
    damping < 1 the phantom gradient of terms + 1 damped steps.
    Returns dx [T, D] in x's dtype; dA, dW, db, dV, dc in the accumulation dtype; residual and steps
    per row as `solve`, the residual measured at the last step made (inf where none was).
    """
    acc = accumulate_dtype(x.dtype)
    phi, grad, _ = ACTIVATIONS[activation]
    A, W, V = (t.to(acc) for t in (A, W, V))
    rows = x.shape[0]
    grad_out, x_rows, p = (_pad_rows(t).to(acc) for t in (grad_out, x, p))
    slope = grad(p)
    g = grad_out @ V

    def step(y: Tensor, k: int) -> tuple[Tensor, Tensor]:
        new = torch.addmm(g, slope * y, W)
        return new, new

    y = damping * g
    change = y.new_full((y.shape[0], 1), torch.inf)
    count = torch.zeros_like(change, dtype=torch.int32)
    if terms > 0:
        y, new, change, count = _iterate(step, y, terms, tol, damping, ADJOINT_FLOOR, 1)
        y = torch.where(torch.isfinite(change), y + damping * (new - y), y)
    t = slope * y
    # Padding rows have a zero gradient, so t is zero there; their state phi(b) meets only zeros.
    z = phi(p)
    dx = (t @ A)[:rows]
    dx = grad_out[:rows] + dx if residual else dx
    return (
        dx.to(x.dtype),
        t.T @ x_rows,
        t.T @ z,
        t.sum(0),
        grad_out.T @ z,
        grad_out.sum(0),
        change[:rows, 0].float(),
        count[:rows, 0].contiguous(),
    )
