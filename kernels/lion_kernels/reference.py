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
# On a CPU the rows come in multiples of the first and the widths of the second, padded with zeros,
# so that a row's products do not depend on how many rows there are: for other shapes the BLAS takes
# code paths that round differently by row (one row is a matrix-vector product, odd widths have
# edges). Of the row tiles 48, 64, 96, 192 the last two gave equal bits for every shape tried.
ROW_TILE = 192
WIDTH_TILE = 16

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


def _pad(t: Tensor, *multiples: int) -> Tensor:
    """t with zeros appended up to the next multiple in each dimension; t itself where it fits."""
    missing = [-size % m for size, m in zip(t.shape, multiples, strict=True)]
    if t.device.type != "cpu" or not any(missing):
        return t
    if t.numel() == 0:  # older torch refuses to pad to an empty result
        return t.new_zeros([size + more for size, more in zip(t.shape, missing, strict=True)])
    return F.pad(t, [n for m in reversed(missing) for n in (0, m)])


def _pad_parameters(A: Tensor, W: Tensor, b: Tensor, V: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    """Zero columns and rows for states and widths that do not exist: phi(0) = 0 leaves them zero."""
    tile = WIDTH_TILE
    return _pad(A, tile, tile), _pad(W, tile, tile), _pad(b, tile), _pad(V, tile, tile), _pad(c, tile)


def _project(x: Tensor, M: Tensor, dtype: torch.dtype) -> Tensor:
    """x M^T in `dtype`, rows padded: [T, D] by [R, D] -> [ceil(T), R]; whole tiles are not copied."""
    whole = x.shape[0] - x.shape[0] % ROW_TILE if x.device.type == "cpu" else x.shape[0]
    parts = [_pad(part, ROW_TILE, WIDTH_TILE).to(dtype) @ M.T for part in (x[:whole], x[whole:]) if len(part)]
    return torch.cat(parts) if len(parts) > 1 else parts[0] if parts else x.new_zeros(0, len(M), dtype=dtype)


def linear(x: Tensor, A: Tensor, b: Tensor) -> Tensor:
    """x A^T + b in x's dtype, [T, D] -> [T, R]; on a CPU no row's bits depend on the others."""
    if x.device.type != "cpu" or not len(x):
        return F.linear(x, A.to(x.dtype), b.to(x.dtype))
    acc = accumulate_dtype(x.dtype)
    q = _project(x.contiguous(), _pad(A.to(acc), WIDTH_TILE, WIDTH_TILE), acc)
    return (q[: len(x), : len(A)] + b.to(acc)).to(x.dtype)


def relative_change(new: Tensor, old: Tensor, floor: float) -> Tensor:
    """|new - old| / (|new| + floor) per row, 2-norms: [T, R] -> [T, 1]; inf where a norm is not finite."""
    change = torch.linalg.vector_norm(new - old, dim=-1, keepdim=True)
    size = torch.linalg.vector_norm(new, dim=-1, keepdim=True)
    return torch.where(torch.isfinite(change + size), change / (size + floor), torch.inf)


def flag_rows(change: Tensor, result: Tensor) -> Tensor:
    """The relative change per row [T], inf where the row of `result` [T, D] holds NaN or Inf."""
    # Ten times as quick on a CPU as isfinite and all.
    return torch.where((result * 0).sum(1) == 0, change, torch.inf)


def unit_rows(g: Tensor) -> tuple[Tensor, Tensor]:
    """g [B, N] with rows of size near 1, and the powers of two [B, 1] they were divided by.

    An adjoint is linear and as small or large as the loss: so no square under- or overflows, and no bit
    of a mantissa changes.
    """
    size = g.abs().sum(1, keepdim=True)
    exponent = torch.frexp(size).exponent.clamp(-100, 100)
    scale = torch.where(torch.isfinite(size), torch.ldexp(torch.ones_like(size), exponent), 1.0)
    return g / scale, scale


def iterate(
    step: Callable[[Tensor, int], tuple[Tensor, Tensor]],
    state: Tensor,
    steps: int,
    tol: float,
    damping: float,
    floor: float,
    check_every: int = 1,
    early_exit: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows move by `damping` towards step(state) until their own change is within `tol`.

    A row that is done keeps its state, so later applications give it the same result again and it
    does not matter which rows it shares a batch with. `early_exit` lets the host look whether all
    rows are done, one synchronisation a step; None does so on a CPU only, where it costs nothing.

    Returns the last state, what `step` derived from it (the pre-activation), the relative change
    of the last application [T, 1] (inf where it was not finite) and the applications used [T, 1].
    """
    active = state.new_ones(state.shape[0], 1, dtype=torch.bool)
    change = state.new_full((state.shape[0], 1), torch.inf)
    count = torch.zeros_like(active, dtype=torch.int32)
    if early_exit is None:
        early_exit = state.device.type == "cpu"
    for k in range(1, steps + 1):
        new, pre = step(state, k)
        count += active
        change = torch.where(active, relative_change(new, state, floor), change)
        active = active & torch.isfinite(change)
        if k % check_every == 0:
            active = active & (change > tol)
        if k == steps or (early_exit and not active.any()):
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
    row ceased to be finite or its `out` is not; the applications of f per row [T], int32. The
    equilibrium is phi(p). A row that ceases to be finite keeps its last finite state; p is finite.
    """
    acc = accumulate_dtype(x.dtype)
    phi = ACTIVATIONS[activation].phi
    rows, (state, width) = x.shape[0], A.shape
    A, W, b, V, c = _pad_parameters(*(t.to(acc) for t in (A, W, b, V, c)))
    q = _project(x, A, acc).add_(b)

    def step(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
        p = q if k == 1 else torch.addmm(q, z, W.T)
        return phi(p), p

    floor = STATE_FLOOR * state**0.5
    z, p, change, count = iterate(step, torch.zeros_like(q), max_iter, tol, damping, floor, check_every)
    p = torch.where(torch.isfinite(change), p, z)
    change = flag_rows(change[:, 0], p)
    # A half type ends early: below its range phi does not change any more, above it the state is inf.
    largest = torch.finfo(x.dtype).max
    p = p.clamp_min(-largest).to(x.dtype)
    out = torch.addmm(c, phi(p.to(acc)), V.T)[:rows, :width]
    out = (x.to(acc) + out if residual else out).to(x.dtype)
    return (
        out.contiguous(),
        p[:rows, :state].clamp_max(largest),
        flag_rows(change[:rows], out).float(),
        count[:rows, 0].contiguous(),
    )


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
    rows, (state, width) = x.shape[0], A.shape
    A, W, _, V, _ = _pad_parameters(*(t.to(acc) for t in (A, W, A[:, 0], V, V[:, 0])))
    p = _pad(p.to(acc), ROW_TILE, WIDTH_TILE)
    slope = grad(p)
    g, scale = unit_rows(_project(grad_out, V.T, acc))

    def step(y: Tensor, k: int) -> tuple[Tensor, Tensor]:
        new = torch.addmm(g, slope * y, W)
        return new, new

    y = damping * g
    change = y.new_full((y.shape[0], 1), torch.inf)
    count = torch.zeros_like(change, dtype=torch.int32)
    if terms > 0:
        y, new, change, count = iterate(step, y, terms, tol, damping, ADJOINT_FLOOR)
        y = torch.where(torch.isfinite(change), y + damping * (new - y), y)
    t = slope * y * scale
    dx = (t @ A)[:rows, :width]
    t, z, grad_out = t[:rows, :state], phi(p[:rows, :state]), grad_out.to(acc)
    dx = (grad_out + dx if residual else dx).to(x.dtype)
    return (
        dx.contiguous(),
        t.T @ x.to(acc),
        t.T @ z,
        t.sum(0),
        grad_out.T @ z,
        grad_out.sum(0),
        change[:rows, 0].float(),
        count[:rows, 0].contiguous(),
    )
