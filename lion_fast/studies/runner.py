"""Doing what is left of a study: one thing after another or in several processes, each row kept at once."""

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from lion_fast.errors import LionError, OptionError
from lion_fast.studies.rows import Store

T = TypeVar("T")
# Of several workers' runs; with more, something is wrong with all of them
MOST_BROKEN = 5
DIED = "out of memory is the usual reason: run again with fewer workers. Rows written before are kept"


def tell(text: str) -> None:
    """A line on stderr, at once."""
    print(text, file=sys.stderr, flush=True)


class ExperimentError(LionError, RuntimeError):
    """A run that could not be done, with the reason; rows written before are kept."""


@dataclass
class Told:
    """What a call did: runs done, found done, left for another time, and failed of those done."""

    done: int = 0
    held: int = 0
    left: int = 0
    failed: int = 0


class Plan(Generic[T]):
    """Items in order, each with the key of its row; what has a row in the store is not done again.

    A study whose next item depends on rows overrides `next`, `done` and `left`.
    """

    def __init__(self, items: Mapping[str, T], store: Store, *, again: bool = False) -> None:
        self.store = store
        self._left = {key: item for key, item in items.items() if again or key not in store}
        self._todo = iter(list(self._left.items()))
        self.held = len(items) - len(self._left)

    def next(self) -> tuple[str, T] | None:
        """The key and item to begin now; None where there is none, or none before another ends."""
        return next(self._todo, None)

    def done(self, key: str, item: T, rows: Mapping[str, Any] | Iterable[Mapping[str, Any]]) -> None:
        """Keep what `do` returned: a row, which gets the item's key, or several that have their own."""
        self.store.add(*([{"key": key, **rows}] if isinstance(rows, Mapping) else rows))
        del self._left[key]

    def left(self) -> int:
        """How many items have no row yet."""
        return len(self._left)


def run(
    plan: Plan[T],
    do: Callable[[T], Any],
    *,
    minutes: float | None = None,
    workers: int = 1,
    say: Callable[[str], None] = lambda text: None,
    result: Callable[[Any], str] = lambda rows: "done",
) -> Told:
    """Do what is left of a plan; each row is on the disk before the next begins.

    do: makes the row, or the rows, of an item. With several workers it is pickled into each process.
    minutes: begin nothing after so long. workers: processes; 1 runs here. Where a run breaks in one of
    several, the others go on, a new process in its place, until `MOST_BROKEN` runs broke.
    result: a row in words, for `say`.

    Raises:
        ExperimentError: Runs ended by an error, or a worker died. What is done is kept.
    """
    if workers < 1:
        raise OptionError(f"workers must be at least 1; got {workers}")
    ends = None if minutes is None else time.monotonic() + 60 * minutes
    told = Told(held=plan.held)

    def more() -> tuple[str, T] | None:
        return None if ends is not None and time.monotonic() >= ends else plan.next()

    def keep(key: str, item: T, rows: Any) -> None:
        plan.done(key, item, rows)
        told.done += 1
        told.failed += isinstance(rows, Mapping) and bool(rows.get("failed"))
        say(f"{told.done} done, {plan.left()} left: {item}: {result(rows)}")

    try:
        if workers == 1:
            while (found := more()) is not None:
                key, item = found
                try:
                    rows = do(item)
                except LionError as error:
                    raise ExperimentError(f"{item}: {error}") from error
                keep(key, item, rows)
        else:
            _in_processes(more, keep, do, workers)
    finally:
        told.left = plan.left()
    return told


def _in_processes(more: Callable, keep: Callable, do: Callable, workers: int) -> None:
    threads = _threads(workers)
    idle: list[_Worker] = []
    busy: dict[Future, tuple[_Worker, str, Any]] = {}
    broken: list[str] = []
    try:
        while True:
            while len(busy) < workers and len(broken) < MOST_BROKEN and (found := more()) is not None:
                worker = idle.pop() if idle else _Worker(do, threads)
                busy[worker.pool.submit(_do, found[1])] = (worker, *found)
            if not busy:
                break
            for future in wait(busy, return_when=FIRST_COMPLETED).done:
                worker, key, item = busy.pop(future)
                rows = None
                try:
                    rows, fault = future.result()
                except BrokenProcessPool:
                    fault = f"its process died{worker.exit_code()}; {DIED}"
                if fault:
                    broken.append(f"{item}: {fault}")
                    worker.end()  # a device that failed fails every later run of the process
                else:
                    idle.append(worker)
                    keep(key, item, rows)
    finally:
        for worker in (*idle, *(worker for worker, *_ in busy.values())):
            worker.end()
    if broken:
        more_of_them = f"\n{len(broken) - 1} more runs broke:\n" if len(broken) > 1 else ""
        raise ExperimentError(broken[0] + more_of_them + "\n".join(broken[1:]))


class _Worker:
    """One process of a pool of its own: where it dies, no other run is lost."""

    def __init__(self, do: Callable, threads: int) -> None:
        spawn = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
        self.pool = ProcessPoolExecutor(1, spawn, initializer=_begin, initargs=(do, threads))
        others = {process.pid for process in multiprocessing.active_children()}
        self.pool.submit(os.getpid)
        (self.process,) = (p for p in multiprocessing.active_children() if p.pid not in others)

    def exit_code(self) -> str:
        self.pool.shutdown(wait=True)  # its thread waits for the process, and only one can be told the code
        return "" if self.process.exitcode is None else f" (exit code {self.process.exitcode})"

    def end(self) -> None:
        self.process.terminate()
        self.process.join(5)
        if self.process.is_alive():  # in a long step, where a request to stop is only noted
            self.process.kill()
        self.pool.shutdown(wait=True, cancel_futures=True)


_work: Callable | None = None


def _begin(do: Callable, threads: int) -> None:
    global _work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends workers
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    _work = do


def _end_with_the_parent() -> None:
    """A parent that was killed ends no pool: its processes would wait for work for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _do(item: Any) -> tuple[Any, str | None]:
    """(rows, None), or (None, what went wrong): an error as text, as not every one can be pickled."""
    try:
        return _work(item), None
    except LionError as error:
        return None, str(error)
    except Exception:
        return None, traceback.format_exc()


def _threads(workers: int) -> int:
    """Threads of each worker: its share of the cores, or what OMP_NUM_THREADS says."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdecimal() and int(asked):
        return int(asked)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // workers)
