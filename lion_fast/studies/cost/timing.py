"""Steps timed in turns beside their floor, so that a machine that slows down by and by shows in no ratio."""

import math
import statistics
from collections.abc import Callable, Mapping
from typing import Any

from lion_fast.studies.cost.setting import FLOOR, Contender
from lion_fast.studies.cost.step import Step
from lion_fast.studies.measuring import host_seconds, spread

# Timed at once in a round, at least; on a GPU a step may take a millisecond
ROUND_SECONDS = {"cpu": 0.0, "cuda": 0.1}
# Contenders between two runs of the floor
FLOOR_EVERY = 2

Times = dict[Contender, list[float]]


def take_turns(
    steps: Mapping[Contender, Step],
    rounds: int,
    say: Callable[[int], None],
    broke: Callable[[Contender, Exception], None],
) -> tuple[Times, Times]:
    """Seconds per step of every contender, one number per round, and of the floor at the same moments.

    Every round runs every contender once (on a GPU: for a tenth of a second), in an order that rotates, and
    the floor before and after every `FLOOR_EVERY` of them. One that breaks is told to `broke`, which raises
    where the others cannot go on, and is in neither.
    """
    times: Times = {contender: [] for contender in steps}
    floors: Times = {contender: [] for contender in steps}

    def timed_or_out(contender: Contender, repeats: int) -> float | None:
        try:
            return timed(steps[contender], repeats)
        except Exception as error:
            broke(contender, error)
            del times[contender], floors[contender]
            return None

    repeats = {}
    for contender, step in steps.items():
        timed_or_out(contender, 1)  # warms up
        if contender in times and (seconds := timed_or_out(contender, 1)) is not None:
            least = ROUND_SECONDS.get(step.device.type, 0.0)
            repeats[contender] = max(1, math.ceil(least / max(seconds, 1e-6)))
    for i in range(rounds if FLOOR in steps else 0):
        say(i + 1)
        rivals = [contender for contender in times if contender != FLOOR]
        turn = i % max(len(rivals), 1)
        order = rivals[turn:] + rivals[:turn]
        before = timed_or_out(FLOOR, repeats[FLOOR])
        own = [before]
        for start in range(0, len(order), FLOOR_EVERY):
            some = order[start : start + FLOOR_EVERY]
            for contender in some:
                if (seconds := timed_or_out(contender, repeats[contender])) is not None:
                    times[contender].append(seconds)
            after = timed_or_out(FLOOR, repeats[FLOOR])
            for k, contender in enumerate(some, 1):
                if contender in times:
                    floors[contender].append(before + (after - before) * k / (len(some) + 1))
            before = after
            own.append(after)
        times[FLOOR].append(statistics.fmean(own))
        floors[FLOOR].append(times[FLOOR][-1])
    return times, floors


def timed(step: Step, repeats: int) -> float:
    """Seconds a run, over some runs."""
    return host_seconds(step.run, step.device, repeats)


def summary(seconds: list[float], floor: list[float], batch_size: int) -> dict[str, Any]:
    """What a row says of a contender's times and those of the floor at the same moments."""
    told = {"rounds": len(seconds)} | spread("seconds", seconds)
    told |= spread("ratio", [a / b for a, b in zip(seconds, floor, strict=True)])
    told["images_per_second"] = batch_size / told["seconds"]
    told["floor_seconds"] = statistics.median(floor)
    return told
