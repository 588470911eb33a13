"""Compiles, on all cores, the kernels that the GPU stages launch, so that no stage waits for a compiler.

    PYTHONPATH=.:kernels python3 bench/gpu/warm.py [--capability 90] [--jobs 16] [--minutes 1]

Worker processes run the real launchers on tensors without memory, with a driver that reports the chip and
launches nothing; what Triton would compile then goes, each kernel once, to the workers. The result is
Triton's own disk cache ($TRITON_CACHE_DIR, else ~/.triton/cache), where a later launch with the same Triton
and the same sources finds its kernel. Needs no GPU. Exits with 1 where a kernel does not compile.
"""

import dataclasses
import itertools
import multiprocessing
import os
import queue
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import NamedTuple

import check
import problems
import rows as stage
import sparse
import torch
from problems import ACTIVATION, MAX_ITER, NEUMANN_TERMS, TOL

from lion_kernels import blocks, launch, ops, present, tuned
from lion_kernels import sparse as sparse_products

OPS = ("solve", "adjoint", "solve_wide", "adjoint_wide")
# The chip of a machine without one.
CAPABILITY = 90
REPORT_EVERY = 40


@dataclass(frozen=True)
class Call:
    """One call of an operator as a stage makes it; what no kernel depends on is left out.

    "solve" and "adjoint" are the operators of `lion_kernels.ops`, served by the whole-solve kernels where
    the state stays on chip; "solve_wide" and "adjoint_wide" are the step kernels whatever the state. The
    weights are float32, as a layer's are, or block-sparse ones with blocks of `block`.

    steps: applications at most (default 50), or terms of the adjoint (default 8).
    tol: default 1e-3 for a solve, 0 for an adjoint.
    save: of a solve, whether a gradient is wanted.
    tf32: whether torch lets float32 products run in tf32.
    """

    op: str
    rows: int
    width: int = 768
    state: int = 64
    dtype: torch.dtype = torch.bfloat16
    activation: str = ACTIVATION
    damping: float = 1.0
    residual: bool = True
    save: bool = True
    steps: int | None = None
    tol: float | None = None
    block: int | None = None
    tf32: bool = False

    def __post_init__(self):
        if self.op not in OPS:
            raise ValueError(f"op must be one of {', '.join(OPS)}; got {self.op!r}")


class Setting(NamedTuple):
    """What to compile for: the compute capability, such as 90, the tiles tuned for the device (`tuned.read`),
    and whether there is a device, so that launchers are wanted too.
    """

    capability: int
    tuned: dict[str, launch.Config]
    cuda: bool


class Request(NamedTuple):
    """A kernel, and what it is specialised for, as Triton's own key says it."""

    module: str
    kernel: str
    key: str

    def __str__(self) -> str:
        return f"{self.kernel} {self.key}"


@dataclass
class Summary:
    """How many kernels were compiled, were there, or were not begun; and those that failed, with reasons."""

    compiled: int = 0
    there: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    left: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        text = f"{self.compiled} kernels compiled, {self.there} were there, {len(self.failed)} failed"
        return f"{text}, {self.left} left for lack of time, {self.seconds:.0f} s"


def default_calls() -> list[Call]:
    """What the stages launch, in their order: checks, kernels, methods on a ViT-B, sparse forms."""
    found = []

    def train(rows: int, wide: bool = False, **options) -> None:
        suffix = "_wide" if wide or options.get("block") else ""
        found.extend(Call(f"{op}{suffix}", rows, **options) for op in ("solve", "adjoint"))

    def train_and_infer(rows: int, **options) -> None:
        train(rows, **options)
        found.append(dataclasses.replace(found[-2], save=False))

    def check_all(small: bool) -> None:
        for case in check.cases(rest=False, small=small):
            options = {"width": case.width, "state": case.state, "activation": case.activation}
            train(case.rows, case.wide, **options, damping=case.damping, block=case.block, tol=0.0)

    check_all(small=False)
    for shape in problems.FIRST_SHAPES:
        train_and_infer(shape.rows, width=shape.width, state=shape.state)
    # A ViT-B with form="residual", then with "states": 16 rows of width R an image, float32 in autocast too.
    for dtype, batch in ((torch.bfloat16, 64), (torch.float32, 64)):
        train_and_infer(batch * problems.TOKENS_PER_IMAGE, state=32, dtype=dtype)
    for dtype, state in itertools.product((torch.float32, torch.bfloat16), (32, 64)):
        train_and_infer(1024, width=state, state=state, activation="tanh", residual=False, dtype=dtype)
    for case in sparse.cases(*sparse.FIRST):
        rows, dense = sparse.BATCH * problems.TOKENS_PER_IMAGE, {"width": case.width, "state": case.state}
        train_and_infer(rows, **dense)
        if case.block:
            train_and_infer(rows, **dense, block=case.block)
        elif case.granularity == "unit":
            train_and_infer(rows, width=case.width, state=case.state - round(case.sparsity * case.state))
    check_all(small=True)
    return list(dict.fromkeys(found))


def make(call: Call) -> None:
    """Makes the call with tensors of which no entry is looked at: dense ones have no memory at all."""
    from lion_kernels import step

    device, solves = "cpu" if call.block else "meta", call.op.startswith("solve")
    R, D = call.state, call.width
    floats = {"device": device, "dtype": torch.float32}
    A, W, V = (torch.empty(shape, **floats) for shape in ((R, D), (R, R), (D, R)))
    if call.block:
        A, W, V = (blocks.to_blocks(t, torch.ones(t.shape, dtype=torch.bool), call.block) for t in (A, W, V))
    b, c = torch.empty(R, **floats), torch.empty(D, **floats)
    x, p = (torch.empty(call.rows, n, device=device, dtype=call.dtype) for n in (D, R))
    tol = (TOL if solves else 0.0) if call.tol is None else call.tol
    steps = (MAX_ITER if solves else NEUMANN_TERMS) if call.steps is None else call.steps
    options = (call.activation, steps, tol, call.damping, call.residual)
    torch.set_float32_matmul_precision("high" if call.tf32 else "highest")
    if call.op == "solve":
        ops._solve(x, A, W, b, V, c, *options, call.save, "triton")
    elif call.op == "adjoint":
        ops._adjoint(x, x, p, A, W, V, *options, "triton")
    elif call.op == "solve_wide":
        step.solve_wide(x, A, W, b, V, c, *options, save=call.save)
    else:
        step.adjoint_wide(x, x, p, A, W, V, *options)


def stand_in(setting: Setting) -> None:
    """Makes this process compile for a chip and launch nothing; for a process of this program's own."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    # There is a process for every core.
    torch.set_num_threads(1)
    driver = SimpleNamespace()
    if setting.cuda:
        from triton.backends.nvidia.driver import CudaDriver

        # It makes no context on the device before a launch.
        driver = CudaDriver()
    driver.get_current_device = lambda: 0
    driver.get_current_stream = lambda device: 0
    driver.get_current_target = lambda: GPUTarget("cuda", setting.capability, 32)
    triton.runtime.driver.set_active(driver)
    run, launchers = JITFunction.run, {}

    def launch_nothing(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        if setting.cuda and kernel is not None and kernel.hash not in launchers:
            # Triton 3.6 compiles one too, from C.
            launchers[kernel.hash] = driver.launcher_cls(kernel.src, kernel.metadata)
        return kernel

    JITFunction.run = launch_nothing
    # What the launchers ask about the device of their tensors.
    present.capability = lambda device: divmod(setting.capability, 10)
    sparse_products.has_kernels = lambda x: True
    tuned.lookup = lambda op, width, state, dtype, device: setting.tuned.get(
        tuned.key(op, width, state, dtype, present.tf32_allowed())
    )


def compile_only(call: Call, wanted: Request | None = None) -> tuple[list[Request], list[bool]]:
    """Makes a call of which only the wanted kernel is compiled: its kernels that this process does not hold
    yet, and whether the wanted one was in the cache.
    """
    from triton import knobs

    found, hits = {}, []

    def skip(key, fn, **_) -> bool:
        request = Request(fn.module, fn.name, str(key))
        found[request] = None
        return request != wanted

    knobs.runtime.jit_cache_hook = skip
    knobs.compilation.listener = lambda cache_hit, **_: hits.append(cache_hit)
    make(call)
    return list(found), hits


def find(call: Call) -> list[Request]:
    """The kernels that a call launches; none is compiled."""
    return compile_only(call)[0]


def put(wanted: tuple[Call, Request]) -> bool:
    """Puts one kernel of a call into the cache, on a GPU with its launcher; whether it was there."""
    (there,) = compile_only(*wanted)[1]
    return there


def _reason(error: BaseException) -> str:
    """The innermost cause of an error in a line: Triton's own errors are a listing with a mark in it."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in str(error).splitlines() if line.strip(" ^")]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:300]


def _answer(function: Callable, argument) -> tuple:
    """(result, None), or (None, reason); an error of Triton's need not survive the way between processes."""
    try:
        return function(argument), None
    except Exception as error:
        return None, _reason(error)


class Worker:
    """A process that compiles; where the compiler takes it down, the next question starts another."""

    def __init__(self, setting: Setting):
        self.setting = setting
        self.start()

    def start(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(1, spawn, initializer=stand_in, initargs=(self.setting,))

    def ask(self, function: Callable, argument) -> tuple:
        try:
            return self.pool.submit(_answer, function, argument).result()
        except BrokenProcessPool:
            self.start()
            return None, "the compiler's process died"

    def stop(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)


def present_setting(capability: int | None = None) -> Setting:
    """The setting of this machine's device, or of another `capability` (default 90 where there is none)."""
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        if capability in (None, 10 * major + minor):
            tiles = tuned.read(tuned.path(torch.cuda.get_device_name()))
            return Setting(10 * major + minor, tiles, cuda=True)
    return Setting(capability or CAPABILITY, {}, cuda=False)


def _say(text: str) -> None:
    print(text, flush=True)


def warm(
    calls: Iterable[Call] | None = None,
    capability: int | None = None,
    jobs: int | None = None,
    seconds: float | None = None,
    say: Callable[[str], None] = _say,
) -> Summary:
    """Compiles every kernel of the calls (default: `default_calls`), in their order, into Triton's cache.

    `capability` is that of the device, or 90 where there is none; `jobs` processes (default: one per core).
    No kernel begins after `seconds`. What fails is said, and the rest goes on.
    """
    begin = time.monotonic()
    end = begin + (float("inf") if seconds is None else seconds)
    calls = default_calls() if calls is None else list(calls)
    jobs, summary = jobs or os.cpu_count() or 1, Summary()
    setting = present_setting(capability)
    workers = [Worker(setting) for _ in range(jobs)]
    idle = queue.SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def ask(function: Callable, argument) -> tuple | None:
        if function is put and time.monotonic() >= end:
            return None
        worker = idle.get()
        try:
            return worker.ask(function, argument)
        finally:
            idle.put(worker)

    def failed(what: Call | Request, reason: str) -> None:
        summary.failed[str(what)] = reason
        say(f"FAILED {what}: {reason}")

    pool = ThreadPoolExecutor(jobs)
    try:
        wanted: dict[Request, Call] = {}
        for call, (found, reason) in zip(calls, pool.map(lambda c: ask(find, c), calls), strict=True):
            if reason:
                failed(call, reason)
            for request in found or ():
                wanted.setdefault(request, call)
        say(f"{len(wanted)} kernels for {len(calls)} calls, {jobs} processes")
        answers = pool.map(lambda item: ask(put, item[::-1]), wanted.items())
        for n, (request, answer) in enumerate(zip(wanted, answers, strict=True), 1):
            there, reason = answer or (None, None)
            if reason:
                failed(request, reason)
            summary.left += answer is None
            summary.there += there is True
            summary.compiled += there is False
            if n % REPORT_EVERY == 0:
                say(f"{n} of {len(wanted)}, {time.monotonic() - begin:.0f} s")
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.stop()
    summary.seconds = time.monotonic() - begin
    return summary


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = stage.arguments(__doc__.splitlines()[0])  # of which it needs the minutes
    parser.add_argument("--capability", type=int, help="such as 90 (default: the device's, else 90)")
    parser.add_argument("--jobs", type=int, help="processes (default: one per core)")
    options = parser.parse_args(argv)
    if present.interpreted():
        parser.error("TRITON_INTERPRET=1 replaces the kernels by interpreted ones; unset it")
    if reason := present.triton_missing():
        parser.error(f"{reason}, so there is nothing to compile")
    calls = [Call("solve", 70, 48, 24)] if options.dry_run else None
    summary = warm(calls, options.capability, options.jobs, 60 * options.minutes)
    print(summary)
    return 1 if summary.failed else 0


if __name__ == "__main__":
    sys.exit(main())
