"""Problems for the kernels, and what they are compared with: float64, and torch in the tokens' dtype."""

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from lion_kernels import reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
GRADIENTS = ("dx", "dA", "dW", "db", "dV", "dc")
# The interpreter multiplies the bit patterns of bfloat16 operands.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
# Rows, width and state of problems of real size, which take the interpreter hours.
BIG = [(197, 768, 16), (1576, 768, 64), (1000, 1024, 48), (333, 100, 128)] if DEVICE == "cuda" else []


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


def torch_gradients(grad_out, x, p, *weights_and_options) -> list[tuple[Tensor, ...]]:
    """`torch_adjoint` with the rows in four orders, dx left where its row was.

    The gradients of the weights are sums over rows: what one order of summation loses is chance, and which
    order it is, the processor's choice. A bias gradient has R numbers, too few to average that out.
    """
    results = [torch_adjoint(grad_out, x, p, *weights_and_options)]
    for seed in range(3):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).to(x.device)
        _, *sums = torch_adjoint(grad_out[order], x[order], p[order], *weights_and_options)
        results.append((results[0][0], *sums))
    return results


def error(got: Tensor, exact: Tensor) -> float:
    return (got.double() - exact.double()).abs().max().item() if exact.numel() else 0.0


def rms_error(got: Tensor, exact: Tensor) -> float:
    return (got.double() - exact.double()).square().mean().sqrt().item() if exact.numel() else 0.0


def assert_as_good_as_torch(
    got: Tensor, by_torch: Tensor | Sequence[Tensor], exact: Tensor, what: str
) -> None:
    """The three-way tolerance: at most twice the error of torch in the same dtype, against float64.

    Errors are root mean squares; the largest, one draw of two random roundings each, may be four times
    torch's. Where torch happens to be exact, a rounding of operands and of the result are allowed.
    `by_torch`: one result, or several of the same sum in other orders, of which the least exact counts.
    """
    assert torch.isfinite(got).all(), f"{what} is not finite"
    by_torch = [by_torch] if isinstance(by_torch, Tensor) else by_torch
    eps = torch.finfo(by_torch[0].dtype).eps
    for name, measure, factor in (("rms", rms_error, 2), ("largest", error, 4)):
        size = measure(exact, torch.zeros_like(exact))
        torchs = max(measure(result, exact) for result in by_torch)
        ours, bound = measure(got, exact), factor * max(torchs, eps / 2 * size)
        assert ours <= bound, f"{what}: {name} error {ours:.2e}, bound {bound:.2e}"


def assert_gradients_as_good_as_torch(got, given, *options) -> None:
    """`assert_as_good_as_torch` of dx, dA, dW, db, dV, dc.

    given: grad_out, x, p, A, W, V; options: activation, terms, damping and residual of `torch_adjoint`.
    """
    exact = torch_adjoint(*double(*given), *options)
    by_torch = zip(*torch_gradients(*given, *options), strict=True)
    for name, ours, theirs, truth in zip(GRADIENTS, got, by_torch, exact, strict=False):
        assert_as_good_as_torch(ours, theirs, truth, name)


def assert_rows_close(got: Tensor, expected: Tensor, rtol: float = 1e-5, atol: float = 1e-5) -> None:
    """Every row [..., n] differs by at most atol + rtol times the row's own 2-norm.

    For rows that grow without bound. Their entries are sums of huge terms that cancel: two right orders of
    summation differ by roundings of the terms, so an entry's own size says nothing about how exact it can be.
    """
    apart, size = (
        torch.linalg.vector_norm(t, dim=-1) for t in ((got - expected).double(), expected.double())
    )
    bound = rtol * size + atol
    assert (apart <= bound).all(), f"rows differ by up to {(apart / bound).max():.1f} times what is allowed"
