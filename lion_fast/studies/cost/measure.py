"""One setting measured: its contenders built and checked, then timed in turns beside their floor."""

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from lion_fast.errors import BackboneError, LionError, OptionError
from lion_fast.studies.cost.models import NUM_CLASSES, SEED, Backbones, batch
from lion_fast.studies.cost.setting import FLOOR, Contender, Setting
from lion_fast.studies.cost.step import FloorStep, Step
from lion_fast.studies.cost.timing import summary, take_turns
from lion_fast.studies.environment import context
from lion_fast.studies.measuring import wait


class DeviceLost(LionError, RuntimeError):
    """The device itself failed: nothing works on it any more in this process, but in a new one.

    `rows`: what is known of the setting, the failed row of `key` included.
    """

    def __init__(self, key: str, rows: list[dict]):
        super().__init__(f"the device failed in {key}")
        self.key, self.rows = key, rows


class _FloorBroke(Exception):
    """The floor broke while contenders were timed beside it."""


def is_lost(error: BaseException) -> bool:
    """Whether an error is one of the CUDA device, which every later call of the process repeats.

    >>> is_lost(RuntimeError("CUDA error: an illegal memory access was encountered"))
    True
    >>> is_lost(RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"))
    False
    """
    told = str(error)
    own = isinstance(error, getattr(torch, "AcceleratorError", ()))  # since torch 2.8
    return own or "CUDA error" in told or "Triton Error [CUDA]" in told


def measure(
    setting: Setting,
    contenders: Sequence[Contender],
    *,
    device: torch.device | str = "cpu",
    rounds: int = 7,
    where: dict[str, Any] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[dict]:
    """Rows of one setting, the floor's first.

    Everything is built and checked before anything is timed: the two forms of a method must agree in outputs
    and gradients, a merged model with the model it came from, a compiled model with the eager one. Then
    `timing.take_turns`; a contender's ratio is its time over the floor's, interpolated between the two runs
    of the floor around it. `where`: the rows' context, else taken now.

    A contender that does not work on this backbone gives a row with status "skipped", one that breaks or
    disagrees "failed", both with the reason; the others go on. `DeviceLost` where they cannot.
    """
    device = torch.device(device)
    with _room_to_compile() if setting.engine != "eager" else contextlib.nullcontext():
        return _measure(setting, contenders, device, rounds, where or context(device), say)


@contextlib.contextmanager
def _room_to_compile() -> Iterator[None]:
    """Every model is another specialisation of one forward: past its limit dynamo would go eager silently."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(
        cache_size_limit=1000, accumulated_cache_size_limit=10_000, fail_on_cache_limit_hit=True
    ):
        yield
    torch._dynamo.reset()


def _measure(setting, contenders, device: torch.device, rounds: int, where, say) -> list[dict]:
    backbones = Backbones(setting, device)
    images, labels = batch(backbones.get("floor"), setting.batch_size, device)
    rows: dict[Contender, dict] = {}
    steps: dict[Contender, Step] = {}

    def broke(contender: Contender, error: Exception) -> None:
        row = rows[contender]
        row |= {"status": "failed", "reason": f"{type(error).__name__}: {str(error).strip()[:500]}"}
        if is_lost(error):
            # what is ready but not timed is no result
            raise DeviceLost(row["key"], [r for r in rows.values() if r["status"] != "ok"]) from error
        if contender == FLOOR and contender in steps:
            raise _FloorBroke from error

    for contender in [FLOOR, *contenders]:
        say(f"{setting.key()}  prepare {contender.label()}")
        rows[contender] = row = _row(setting, contender, backbones, where)
        try:
            kind = FloorStep if contender == FLOOR else Step
            step = kind(setting, contender, backbones, images, labels)
            row |= step.describe()
            wait(device)  # an error of this contender must not show in the next
            steps[contender] = step
        except (BackboneError, OptionError) as error:
            row |= {"status": "skipped", "reason": str(error)}
        except Exception as error:  # of whatever kind: one contender must not cost the others their rows
            broke(contender, error)
        if rows[FLOOR]["status"] != "ok":
            break  # nothing to compare with
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    try:
        times, floors = take_turns(
            steps, rounds, lambda i: say(f"{setting.key()}  round {i} of {rounds}"), broke
        )
    except _FloorBroke:
        times, floors = {}, {}
    for contender, row in rows.items():
        if contender in times:
            row |= summary(times[contender], floors[contender], setting.batch_size)
        elif row["status"] == "ok":
            row |= {"status": "failed", "reason": f"not timed, the floor broke: {rows[FLOOR]['reason']}"}
    return list(rows.values())


def _row(setting: Setting, contender: Contender, backbones: Backbones, where: dict) -> dict[str, Any]:
    backbone = backbones.get(contender.method)
    return {
        "key": f"{setting.key()}/{contender.label()}",
        "setting": setting.key(),
        "status": "failed",
        "reason": None,
        "method": contender.method,
        "label": contender.label(),
        "form": contender.form,
        "options": dict(contender.options),
        "num_classes": NUM_CLASSES,
        "backbone": backbone.name,
        "weights_source": backbone.weights_source,
        "weights_sha256": backbone.weights_sha256,
        "img_size": backbone.img_size,
        "mean": list(backbone.mean),
        "std": list(backbone.std),
        "interpolation": backbone.interpolation,
        "mode": setting.mode,
        "batch_size": setting.batch_size,
        "dtype": setting.dtype,
        "held_in": backbone.precision,
        "engine": setting.engine,
        "memory": backbone.memory,
        "folded": backbone.folded,
        "seed": SEED,
        **where,
        "taken": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
