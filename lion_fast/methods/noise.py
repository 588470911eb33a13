"""Random numbers in training: an image's are the same however the images of a step are shared out.

A method draws by `dropout` and `uniform_like` what is each image's own. What is one for the whole batch it
draws by torch: every part of a step begins with the same state of the generators.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """Images `start` to `end` of the n of a step.

    counts: whether they count; a process without images borrows one. mean: what `TunedModel.step_mean` found
    over all images of the step.
    """

    start: int
    end: int
    n: int
    counts: bool = True
    mean: Tensor | None = None

    @property
    def whole(self) -> bool:
        return self.end - self.start == self.n

    def rows(self, x: Tensor) -> tuple[tuple[int, ...], slice]:
        """The shape that x (k rows an image, ...) would have for the whole step, and where x lies in it."""
        k = x.shape[0] // (self.end - self.start)
        return (self.n * k, *x.shape[1:]), slice(self.start * k, self.end * k)


_part: Part | None = None


@contextlib.contextmanager
def part_of_step(part: Part) -> Iterator[None]:
    """While it lasts, what is drawn is drawn for a whole step, of which a part is at hand."""
    global _part
    _part = part
    try:
        yield
    finally:
        _part = None


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """`torch.nn.functional.dropout` of rows that belong to images, (k B, ...)."""
    if not (training and p) or _part is None or _part.whole:
        return F.dropout(x, p, training)
    shape, own = _part.rows(x)
    return x * F.dropout(x.new_ones(shape), p)[own]


def uniform_like(x: Tensor) -> Tensor:
    """Uniform numbers in [0, 1) for rows that belong to images, (k B, ...)."""
    shape, own = (x.shape, slice(None)) if _part is None else _part.rows(x)
    return torch.rand(shape, dtype=x.dtype, device=x.device)[own]


def over_step(mean: Tensor) -> Tensor:
    """A mean over the images at hand as that over all of the step, with the gradient of these images."""
    if _part is None or _part.mean is None:
        return mean
    return _part.mean + (mean - mean.detach())
