"""Times, memory and ceilings on a CUDA device; on a CPU the same calls with a host clock, for dry runs."""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

MODES = ("forward", "backward", "both")
# Captured graphs of one contender, each on tokens of its own.
GRAPHS = 8


class Clock:
    """Seconds between two points of a device's queue."""

    def __init__(self, device: str):
        self.cuda = device == "cuda"
        if self.cuda:
            self.begin, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def start(self) -> None:
        if self.cuda:
            self.begin.record()
        else:
            self.begin = time.perf_counter()

    def stop(self) -> None:
        if self.cuda:
            self.end.record()
        else:
            self.end = time.perf_counter()

    def seconds(self) -> float:
        if self.cuda:
            self.end.synchronize()
            return self.begin.elapsed_time(self.end) / 1e3
        return self.end - self.begin


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def relative(got: Tensor, exact: Tensor) -> float:
    """|got - exact| / |exact|; infinite where got is not finite."""
    if not torch.isfinite(got).all():
        return float("inf")
    exact = exact.double()
    return ((got.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


class Subject:
    """One contender in one mode, ready to be run again and again on rotating tokens.

    On a CUDA device, where it can be `captured`, a run is the replay of a graph: "forward" of the forward
    alone, "backward" of the backward alone, "both" of one behind the other. Elsewhere it is an eager call.
    """

    def __init__(self, ready, problem, mode: str, compiled: bool, captured: bool, device: str):
        self.problem, self.mode, self.device = problem, mode, device
        self.parameters = ready.parameters
        self.call = torch.compile(ready.call) if compiled else ready.call
        self.turn = 0
        self.clock = Clock(device)
        # A captured graph has its tokens at fixed addresses: one graph per set, of a few sets.
        sets = range(min(GRAPHS, len(problem.x)))
        self.graphs = [self._capture(i) for i in sets] if captured and device == "cuda" else None

    @property
    def how(self) -> str:
        """How a run is timed."""
        return "graph" if self.graphs else "eager"

    def _forward(self, i: int, grad: bool) -> tuple[Tensor, Tensor]:
        x = self.problem.x[i].detach().requires_grad_(grad)
        with torch.set_grad_enabled(grad):
            return x, self.call(x)

    def _backward(self, i: int, x: Tensor, out: Tensor, keep: bool = False) -> tuple[Tensor, ...]:
        leaves = [x, *self.parameters]
        return torch.autograd.grad(out, leaves, self.problem.upstream[i], retain_graph=keep)

    def _once(self, i: int):
        x, out = self._forward(i, self.mode != "forward")
        return out if self.mode == "forward" else self._backward(i, x, out)

    def _capture(self, i: int):
        """The graph of a run on the tokens i, and what its memory holds."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._once(i)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        if self.mode != "backward":
            with torch.cuda.graph(graph):
                kept = self._once(i)
            return graph, kept
        # The backward alone: what the forward saved stays in the pool that both share.
        before = torch.cuda.CUDAGraph()
        with torch.cuda.graph(before):
            x, out = self._forward(i, True)
        with torch.cuda.graph(graph, pool=before.pool()):
            kept = self._backward(i, x, out, keep=True)
        before.replay()
        return graph, (kept, before, x, out)

    def output(self) -> Tensor:
        """out for the first tokens."""
        return self._forward(0, self.mode != "forward")[1].detach()

    def gradients(self) -> tuple[Tensor, ...]:
        """dx and the parameters' gradients for the first tokens."""
        return self._backward(0, *self._forward(0, True))

    def captured_agrees(self) -> bool:
        """Whether a replay gives what the eager call gives; True where nothing was captured.

        To a rounding in half precision: the vendor's products may choose another algorithm under capture.
        """
        if not self.graphs:
            return True
        graph, kept = self.graphs[0]
        graph.replay()
        got = kept[0] if self.mode == "backward" else kept
        expected = self.output() if self.mode == "forward" else self.gradients()
        pairs = [(got, expected)] if isinstance(got, Tensor) else list(zip(got, expected, strict=True))
        return all(relative(a, b) <= 1e-2 for a, b in pairs)

    def sample(self, calls: int, eager: bool = False) -> float:
        """Seconds a run over some runs, or an eager call; an eager backward is timed behind each forward."""
        graphs = None if eager else self.graphs
        sets = len(graphs or self.problem.x)
        total = 0.0
        if self.mode == "backward" and not graphs:
            for _ in range(calls):
                self.turn = (self.turn + 1) % sets
                x, out = self._forward(self.turn, True)
                self.clock.start()
                self._backward(self.turn, x, out)
                self.clock.stop()
                total += self.clock.seconds()
            return total / calls
        self.clock.start()
        for _ in range(calls):
            self.turn = (self.turn + 1) % sets
            graphs[self.turn][0].replay() if graphs else self._once(self.turn)
        self.clock.stop()
        return self.clock.seconds() / calls

    def host_seconds(self, calls: int = 20) -> float:
        """Seconds of the host for an eager call, until it has handed its work to the device.

        The mode's own part of the call: for "backward" that behind the forward.
        """
        spent = 0.0
        for _ in range(calls):
            synchronize(self.device)
            made = self._forward(0, True) if self.mode == "backward" else None
            synchronize(self.device)
            begin = time.perf_counter()
            self._backward(0, *made) if made else self._once(0)
            spent += time.perf_counter() - begin
        synchronize(self.device)
        return spent / calls

    def peak_bytes(self) -> int | None:
        """Memory that one eager call allocates above what was there; None on a CPU."""
        if self.device != "cuda":
            return None
        synchronize(self.device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self._once(0)
        synchronize(self.device)
        return torch.cuda.max_memory_allocated() - before

    def saved_bytes(self) -> int | None:
        """Memory that autograd keeps between forward and backward, x and the parameters left out."""
        if self.mode == "forward":
            return None
        known = {t.untyped_storage().data_ptr() for t in (self.problem.x[0], *self.parameters)}
        sizes: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            kept = self._forward(0, True)
        del kept
        return sum(size for pointer, size in sizes.items() if pointer not in known)


def interleaved(subjects: list[Subject], seconds: float, rounds: int) -> list[list[float]]:
    """Samples of every subject, taken in turns so that drift of the device meets all alike."""
    calls = []
    for subject in subjects:
        subject.sample(2)
        rough = max(subject.sample(2), 1e-7)
        calls.append(max(1, min(100, round(seconds / rounds / rough))))
    samples: list[list[float]] = [[] for _ in subjects]
    for _ in range(rounds):
        for subject, number, found in zip(subjects, calls, samples, strict=True):
            found.append(subject.sample(number))
    return samples


def quantiles(samples: list[float]) -> dict[str, float]:
    """Median, 20 % and 80 % in microseconds."""
    ordered = sorted(samples)

    def at(q: float) -> float:
        return ordered[min(len(ordered) - 1, round(q * (len(ordered) - 1)))]

    return {
        "us": statistics.median(ordered) * 1e6,
        "us_20": at(0.2) * 1e6,
        "us_80": at(0.8) * 1e6,
    }


def best_rate(work: float, run: Callable[[], object], device: str, repeats: int) -> float:
    """work / seconds of the fastest of some repeats."""
    clock, seconds = Clock(device), []
    for _ in range(repeats + 2):
        clock.start()
        run()
        clock.stop()
        seconds.append(clock.seconds())
    return work / min(seconds[2:])


def ceilings(device: str, small: bool = False) -> dict[str, float]:
    """Bytes per second of a copy, counting both directions, and operations per second of matrix products."""
    size, side, repeats = (1 << 20, 64, 2) if small else (1 << 31, 8192, 10)
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    found = {"copy": best_rate(2 * size, lambda: target.copy_(source), device, repeats)}
    allowed = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = True
        for name, dtype in (("bf16", torch.bfloat16), ("tf32", torch.float32)):
            # Zeros multiply faster than numbers.
            a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
            found[name] = best_rate(2 * side**3, lambda a=a, b=b: a @ b, device, repeats)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    return found
