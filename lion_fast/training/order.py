"""Which images each step sees, and all that is random: pure functions of (seed, epoch, step, image).

Nothing here has state, so a resumed run needs no stored sampler or generator, and the order does not depend
on the number of worker processes.
"""

import hashlib
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch.utils.data import Dataset

from lion_fast.methods.noise import Part


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from the parts; equal on every platform, unrelated for different parts."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def private_generators(devices: Sequence[int] | None = None) -> Iterator[None]:
    """Give the caller's global CPU and CUDA generators back as they were; devices: None for all of them."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def deterministic(asked: bool) -> Iterator[None]:
    """Torch's deterministic algorithms only, while it lasts."""
    if not asked:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


@lru_cache(maxsize=2)
def epoch_order(n: int, seed: int, epoch: int) -> tuple[int, ...]:
    """The permutation of range(n) used in one epoch."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
    return tuple(torch.randperm(n, generator=generator).tolist())


@dataclass(frozen=True)
class Plan:
    """The images of every optimiser step of a run.

    An epoch of n images has ceil(n / batch_size) steps whose sizes differ by one at most, so no step is left
    with a handful of images. Steps count from 0 over the whole run.

    Args:
        n: Training images.
        batch_size: Images per optimiser step over all processes.
        epochs: Epochs in the run.
        seed: Seed of the order.
        processes: Processes that share each batch.
        accumulation: Parts in which a process handles its share.

    Example:
        >>> plan = Plan(n=10, batch_size=4, epochs=2, seed=0)
        >>> plan.steps_per_epoch, [len(plan.indices(step)) for step in range(3)]
        (3, [4, 3, 3])
    """

    n: int
    batch_size: int
    epochs: int
    seed: int
    processes: int = 1
    accumulation: int = 1

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.n // self.batch_size)

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    def epoch_of(self, step: int) -> int:
        return step // self.steps_per_epoch

    def indices(self, step: int) -> tuple[int, ...]:
        """The images of one step, in order, over all processes."""
        epoch, place = divmod(step, self.steps_per_epoch)
        start, end = _cut(self.n, self.steps_per_epoch, place)
        return epoch_order(self.n, self.seed, epoch)[start:end]

    def shares(self, step: int, rank: int) -> list[tuple[int, ...]]:
        """A step's images on process `rank`, one part per accumulation step; parts may be empty."""
        indices = self.indices(step)
        return [indices[part.start : part.end] if part.counts else () for part in self.parts(step, rank)]

    def parts(self, step: int, rank: int) -> list[Part]:
        """Where a step's images on process `rank` lie among all of it, one part per accumulation step.

        An empty part becomes one image that does not count: under data parallelism every process has to take
        part in every step.
        """
        n, parts = len(self.indices(step)), self.processes * self.accumulation
        bounds = (_cut(n, parts, rank * self.accumulation + k) for k in range(self.accumulation))
        return [Part(start, end, n) if start < end else Part(0, 1, n, counts=False) for start, end in bounds]


def _cut(n: int, parts: int, place: int) -> tuple[int, int]:
    """Bounds of piece `place` when n items are cut into `parts` nearly equal runs, the longer ones first."""
    size, longer = divmod(n, parts)
    start = place * size + min(place, longer)
    return start, start + size + (place < longer)


class ShareSampler:
    """Batch sampler: (epoch, index) pairs of one process, part by part, from step `start` to the end."""

    def __init__(self, plan: Plan, rank: int, start: int) -> None:
        self.plan, self.rank, self.start = plan, rank, start

    def __len__(self) -> int:
        return (self.plan.steps - self.start) * self.plan.accumulation

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.start, self.plan.steps):
            epoch, indices = self.plan.epoch_of(step), self.plan.indices(step)
            for part in self.plan.parts(step, self.rank):
                yield [(epoch, index) for index in indices[part.start : part.end]]


class SeededItems(Dataset):
    """A data set read by (epoch, index), each item under its own seed.

    Random augmentation is then the same in the training process, in any worker, and after a resume. Items
    that nothing random is in need no seed.
    """

    def __init__(self, items: Dataset, seed: int | None) -> None:
        self.items, self.seed = items, seed

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: tuple[int, int]):
        epoch, index = key
        if self.seed is None:
            return self.items[index]
        with private_generators(devices=[]):
            seed = derive_seed(self.seed, "item", epoch, index)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.default_generator.manual_seed(seed)
            return self.items[index]
