"""The CUDA allocator's record of one step: its snapshot, torch's page of it, and the level over time."""

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lion_fast.files import make_folder, write_atomically
from lion_fast.studies.measuring import wait
from lion_fast.studies.profiling import plots

# Events that the allocator remembers; a training step of a ViT-B has some tens of thousands
MAX_EVENTS = 1_000_000


def take(step, folder: Path) -> dict[str, str]:
    """Record one step; the names of the files: "plot", "pickle" and "html".

    allocator-KIND.png shows the level over the step. snapshot-KIND.pickle is for pytorch.org/memory_viz,
    memory-KIND.html is the same as a page, which takes its drawing code from the network.
    """
    from torch.cuda._memory_viz import trace_plot

    make_folder(folder)
    wait(step.device)
    start = torch.cuda.memory_allocated(step.device)
    torch.cuda.memory._record_memory_history(max_entries=MAX_EVENTS)
    try:
        step.run()
        wait(step.device)
        found = torch.cuda.memory._snapshot()
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    names = {
        "plot": f"allocator-{step.kind}.png",
        "pickle": f"snapshot-{step.kind}.pickle",
        "html": f"memory-{step.kind}.html",
    }
    write_atomically(folder / names["pickle"], pickle.dumps(found))
    write_atomically(folder / names["html"], trace_plot(found))
    index = step.device.index if step.device.index is not None else torch.cuda.current_device()
    plots.allocator_level(level_over_time(found["device_traces"][index], start), folder / names["plot"])
    return names


def level_over_time(events: Sequence[Mapping[str, Any]], start: int) -> list[tuple[float, int]]:
    """Bytes in use after each event of an allocator's trace, with the seconds since the first one.

    >>> events = [{"action": "alloc", "size": 8, "time_us": 5}]
    >>> events.append({"action": "free_completed", "size": 8, "time_us": 9})
    >>> level_over_time(events, 100)
    [(0.0, 108), (4e-06, 100)]
    """
    signs = {"alloc": 1, "free_completed": -1}
    level, found = start, []
    for event in events:
        if event["action"] in signs:
            level += signs[event["action"]] * event["size"]
            found.append(((event["time_us"] - events[0]["time_us"]) / 1e6, level))
    return found
