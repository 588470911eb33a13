"""What a training run did, and the weights that it leaves the model with."""

from dataclasses import asdict, dataclass

from lion_fast.training.epoch import best_epoch
from lion_fast.training.memory import PeakMemory
from lion_fast.training.setup import Setup
from lion_fast.training.state import State


@dataclass
class FitResult:
    """What a training run did.

    Attributes:
        history: One dict per epoch, the rows of metrics.csv.
        best_epoch: Epoch (from 1) whose weights the model now has, by `keep`.
        epochs: Epochs that were run.
        steps: Optimiser steps that were run.
        stopped_early: Early stopping ended the run.
        seconds: Time in optimiser steps (and in computing features once, be it by an earlier run with the
            same store), reading included, validation not.
        peak_memory_bytes: Most memory in use during training, see `memory_measured`.
        memory_measured: How the memory was measured.
        cached_features: The features were computed once.
        device: Device type.
        processes: Processes that took part.
        pruning: What was kept, as `RobustPruner.report` says it; None where nothing was pruned.
        chosen: What was open in the model and how it was chosen, as `choosing.choose` says it; None where
            nothing was.
    """

    history: list[dict]
    best_epoch: int
    epochs: int
    steps: int
    stopped_early: bool
    seconds: float
    peak_memory_bytes: int
    memory_measured: str
    cached_features: bool
    device: str
    processes: int
    pruning: dict | None = None
    chosen: dict | None = None

    def to_dict(self) -> dict:
        """JSON-able."""
        return asdict(self)


def finish(setup: Setup, state: State, stopped: bool, memory: PeakMemory) -> FitResult:
    """Give the model the weights of the epoch to keep, pruned where the run prunes."""
    model, history, pruner = setup.model, state.history, setup.pruner
    kept = len(history) - 1
    if state.best is not None and setup.config.keep == "best":
        model.load_adapter_state_dict(state.best)
        kept = best_epoch(setup, history)
    if pruner is not None:  # behind it: the best of a run too short to be cut is not pruned yet
        pruner.finalize()
    model.eval()
    return FitResult(
        history=history,
        best_epoch=kept + 1,
        epochs=len(history),
        steps=state.step,
        stopped_early=stopped,
        seconds=state.seconds,
        peak_memory_bytes=memory.bytes,
        memory_measured=memory.how,
        cached_features=setup.items.cached,
        device=setup.accelerator.device.type,
        processes=setup.accelerator.num_processes,
        pruning=pruner.report() if pruner is not None else None,
        chosen=model.chosen,
    )
