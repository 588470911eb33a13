"""Peak memory of a stretch of work, with the way it was measured."""

import ctypes
import sys
import threading
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Context manager that measures the most memory in use at once.

    On CUDA: the bytes torch's allocator held at most (`torch.cuda.max_memory_allocated`), weights included.
    On a CPU: how far the process's resident memory rose above its level at the start, from the kernel's
    high-water mark on Linux (missing nothing), sampled every 5 ms elsewhere. Work that fits into memory
    the process already holds free rises by nothing.

    Attributes:
        bytes: The measurement, after the block.
        how: One line that says what was measured.

    Example:
        >>> with PeakMemory() as memory:
        ...     x = torch.ones(2**20)
        >>> memory.bytes > 0
        True
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.bytes = 0
        self.how = ""

    def __enter__(self) -> "PeakMemory":
        if self.device.type == "cuda":
            self.how = "peak of torch's CUDA allocator, weights included"
            torch.cuda.reset_peak_memory_stats(self.device)
            return self
        _return_free_pages()
        if _reset_high_water():
            self.how = "rise of the resident memory above its level at the start (kernel's high-water mark)"
            self._start, self._sampler = _status_bytes("VmRSS"), None
        else:
            self.how = "rise of the resident memory above its level at the start (sampled every 5 ms)"
            self._sampler = _Sampler()
            self._start = self._sampler.peak
            self._sampler.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device)
        elif self._sampler is None:
            self.bytes = max(0, _status_bytes("VmHWM") - self._start)
        else:
            self.bytes = max(0, self._sampler.finish() - self._start)


class _Sampler(threading.Thread):
    def __init__(self) -> None:
        super().__init__(daemon=True)
        import psutil  # a dependency of accelerate

        self._process, self._done = psutil.Process(), threading.Event()
        self.peak = self._process.memory_info().rss

    def run(self) -> None:
        while not self._done.wait(0.005):
            self.peak = max(self.peak, self._process.memory_info().rss)

    def finish(self) -> int:
        self._done.set()
        self.join()
        return max(self.peak, self._process.memory_info().rss)


def _return_free_pages() -> None:
    # Pages that the C library keeps after an earlier run would hide as much of this one's growth.
    if sys.platform == "linux":
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        except (OSError, AttributeError):
            pass


def _reset_high_water() -> bool:
    try:
        _CLEAR.write_text("5")
        return _status_bytes("VmHWM") > 0
    except (OSError, ValueError):
        return False


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"{_STATUS} has no {field}")
