"""Certified upper bounds of the spectral norm, and the scaling that makes a map a contraction."""

import torch
from torch import Tensor

# Gram squarings: the bound exceeds the norm by at most R**(1/256) - 1 (1.1 % at R = 16, 1.6 % at 64).
SQUARINGS = 6
# Covers the rounding of the bound itself: R * 2**SQUARINGS * eps32, spread over the root, stays below.
MARGIN = 1e-4


def spectral_norm_bound(W: Tensor, squarings: int = SQUARINGS) -> Tensor:
    """An upper bound of the largest singular value of W [R, S], never below it; differentiable.

    With G = W^T W and m = 2**squarings, ||G^m||_F^(1/(2m)) >= ||W||_2: unlike power iteration it cannot
    under-estimate. Computed in float32 or float64; the zero matrix has bound 0.

    >>> bound = spectral_norm_bound(torch.diag(torch.tensor([3.0, 1.0])))
    >>> bool(3 <= bound <= 3.01)
    True
    """
    W = W if W.dtype == torch.float64 else W.float()
    tiny = torch.finfo(W.dtype).tiny
    with torch.autocast(W.device.type, enabled=False):
        largest = W.detach().abs().amax().clamp_min(tiny)
        W = W / largest
        G = W.mT @ W if W.shape[0] >= W.shape[1] else W @ W.mT
        log_norm = torch.zeros_like(largest)
        for k in range(squarings + 1):
            size = torch.linalg.matrix_norm(G).clamp_min(tiny)
            log_norm = log_norm + size.log() / 2 ** (k + 1)
            if k < squarings:
                G = G / size
                G = G @ G
    return (log_norm.exp() * largest * (1 + MARGIN)).where(largest > tiny, 0.0)


def contraction_scale(W: Tensor, limit: float) -> Tensor:
    """The factor in (0, 1] that brings the certified norm of W [R, R] under `limit`; 1 where it is.

    A scalar in float32, or float64 for float64, in the graph of W.
    """
    norm = spectral_norm_bound(W)
    if W.dtype in (torch.float16, torch.bfloat16):
        # The rounding of the scaled entries is a matrix of at most this norm.
        norm = norm + torch.finfo(W.dtype).eps * torch.linalg.matrix_norm(W.to(norm.dtype))
    return torch.where(norm > limit, limit / norm.clamp_min(torch.finfo(norm.dtype).tiny), 1.0)


def bounded(W: Tensor, limit: float) -> Tensor:
    """W, scaled down where its certified spectral norm exceeds `limit`: [R, R] -> [R, R], W's dtype.

    A matrix within the limit is returned as it is; one that is not finite stays so, and the solver
    flags it.

    >>> small = bounded(100 * torch.eye(4), 0.8)
    >>> bool(torch.linalg.matrix_norm(small, 2) <= 0.8)
    True
    """
    scale = contraction_scale(W, limit)
    return (W.to(scale.dtype) * scale).to(W.dtype)
