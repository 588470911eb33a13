"""Problems for the kernels, and what they are compared with: float64, and torch in the tokens' dtype."""

import os

import torch
from torch import Tensor

from lion_kernels import reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
# The interpreter multiplies the bit patterns of bfloat16 operands.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


def problem(
    rows: int, width: int, state: int, dtype=torch.float32, *, gamma: float = 0.8, seed: int = 0
) -> list[Tensor]:
    """x, A, W, b, V, c with |W| = gamma, of such scales that tokens and read-out weigh alike."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    W = draw(state, state)
    W *= gamma / torch.linalg.matrix_norm(W, 2)
    A, V = draw(state, width) / width**0.5, draw(width, state) / state**0.5
    tensors = (draw(rows, width), A, W, 0.3 * draw(state), V, 0.3 * draw(width))
    return [t.to(dtype).to(DEVICE) for t in tensors]


def double(*tensors: Tensor) -> list[Tensor]:
    return [t.double() for t in tensors]


def torch_solve(x, A, W, b, V, c, activation, steps, damping, residual) -> tuple[Tensor, Tensor]:
    """out and p after exactly `steps` applications, every operation in x's dtype."""
    phi = reference.ACTIVATIONS[activation].phi
    q = x @ A.T + b
    z = torch.zeros_like(q)
    for _ in range(steps):
        p = z @ W.T + q
        z = z + damping * (phi(p) - z)
    out = phi(p) @ V.T + c
    return (x + out if residual else out), p


def torch_adjoint(grad_out, x, p, A, W, V, activation, terms, damping, residual) -> tuple[Tensor, ...]:
    """dx, dA, dW, db, dV, dc after exactly `terms` steps, every operation in x's dtype."""
    phi, grad, _ = reference.ACTIVATIONS[activation]
    g = grad_out @ V
    y = damping * g
    slope = grad(p)
    for _ in range(terms):
        y = y + damping * (g + (slope * y) @ W - y)
    t, z = slope * y, phi(p)
    dx = t @ A + grad_out if residual else t @ A
    # Sums as products with ones: torch's own pairwise sum is more exact than the dtype demands.
    ones = t.new_ones(1, t.shape[0])
    return dx, t.T @ x, t.T @ z, (ones @ t)[0], grad_out.T @ z, (ones @ grad_out)[0]


def error(got: Tensor, exact: Tensor) -> float:
    return (got.double() - exact.double()).abs().max().item() if exact.numel() else 0.0


def rms_error(got: Tensor, exact: Tensor) -> float:
    return (got.double() - exact.double()).square().mean().sqrt().item() if exact.numel() else 0.0


def assert_as_good_as_torch(got: Tensor, torch_result: Tensor, exact: Tensor, what: str) -> None:
    """The three-way tolerance: at most twice the error of torch in the same dtype, against float64.

    Errors are root mean squares; the largest, one draw of two random roundings each, may be four times
    torch's. Where torch happens to be exact, a rounding of operands and of the result are allowed.
    """
    assert torch.isfinite(got).all(), f"{what} is not finite"
    eps = torch.finfo(torch_result.dtype).eps
    for name, measure, factor in (("rms", rms_error, 2), ("largest", error, 4)):
        size = measure(exact, torch.zeros_like(exact))
        ours, bound = measure(got, exact), factor * max(measure(torch_result, exact), eps / 2 * size)
        assert ours <= bound, f"{what}: {name} error {ours:.2e}, bound {bound:.2e}"
