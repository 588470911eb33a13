"""What is measured of a model: its equilibria, the time of its steps part by part, its memory, a trace."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lion_fast.errors import OptionError, check_choice, check_whole
from lion_fast.files import make_folder, writing
from lion_fast.inspection import measure_ends, parameter_counts
from lion_fast.methods import TunedModel
from lion_fast.studies.environment import context
from lion_fast.studies.measuring import host_seconds, quantiles, spread, wait
from lion_fast.studies.memory import cuda_activations, peak_bytes, resident_bytes, saved_bytes
from lion_fast.studies.profiling import report, snapshot
from lion_fast.studies.profiling.parts import PARTS, PHASES, Clock, Place, Ranges, name_of
from lion_fast.studies.profiling.step import Step
from lion_fast.training.config import TrainConfig
from lion_fast.training.features import features_are_constant

FORMAT = 1
MODES = ("train", "infer")
OPTIMIZERS = ("adamw", "sgd")
TOP_OPERATORS = 12


def profile_model(
    model: TunedModel,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    modes: Sequence[str] = MODES,
    steps: int = 10,
    warmup: int = 3,
    mixed_precision: str = "no",
    optimizer: str = "adamw",
    out: str | Path | None = None,
    images_are: str = "given",
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Time, memory and equilibria of a model's steps on one batch; everything JSON-able.

    model: a `TunedModel` on the CPU or a CUDA device. It is given back as it was.
    images: (B, 3, H, W). How many iterations an equilibrium takes depends on them.
    labels: (B); None: zeros.
    modes: "train" (forward, backward, optimiser) and "infer". Where `fit` would compute the backbone's rows
        once, "train" also gives "cached", a step on such rows.
    steps: how many steps of each kind are timed plainly, and, in turns with them, part by part.
    warmup: steps before them.
    mixed_precision: "no", "bf16", or "fp16" on CUDA.
    optimizer: "adamw" or "sgd" with momentum; its learning rate is 0, so that all steps are the same.
    out: folder for report.md, profile.json, plots and traces; on CUDA the allocator's snapshots too.
    images_are: what the report says of the images.
    say: called with a line before each measurement.

    Raises `OptionError` on an option out of its range. An interrupted call leaves in `out` what is known.

    >>> import lion_fast
    >>> small = lion_fast.load_backbone("vit_tiny_patch16_224", pretrained=False, img_size=32, depth=2)
    >>> model = lion_fast.create(small, "lion", num_classes=4)
    >>> found = profile_model(model, torch.randn(2, 3, 32, 32), modes=["infer"], steps=2)
    >>> sorted(found["modes"]["infer"]["parts"]["forward"])
    ['backbone', 'head', 'method', 'output end']
    """
    for mode in modes:
        check_choice("mode", mode, MODES)
    check_whole("steps", steps)
    check_whole("warmup", warmup, 0)
    check_choice("mixed_precision", mixed_precision, ("no", "bf16", "fp16"))
    check_choice("optimizer", optimizer, OPTIMIZERS)
    device = next(model.parameters()).device
    if device.type not in ("cpu", "cuda"):
        raise OptionError(f"profiling knows cpu and cuda devices; the model is on {device}")
    if mixed_precision == "fp16" and device.type == "cpu":
        raise OptionError(
            "mixed_precision='fp16' cannot run here: it needs an accelerator; a CPU has bf16 or no"
        )
    images = images.to(device)
    labels = torch.zeros(len(images), dtype=torch.long) if labels is None else labels
    kinds = [kind for mode in modes for kind in _kinds(model, mode)]
    folder = None if out is None else Path(out)
    found = _about(model, images, images_are, mixed_precision, optimizer, device)
    with _as_it_was(model):
        try:
            say("equilibria")
            model.eval()
            found["ends"] = measure_ends(model, images)
            for kind in kinds:
                step = Step(model, images, labels.to(device), kind, mixed_precision, optimizer)
                _measure(step, found["modes"].setdefault(kind, {}), folder, steps, warmup, say)
        except KeyboardInterrupt:
            found["interrupted"] = True
            raise
        finally:
            if folder is not None:
                report.write(found, folder)
    return found


def _kinds(model: TunedModel, mode: str) -> list[str]:
    constant = mode == "train" and features_are_constant(model, TrainConfig())
    return [mode, "cached"] if constant else [mode]


def _about(model, images: Tensor, images_are: str, mixed_precision: str, optimizer: str, device) -> dict:
    backbone = model.backbone
    return {
        "format": FORMAT,
        "taken": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **context(device),
        "method": model.method,
        "options": model.options,
        "num_classes": model.num_classes,
        "parameters": parameter_counts(model),
        "backbone": backbone.name,
        "weights_source": backbone.weights_source,
        "weights_sha256": backbone.weights_sha256,
        "img_size": list(images.shape[-2:]),
        "batch_size": len(images),
        "images": images_are,
        "mixed_precision": mixed_precision,
        "held_in": backbone.precision,
        "memory": backbone.memory,
        "folded": backbone.folded,
        "optimizer": optimizer,
        "ends": {},
        "modes": {},
    }


@contextmanager
def _as_it_was(model: TunedModel) -> Iterator[None]:
    """Trained values, gradients and mode of a model are given back behind it."""
    training = model.training
    trained = [(p, p.detach().to("cpu", copy=True), p.grad) for p in model.trainable_parameters()]
    try:
        yield
    finally:
        with torch.no_grad():
            for p, value, grad in trained:
                p.copy_(value)  # a gradient that is not finite moves it even at a rate of 0
                p.grad = grad
        model.train(training)


def _measure(step: Step, told: dict, folder: Path | None, steps: int, warmup: int, say) -> None:
    """Fill `told` with everything about one kind of step, the cheapest first."""
    kind = step.kind
    say(f"{kind}: first step")
    told["first_step_seconds"] = host_seconds(step.run, step.device)
    say(f"{kind}: memory")
    told |= _memory(step)
    if diagnostics := step.model.diagnostics():
        told["diagnostics"] = diagnostics
    for i in range(warmup):
        say(f"{kind}: warm-up step {i + 1} of {warmup}")
        step.run()
    told |= _times(step, steps, lambda i: say(f"{kind}: step {i} of {steps}"))
    say(f"{kind}: trace")
    told |= _trace(step, folder)
    if folder is not None and step.device.type == "cuda":
        say(f"{kind}: the allocator's snapshot")
        told["snapshot"] = snapshot.take(step, folder)


def _times(step: Step, steps: int, say: Callable[[int], None]) -> dict[str, Any]:
    """Plain steps, and in turns with them steps with a clock that tells their parts."""
    clock = Clock(step.model, step.device)
    plain, clocked = [], []
    for i in range(steps):
        say(i + 1)
        plain.append(host_seconds(step.run, step.device))
        clocked.append(clocked_step(step, clock))
    return {
        **spread("seconds", plain),
        "images_per_second": len(step.labels) / quantiles(plain)[0],
        "clocked": spread("seconds", [sum(found.values()) for found in clocked]),
        "parts": _by_part(clocked),
        "steps": [
            {"seconds": sum(found.values())} | {name_of(place): s for place, s in found.items()}
            for found in clocked
        ],
    }


def clocked_step(step: Step, clock: Clock) -> dict[Place, float]:
    """Seconds of one step by place; what is at no part's place is ("other", "other")."""
    with clock:
        clock.enter(("other", "other"))
        step.run(clock)
        found = clock.seconds()
    # from the call of a backward to its first node it is nobody's
    found[("other", "other")] += found.pop(("backward", "other"), 0.0)
    return found


def _by_part(clocked: list[dict[Place, float]]) -> dict[str, dict[str, dict]]:
    """Phase, part: median and quantiles over the steps, and the share of the time of all of them."""
    whole = sum(sum(found.values()) for found in clocked)
    told: dict[str, dict[str, dict]] = {}
    for phase in PHASES:
        for part in PARTS:
            seconds = [found.get((phase, part), 0.0) for found in clocked]
            if any((phase, part) in found for found in clocked):
                told.setdefault(phase, {})[part] = spread("seconds", seconds) | {
                    "share": sum(seconds) / whole
                }
    return told


def _memory(step: Step) -> dict[str, Any]:
    peak, how = peak_bytes(step.run, step.device)
    told: dict[str, Any] = {"peak_bytes": peak, "peak_measured": how}
    told["resident_bytes"] = resident_bytes(step.model, step.optimizer)
    if step.train:
        exclude = [step.inputs, step.labels]
        told["activation_bytes"] = saved_bytes(step.model, step.loss, exclude)
        if step.device.type == "cuda":
            told["allocator_bytes"] = cuda_activations(step.model, step.loss, exclude)
    else:
        told["resident_bytes"] |= {"gradients": 0, "optimiser": 0}  # a step without them
    return told


def _trace(step: Step, folder: Path | None) -> dict[str, Any]:
    """One step under torch's profiler: its slowest operators, and the trace where there is a folder."""
    from torch.profiler import ProfilerActivity, profile

    cuda = step.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiler, Ranges(step.model) as ranges:
        step.run(ranges)
        wait(step.device)
    told: dict[str, Any] = {"operators": _operators(profiler, ranges.names, cuda)}
    if folder is not None:
        make_folder(folder)
        told["trace"] = f"trace-{step.kind}.json"
        with writing(folder / told["trace"]):
            profiler.export_chrome_trace(str(folder / told["trace"]))
    return told


def _operators(profiler, ranges: set[str], cuda: bool) -> list[dict[str, Any]]:
    """The operators with the most time of their own, on the device or, without one, on the CPU."""
    rows = [
        {
            "name": row.key,
            "calls": row.count,
            "cpu_seconds": row.self_cpu_time_total / 1e6,
            "device_seconds": row.self_device_time_total / 1e6,
        }
        for row in profiler.key_averages()
        if row.key not in ranges
    ]
    rows.sort(key=lambda row: row["device_seconds" if cuda else "cpu_seconds"], reverse=True)
    return rows[:TOP_OPERATORS]
