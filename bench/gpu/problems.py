"""The problems of the GPU run: shapes, weights, and the bytes and operations that cannot be avoided."""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from lion_kernels import reference

TOKENS_PER_IMAGE = 197
ACTIVATION = "relu"
MAX_ITER, TOL, NEUMANN_TERMS = 50, 1e-3, 8
# The rate of contraction: about 5 and about 26 applications to the tolerance.
RATES = {"easy": 0.2, "hard": 0.9}


@dataclass(frozen=True)
class Shape:
    """B images of `tokens` tokens of `width`, a state of `state`, and how hard the problem is."""

    batch: int
    width: int
    state: int
    problem: str
    tokens: int = TOKENS_PER_IMAGE

    @property
    def rows(self) -> int:
        return self.batch * self.tokens


def shapes(tokens: int = TOKENS_PER_IMAGE) -> list[Shape]:
    """All shapes, the most important first, so that an interrupted run holds what matters."""
    first = itertools.product((768,), (64, 32), (256, 64), RATES)
    batches = itertools.product((768,), (64,), (1, 512, 8), RATES)
    states = itertools.product((768,), (128, 16, 256, 512), (256, 64), RATES)
    widths = itertools.product((384, 1024), (64, 32), (256, 64), RATES)
    rest = itertools.product((768, 384, 1024), (16, 32, 64, 128, 256, 512), (512, 8, 1, 256, 64), RATES)
    order = itertools.chain(first, batches, states, widths, rest)
    found = (Shape(batch, width, state, problem, tokens) for width, state, batch, problem in order)
    return list(dict.fromkeys(found))


def is_central(shape: Shape) -> bool:
    """Whether a shape is worth the minutes that compiled contenders take."""
    return shape.width == 768 and (
        shape.state in (32, 64) and shape.batch in (1, 64, 256) or shape.state == 128 and shape.batch == 256
    )


@dataclass
class Problem:
    """Tokens in rotation, float32 weights of both recurrences, and the applications that each takes."""

    shape: Shape
    x: list[Tensor]
    upstream: list[Tensor]
    free: tuple[Tensor, ...]
    tied: tuple[Tensor, ...]
    applications: dict[str, float]
    steps: dict[str, int]


def weights(shape: Shape, device: str, seed: int = 0) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """A, W, b, V, c of the free recurrence, and of the tied one, whose W is A V."""
    generator = torch.Generator().manual_seed(seed)
    D, R, rate = shape.width, shape.state, RATES[shape.problem]

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    A, V, b, c = draw(R, D) / D**0.5, draw(D, R) / D**0.5, torch.ones(R), 0.1 * draw(D)
    if shape.problem == "hard":
        # One direction that contracts at the rate and that the bias feeds; the rest is smaller.
        u = torch.full((R, 1), R**-0.5)
        rest = draw(R, R)
        rest -= u @ (u.T @ rest)
        rest -= (rest @ u) @ u.T
        W = rate * u @ u.T + 0.3 * rate * rest / torch.linalg.matrix_norm(rest, 2)
    else:
        W = draw(R, R)
        W *= rate / torch.linalg.matrix_norm(W, 2)
    tied_A = rate * torch.linalg.pinv(V)
    free = tuple(t.to(device) for t in (A, W, b, V, c))
    tied = tuple(t.to(device) for t in (tied_A, tied_A @ V, b, V, c))
    return free, tied


def build(shape: Shape, dtype: torch.dtype, device: str, cache_bytes: int, seed: int = 0) -> Problem:
    """A problem whose rotating tokens exceed three times the device's last cache."""
    free, tied = weights(shape, device, seed)
    size = shape.rows * shape.width * dtype.itemsize
    sets = max(2, min(512, -(-3 * cache_bytes // (2 * size))))
    # The generator of the device: half a gigabyte drawn on a host takes seconds.
    generator = torch.Generator(device).manual_seed(seed)

    def draw() -> list[Tensor]:
        new = {"device": device, "dtype": dtype, "generator": generator}
        return [torch.randn(shape.rows, shape.width, **new) for _ in range(sets)]

    x, upstream = draw(), draw()
    applications, steps = {}, {}
    for name, given in (("free", free), ("tied", tied)):
        count = reference.solve(x[0].float(), *given, ACTIVATION, MAX_ITER, TOL, 1.0, True)[3]
        applications[name], steps[name] = count.float().mean().item(), int(count.max())
    return Problem(shape, x, upstream, free, tied, applications, steps)


def counts(shape: Shape, dtype: torch.dtype, applications: float) -> dict[str, tuple[int, int]]:
    """Bytes and floating-point operations that a mode cannot do without: mode -> (bytes, operations).

    Forward: x read, out and the pre-activation written, the weights read. Backward: x, its
    pre-activation and the upstream gradient read, dx written, weights read, their float32 gradients
    written. Operations are those of the matrix products, 2 per multiply-add, for the iteration in R
    dimensions with the mean number of applications; the first application has no product.
    """
    T, D, R, size = shape.rows, shape.width, shape.state, dtype.itemsize
    parameters = 2 * R * D + R * R
    forward = (
        (2 * T * D + T * R + parameters) * size,
        round(4 * T * D * R + 2 * T * R * R * (applications - 1)),
    )
    backward = (
        (3 * T * D + T * R + parameters) * size + 4 * parameters,
        8 * T * D * R + 2 * T * R * R * (NEUMANN_TERMS + 1),
    )
    both = (forward[0] + backward[0], forward[1] + backward[1])
    return {"forward": forward, "backward": backward, "both": both}
