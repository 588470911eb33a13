"""Times, memory and ceilings on a CUDA device; on a CPU the same calls with a host clock, for dry runs."""

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch._functorch.config
from torch import Tensor

from lion_fast.studies.measuring import distance, timer_of, wait

MODES = ("forward", "backward", "both")
# Runs in one captured graph at most, each on tokens of its own: launching a graph costs the host some
# microseconds, as long as a run of a few rows takes the device.
RUNS = 32
# A contender that is slow is timed so often at least.
LEAST_SAMPLES = 4


def seconds_of(work: Callable[[], object], device: str, times: int = 1) -> float:
    """Seconds each of some calls takes the device, one behind the other."""
    timer = timer_of(device)
    start = timer.read()
    for _ in range(times):
        work()
    end = timer.read()
    wait(device)
    return timer.between(start, end) / times


class NotCaptured(RuntimeError):
    """A capture broke off. Torch's allocator and current stream stay as they were within it, so that nothing
    more can be captured in this process.
    """


class Subject:
    """One contender in one mode, ready to be run again and again on rotating tokens.

    On a CUDA device, where it can be `captured`, runs are replayed from one graph, a run for each set of
    tokens: "forward" of the forward alone, "backward" of the backward alone, "both" of one behind the other.
    Elsewhere a run is an eager call. Raises `NotCaptured` where the capture breaks off.
    """

    def __init__(self, ready, problem, mode: str, compiled: bool, captured: bool, device: str):
        self.problem, self.mode, self.device = problem, mode, device
        self.parameters = ready.parameters
        if compiled:
            # A graph of the backward alone runs again and again over what one forward has kept, which
            # torch's compiler would otherwise give away. One setting for all modes is one compilation.
            torch._functorch.config.donated_buffer = False
        self.call = torch.compile(ready.call) if compiled else ready.call
        self.turn = 0
        self.graph = self._capture() if captured and device == "cuda" else None

    @property
    def how(self) -> str:
        """How a run is timed."""
        return "graph" if self.graph else "eager"

    @property
    def sets(self) -> int:
        """How many sets of tokens take turns."""
        return len(self.graph[1]) if self.graph else len(self.problem.x)

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

    def _capture(self):
        """The graph of a run on each set of tokens, what the runs give, and what else its memory is of."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._once(0)
        torch.cuda.current_stream().wait_stream(stream)
        sets = range(min(RUNS, len(self.problem.x)))
        graph, before = torch.cuda.CUDAGraph(), None
        try:
            # All results are kept while it lasts, so that no run writes where another one has.
            if self.mode != "backward":
                with torch.cuda.graph(graph):
                    kept = [self._once(i) for i in sets]
            else:
                # The backward alone: what the forward saved stays in the pool that both share.
                before = torch.cuda.CUDAGraph()
                with torch.cuda.graph(before):
                    made = [self._forward(i, True) for i in sets]
                with torch.cuda.graph(graph, pool=before.pool()):
                    kept = [self._backward(i, *made[i], keep=True) for i in sets]
                before.replay()
        except Exception as error:
            # What a forbidden call leaves is an error of the capture's end; its own stands behind that.
            cause = error.__context__ or error
            raise NotCaptured(f"{type(cause).__name__}: {cause}") from error
        return graph, kept, before

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
        if not self.graph:
            return True
        graph, kept, _ = self.graph
        graph.replay()
        if self.mode == "forward":
            return distance(kept[0], self.output()) <= 1e-2
        return all(distance(a, b) <= 1e-2 for a, b in zip(kept[0], self.gradients(), strict=True))

    def sample(self, calls: int, eager: bool = False) -> float:
        """Seconds a run over some runs, or an eager call; an eager backward is timed behind each forward."""
        if self.graph and not eager:
            graph, kept, _ = self.graph
            replays = max(1, round(calls / len(kept)))
            return seconds_of(graph.replay, self.device, replays) / len(kept)
        if self.mode == "backward":
            return statistics.fmean(
                seconds_of(partial(self._backward, i, *self._forward(i, True)), self.device)
                for i in (self._next() for _ in range(calls))
            )
        return seconds_of(lambda: self._once(self._next()), self.device, calls)

    def _next(self) -> int:
        """The tokens whose turn it is."""
        self.turn = (self.turn + 1) % len(self.problem.x)
        return self.turn

    def host_seconds(self, calls: int = 20) -> float:
        """Seconds of the host for an eager call, until it has handed its work to the device.

        The mode's own part of the call: for "backward" that behind the forward.
        """
        spent = 0.0
        for _ in range(calls):
            wait(self.device)
            made = self._forward(0, True) if self.mode == "backward" else None
            wait(self.device)
            begin = time.perf_counter()
            self._backward(0, *made) if made else self._once(0)
            spent += time.perf_counter() - begin
        wait(self.device)
        return spent / calls

    def peak_bytes(self) -> int | None:
        """Memory that one eager call allocates above what was there; None on a CPU."""
        if self.device != "cuda":
            return None
        wait(self.device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self._once(0)
        wait(self.device)
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
            return t.detach()  # t itself would keep the operation that it came from, and that keeps it

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            kept = self._forward(0, True)
        del kept
        return sum(size for pointer, size in sizes.items() if pointer not in known)


def interleaved(subjects: list[Subject], seconds: float, rounds: int) -> list[list[float]]:
    """Samples of every subject, taken in turns so that drift of the device meets all alike.

    A subject whose runs take longer than its share of `seconds` is left out of some rounds.
    """
    calls, every = [], []
    for subject in subjects:
        subject.sample(1)
        rough = max(subject.sample(1), 1e-7)
        calls.append(max(1, min(100, round(seconds / rounds / rough))))
        every.append(max(1, rounds // max(LEAST_SAMPLES, int(2 * seconds / rough))))
    samples: list[list[float]] = [[] for _ in subjects]
    for i in range(rounds):
        for subject, number, step, found in zip(subjects, calls, every, samples, strict=True):
            if i % step == 0:
                found.append(subject.sample(number))
    return samples


def best_rate(work: float, run: Callable[[], object], device: str, repeats: int) -> float:
    """work / seconds of the fastest of some repeats."""
    return work / min([seconds_of(run, device) for _ in range(repeats + 2)][2:])


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
