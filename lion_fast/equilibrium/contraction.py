"""Certified upper bounds of the spectral norm, and the scaling that makes a map a contraction."""

from collections.abc import Callable

import torch
from torch import Tensor

from lion_fast.equilibrium.solve import check_tensor, default_tol
from lion_fast.errors import check_number

# Gram squarings: the bound exceeds the norm by at most R**(1/256) - 1 (1.1 % at R = 16, 1.6 % at 64).
SQUARINGS = 6
# Covers the rounding of the bound itself: R * 2**SQUARINGS * eps32, spread over the root, stays below.
MARGIN = 1e-4


def spectral_norm_bound(W: Tensor, squarings: int = SQUARINGS) -> Tensor:
    """An upper bound of the largest singular value of W [R, S], never below it; differentiable.

    With G = W^T W and m = 2**squarings, ||G^m||_F^(1/(2m)) >= ||W||_2: unlike power iteration it cannot
    under-estimate. Computed in float32 or float64; the zero matrix has bound 0, one with NaN or Inf NaN.

    >>> bound = spectral_norm_bound(torch.diag(torch.tensor([3.0, 1.0])))
    >>> bool(3 <= bound <= 3.01)
    True
    """
    check_tensor(W, "W")
    if W.ndim != 2 or 0 in W.shape:
        raise ValueError(f"W must be a matrix with entries; got shape {tuple(W.shape)}")
    W = W if W.dtype == torch.float64 else W.float()
    tiny = torch.finfo(W.dtype).tiny
    with torch.autocast(W.device.type, enabled=False):
        largest = W.detach().abs().amax()
        W = W / largest.clamp_min(tiny)
        G = W.mT @ W if W.shape[0] >= W.shape[1] else W @ W.mT
        log_norm = torch.zeros_like(largest)
        for k in range(squarings + 1):
            size = torch.linalg.matrix_norm(G).clamp_min(tiny)
            log_norm = log_norm + size.log() / 2 ** (k + 1)
            if k < squarings:
                G = G / size
                G = G @ G
    return (log_norm.exp() * largest.clamp_min(tiny) * (1 + MARGIN)).where(largest != 0, 0.0)


def contraction_scale(
    W: Tensor, limit: float, dtype: torch.dtype | None = None, unit: Tensor | float = 1.0
) -> Tensor:
    """The factor that brings the certified norm of unit W [R, R] under `limit`; `unit` where it is.

    A scalar in float32, or float64 for float64, in the graph of W; NaN where the norm is not finite.
    dtype: that of the scaled matrix, W's by default, whose rounding is within the limit too.
    unit: what W is given in.
    """
    norm = spectral_norm_bound(W)

    def rounded() -> Tensor:
        frobenius = torch.linalg.matrix_norm(W.to(norm.dtype))
        return frobenius.where(torch.isfinite(frobenius), norm * min(W.shape) ** 0.5)

    return scale_within(norm, limit, dtype or W.dtype, rounded, W.numel() ** 0.5, unit)


def scale_within(
    norm: Tensor,
    limit: float,
    dtype: torch.dtype,
    rounded: Callable[[], Tensor],
    ones: float,
    unit: Tensor | float = 1.0,
) -> Tensor:
    """`contraction_scale` of a map with entries in `dtype` by the bound of its norm.

    Rounding an entry changes it by eps of itself: a map whose norm is at most eps `rounded()`. Below the
    normal numbers it does by the least number, and `ones` is that norm where all are one.
    """
    about = torch.finfo(dtype)
    if about.bits == 16:
        norm = norm + about.eps * rounded()
        least = about.tiny * about.eps / 2 * ones
        if least > MARGIN / 4 * limit:
            limit = max(limit - least, 0.0)
    over = limit / norm.clamp_min(torch.finfo(norm.dtype).tiny)
    scale = torch.where(norm * unit > limit, over, unit)
    return torch.where(torch.isfinite(norm), scale, torch.nan)


def bounded(W: Tensor, limit: float) -> Tensor:
    """W, scaled down where its certified spectral norm exceeds `limit`: [R, R] -> [R, R], W's dtype.

    A matrix within the limit is returned as it is. One that holds NaN or Inf, or whose norm is beyond the
    floats, becomes NaN, and the solver flags it.

    >>> small = bounded(100 * torch.eye(4), 0.8)
    >>> bool(torch.linalg.matrix_norm(small, 2) <= 0.8)
    True
    """
    check_number("limit", limit, above=0)
    scale = contraction_scale(W, limit)
    return (W.to(scale.dtype) * scale).to(W.dtype)


def bounded_product(A: Tensor, V: Tensor, limit: float, *, gradient_of_V: bool = True) -> Tensor:
    """`bounded` of A V, for A [R, D] and V [D, R] of any size: [R, R] in A's dtype.

    The product is made in float32 (float64 for float64) of factors near one, so that it does not leave the
    range. Without `gradient_of_V` the product has none with respect to V, the scale has.

    >>> A = torch.full((2, 3), 6e4, dtype=torch.float16)
    >>> bounded_product(A, A.T, 0.8).dtype, bool(bounded_product(A, A.T, 0.8)[0, 0] > 0.39)
    (torch.float16, True)
    """
    dtype = A.dtype
    default_tol(dtype)
    (A, a), (V, v) = (_near_one(t if t.dtype == torch.float64 else t.float()) for t in (A, V))
    with torch.autocast(A.device.type, enabled=False):
        W = A @ V
        scale = contraction_scale(W, limit, dtype, (a * v).clamp_max(torch.finfo(W.dtype).max))
        return ((W if gradient_of_V else A @ V.detach()) * scale).to(dtype)


def _near_one(t: Tensor) -> tuple[Tensor, Tensor]:
    """t / s and s, the power of two for which the largest entry is from 1 to 2; exact."""
    size = t.detach().abs().amax().clamp_min(torch.finfo(t.dtype).tiny)
    power = size / 2 / torch.frexp(size).mantissa
    return t / power, power
