"""How far a run is, and what of it a checkpoint holds, so that it goes on with the same bits."""

import collections
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lion_fast.errors import CheckpointError, LionError, check_whole
from lion_fast.pruning.packing import MASK
from lion_fast.training.checkpoints import Checkpoint, unusable
from lion_fast.training.config import TrainConfig
from lion_fast.training.metrics import exact_dtype
from lion_fast.training.setup import Setup

if TYPE_CHECKING:
    from lion_fast.data import Splits
    from lion_fast.methods import TunedModel

_PRUNER_TENSORS = ("masks", "scores", "growth")
_MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}
_PROGRESS = ("step", "history", "seconds", "epoch_seconds", "diagnostics")


class Sums:
    """Running totals of one epoch on this process; on the device, so that adding does not wait for it."""

    def __init__(self, device: torch.device) -> None:
        self.loss = torch.zeros((), dtype=exact_dtype(device), device=device)
        self.correct = torch.zeros_like(self.loss)
        self.images = 0  # of all processes


@dataclass
class State:
    """What changes in a run, beside the model, its optimiser and its pruner.

    Attributes:
        sums: Totals of the epoch that is going on.
        step: Optimiser steps done.
        history: One dict per epoch, the rows of metrics.csv.
        seconds: Time in the steps of whole epochs, and in computing features once.
        epoch_seconds: Time in the steps of the epoch that is going on.
        diagnostics: The model's diagnostics in that epoch, by name.
        best: Weights of the best epoch; None before there is one.
    """

    sums: Sums
    step: int = 0
    history: list[dict] = field(default_factory=list)
    seconds: float = 0.0
    epoch_seconds: float = 0.0
    diagnostics: dict[str, list[float]] = field(default_factory=dict)
    best: dict[str, Tensor] | None = None


def pack(setup: Setup, state: State) -> tuple[dict[str, Tensor], dict]:
    """The tensors and the JSON-able rest of a checkpoint; every process has to call it."""
    sums, accelerator = state.sums, setup.accelerator
    loss, correct = accelerator.reduce(sums.loss), accelerator.reduce(sums.correct)
    pruner = setup.pruner.state_dict() if setup.pruner is not None else {}
    parts = {"model": setup.model.adapter_state_dict(), "best": state.best or {}}
    states = setup.optimizer.optimizer.state
    for name, parameter in setup.trained.items():
        found = {k: torch.as_tensor(v) for k, v in states.get(parameter, {}).items() if v is not None}
        parts[f"optimizer/{name}"] = found
    parts |= {f"pruner/{part}": pruner[part] for part in _PRUNER_TENSORS if pruner}
    tensors = {f"{part}/{name}": tensor for part, found in parts.items() for name, tensor in found.items()}
    return tensors, {
        "pruner": {k: v for k, v in pruner.items() if k not in _PRUNER_TENSORS},
        "progress": {name: getattr(state, name) for name in _PROGRESS},
        "sums": {"loss": loss.item(), "correct": correct.item(), "images": sums.images},
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
    }


def unpack(setup: Setup, checkpoint: Checkpoint) -> State:
    """The state in a checkpoint, after its tensors have gone to the model, the optimiser and the pruner.

    Raises `CheckpointError` where it holds something else than this run writes.
    """
    try:
        return _unpack(setup, checkpoint)
    except (
        LionError,
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        told = f"{type(error).__name__} {error}" if isinstance(error, KeyError) else error
        raise unusable(checkpoint.path, told) from error


def _unpack(setup: Setup, checkpoint: Checkpoint) -> State:
    parts: dict[str, dict[str, Tensor]] = collections.defaultdict(dict)
    for name, tensor in checkpoint.tensors.items():
        part, key = name.rsplit("/", 1)
        parts[part][key] = tensor.to(setup.accelerator.device, copy=True)
    setup.model.load_adapter_state_dict(parts["model"])
    foreign = [p for p in parts if p.startswith("optimizer/") and p[len("optimizer/") :] not in setup.trained]
    if foreign:
        raise CheckpointError(
            f"the checkpoint holds an optimiser's state of {', '.join(foreign[:3])}, which this model "
            "does not train: an older lion-fast trained it in another form. Begin the run anew"
        )
    if parts["best"]:
        own = setup.model.adapter_state_dict().items()  # the best may be from before it was pruned
        own = {k: v for k, v in own if k in parts["best"] or not k.endswith(MASK)}
        _check_shapes("the best epoch's state", parts["best"], own)
    for name, parameter in setup.trained.items():
        found = parts[f"optimizer/{name}"]
        wanted = dict.fromkeys(_MOMENTS[setup.config.optimizer], parameter)
        wanted |= {"step": torch.zeros(())} if "exp_avg" in wanted else {}
        _check_shapes(f"the optimiser's state of {name}", found, wanted if found else {})
        for key, tensor in found.items():
            # Adam counts its steps on the CPU
            setup.optimizer.optimizer.state[parameter][key] = tensor.cpu() if key == "step" else tensor
    told = checkpoint.state
    _check_progress(setup, **told["progress"], **{f"sum_{k}": v for k, v in told["sums"].items()})
    if setup.pruner is not None:
        found = {part: parts[f"pruner/{part}"] for part in _PRUNER_TENSORS}
        setup.pruner.load_state_dict(told["pruner"] | found)
    if told["scaler"]:
        setup.accelerator.scaler.load_state_dict(told["scaler"])
    sums = Sums(setup.accelerator.device)
    if setup.accelerator.is_main_process:  # sums are added up over the processes
        sums.loss += told["sums"]["loss"]
        sums.correct += told["sums"]["correct"]
    sums.images = told["sums"]["images"]
    return State(sums, **told["progress"], best=parts["best"] or None)


def _check_shapes(what: str, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    for name in found.keys() | wanted.keys():
        mine, its = wanted.get(name), found.get(name)
        if mine is None or its is None or (mine.shape, mine.dtype) != (its.shape, its.dtype):
            raise ValueError(f"{what} does not fit at {name}")
        if not torch.isfinite(its).all():
            raise ValueError(f"{what} is not finite at {name}")


def _check_progress(
    setup: Setup, *, step, history, seconds, epoch_seconds, diagnostics, sum_loss, sum_correct, sum_images
) -> None:
    """`OptionError` or `ValueError` for what would break the run later on."""
    check_whole("step", step, 0, setup.plan.steps)
    numbers = {"seconds": seconds, "epoch_seconds": epoch_seconds, "loss": sum_loss, "correct": sum_correct}
    named = [*numbers.items(), *((key, x) for row in history for key, x in row.items())]
    named += [(key, x) for key, values in diagnostics.items() for x in values]
    for key, value in named:
        if not isinstance(value, (int, float)):  # one that is not finite may have been logged
            raise ValueError(f"{key} is no number: {value!r:.40}")
    wanted = {"epoch", "step", "lr", "train_loss", "train_accuracy", "seconds"}
    if setup.items.val is not None:
        wanted |= {"val_accuracy", "val_balanced_accuracy", "val_loss"}
    epochs = setup.plan.epoch_of(step)
    between = step % setup.plan.steps_per_epoch == 0  # it may have been left while validating
    if len(history) not in {epochs, epochs - between} or not all(wanted <= row.keys() for row in history):
        raise ValueError(f"its history is not that of {epochs} epochs")
    check_whole("images", sum_images, 0 if between and len(history) == epochs else 1)
    if not all(diagnostics.values()):
        raise ValueError("its diagnostics are empty")


def fingerprint(model: "TunedModel", splits: "Splits", config: TrainConfig) -> dict:
    """What a run must have in common with a checkpoint to go on from it; JSON-able."""
    backbone = model.backbone
    options = model.options | dict.fromkeys(model.settled)  # as it was before they were chosen
    return {
        "method": model.method,
        "options": _plain(model.known_before(options)),
        "num_classes": model.num_classes,
        "backbone": {
            "name": backbone.name,
            "sha256": backbone.weights_sha256,
            "img_size": _plain(backbone.img_size),
            # as it was before there was a choice, so that checkpoints of then still resume
            **({"resize": "direct"} if getattr(backbone, "resize", "crop") == "direct" else {}),
        },
        "data": {name: _digest(getattr(splits, name)) for name in ("train", "val")},
        "config": config.to_fingerprint(),
    }


def _digest(items) -> dict | None:
    if not items:
        return None
    labels = torch.as_tensor(items.labels).tolist() if hasattr(items, "labels") else []
    content = repr((len(items), labels, list(getattr(items, "names", [])))).encode()
    return {"images": len(items), "sha256": hashlib.sha256(content).hexdigest()}


def _plain(value: object) -> object:
    """As it comes back from JSON."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
