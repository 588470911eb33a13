"""What every measurement shares: a device's clock, how far two results lie apart, how some times are told."""

import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def wait(device: torch.device | str) -> None:
    """Return when the device has done its work; a CPU always has."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def host_seconds(work: Callable[[], object], device: torch.device | str, times: int = 1) -> float:
    """Seconds each of some calls takes, until the device has done its work, by the host's clock."""
    wait(device)
    started = time.perf_counter()
    for _ in range(times):
        work()
    wait(device)
    return (time.perf_counter() - started) / times


class HostTimer:
    """A clock of the host: `between` two points that were `read`."""

    def read(self) -> float:
        """This moment."""
        return time.perf_counter()

    def between(self, start: float, end: float) -> float:
        """Seconds between two moments."""
        return end - start


class CudaTimer:
    """The clock of a CUDA device's queue; seconds are known once the device has come by."""

    def read(self) -> torch.cuda.Event:
        """This point of the queue."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """Seconds of the device between two points."""
        return start.elapsed_time(end) / 1e3


def timer_of(device: torch.device | str) -> HostTimer | CudaTimer:
    """The clock of a device's work; call `wait` between the last `read` and `between`."""
    return CudaTimer() if torch.device(device).type == "cuda" else HostTimer()


def distance(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|, and infinite where a number is not finite.

    >>> distance(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0]))
    0.1
    """
    found, expected = found.double(), expected.double()
    apart = ((found - expected).norm() / expected.norm().clamp_min(1e-30)).item()
    return apart if math.isfinite(apart) else math.inf


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, 20 % and 80 % quantile.

    >>> quantiles([1, 2, 3, 4, 5, 6])
    (3.5, 2.0, 5.0)
    """
    if len(values) == 1:
        return (values[0],) * 3
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return statistics.median(values), fifths[0], fifths[3]


def spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """`quantiles` as a row holds them.

    >>> spread("seconds", [1, 2, 3, 4, 5, 6])
    {'seconds': 3.5, 'seconds_q20': 2.0, 'seconds_q80': 5.0}
    """
    return dict(zip((name, f"{name}_q20", f"{name}_q80"), quantiles(values), strict=True))
