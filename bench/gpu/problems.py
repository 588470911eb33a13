"""The problems of the GPU run: shapes, weights, and the bytes and operations that cannot be avoided."""

import itertools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lion_kernels import reference

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
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


FIRST_SHAPES = [
    Shape(batch, 768, state, problem)
    for state in (64, 16, 128)
    for batch in (256, 64, 1)
    for problem in RATES
]


def shapes() -> list[Shape]:
    """All shapes, the most important first, so that an interrupted run holds what matters."""
    batches = itertools.product((768,), (64, 32), (512, 256, 64, 8), RATES)
    states = itertools.product((768,), (256, 512), (256, 64), RATES)
    widths = itertools.product((384, 1024), (64, 32), (256, 64), RATES)
    rest = itertools.product((768, 384, 1024), (16, 32, 64, 128, 256, 512), (512, 8, 1, 256, 64), RATES)
    order = itertools.chain(batches, states, widths, rest)
    more = (Shape(batch, width, state, problem) for width, state, batch, problem in order)
    return list(dict.fromkeys([*FIRST_SHAPES, *more]))


def is_central(shape: Shape, rest: bool) -> bool:
    """Whether a shape is worth the minutes that compiled contenders take."""
    if shape.width != 768 or shape.state not in ((32, 64, 128) if rest else (64,)):
        return False
    return shape.batch in ((1, 64, 256) if rest else (256,))


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
    known: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def exact(self, recurrence: str) -> tuple[Tensor, Tensor]:
        """out - x of the first tokens and their dx, in float64; computed once."""
        if recurrence not in self.known:
            A, W, b, V, c = (t.double() for t in (self.free if recurrence == "free" else self.tied))
            x, g = self.x[0].double(), self.upstream[0].double()
            out, p, _, _ = reference.solve(x, A, W, b, V, c, ACTIVATION, MAX_ITER, TOL, 1.0, True)
            dx = reference.adjoint(g, x, p, A, W, V, ACTIVATION, NEUMANN_TERMS, 0.0, 1.0, True)[0]
            self.known[recurrence] = out - x, dx
        return self.known[recurrence]


def weights(shape: Shape, device: str) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """A, W, b, V, c of the free recurrence, and of the tied one, whose W is A V."""
    generator = torch.Generator().manual_seed(0)
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


def integers(rows: int, width: int, state: int, device: str) -> tuple[Tensor, ...]:
    """x, A, W, b, V, c of small integers in float64, of which few applications are exact in every dtype."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int, entries: float) -> Tensor:
        """-1, 0, 1 with about `entries` numbers a row that are not zero."""
        signs = torch.randint(0, 2, size, generator=generator) * 2 - 1
        return signs * (torch.rand(size, generator=generator) < min(1.0, entries / size[-1]))

    tensors = (
        draw(rows, width, entries=width / 2),
        draw(state, width, entries=16),
        draw(state, state, entries=3),
        torch.randint(-3, 4, (state,), generator=generator),
        draw(width, state, entries=4),
        torch.randint(-3, 4, (width,), generator=generator),
    )
    return tuple(t.to(device, torch.float64) for t in tensors)


def cache_bytes(device: str) -> int:
    """The size of a device's last cache; of a CPU's a small number, for dry runs."""
    return torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else 1 << 16


def draw_tokens(
    shape: Shape, dtype: torch.dtype, device: str, cache: int
) -> tuple[list[Tensor], list[Tensor]]:
    """x and upstream gradients in rotation, together three times as large as the device's last cache."""
    size = shape.rows * shape.width * dtype.itemsize
    sets = max(2, min(512, -(-3 * cache // (2 * size))))
    # The generator of the device: half a gigabyte drawn on a host takes seconds.
    new = {"device": device, "dtype": dtype, "generator": torch.Generator(device).manual_seed(0)}
    x, upstream = ([torch.randn(shape.rows, shape.width, **new) for _ in range(sets)] for _ in range(2))
    return x, upstream


def build(shape: Shape, dtype: torch.dtype, device: str, cache: int) -> Problem:
    """A problem with tokens in rotation."""
    free, tied = weights(shape, device)
    x, upstream = draw_tokens(shape, dtype, device, cache)
    applications, steps = {}, {}
    for name, given in (("free", free), ("tied", tied)):
        count = reference.solve(x[0].float(), *given, ACTIVATION, MAX_ITER, TOL, 1.0, True)[3]
        applications[name], steps[name] = count.float().mean().item(), int(count.max())
    return Problem(shape, x, upstream, free, tied, applications, steps)


def counts(shape: Shape, dtype: torch.dtype, applications: float) -> dict[str, tuple[int, int]]:
    """Bytes and floating-point operations that a mode cannot do without: mode -> (bytes, operations).

    Forward, without a gradient to come: x read, out written, the weights read. Backward: x, its
    pre-activation and the upstream gradient read, dx written, weights read, their float32 gradients
    written. Both: the pre-activation is written too. Operations are those of the matrix products, 2 per
    multiply-add, for the iteration in R dimensions with the mean number of applications; the first
    application has no product.
    """
    T, D, R, size = shape.rows, shape.width, shape.state, dtype.itemsize
    parameters = 2 * R * D + R * R
    forward = ((2 * T * D + parameters) * size, round(4 * T * D * R + 2 * T * R * R * (applications - 1)))
    backward = (
        (3 * T * D + T * R + parameters) * size + 4 * parameters,
        8 * T * D * R + 2 * T * R * R * (NEUMANN_TERMS + 1),
    )
    both = (forward[0] + T * R * size + backward[0], forward[1] + backward[1])
    return {"forward": forward, "backward": backward, "both": both}
