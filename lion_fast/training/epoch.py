"""The end of an epoch: validation, its row of metrics.csv, and which epoch is the best."""

from collections.abc import Callable

from lion_fast.training.metrics import evaluate
from lion_fast.training.setup import Setup
from lion_fast.training.state import State, Sums


def end_epoch(setup: Setup, state: State, check: Callable[[], None] | None) -> None:
    """Validate, add a row to the history, and keep the weights where they are the best so far.

    check: called after each batch of validation; may raise to leave, and then nothing has changed.
    """
    sums = state.sums
    loss, correct = setup.accelerator.reduce(sums.loss), setup.accelerator.reduce(sums.correct)
    row = {
        "epoch": setup.plan.epoch_of(state.step),
        "step": state.step,
        "lr": setup.lr(state.step - 1),
        "train_loss": loss.item() / sums.images,
        "train_accuracy": correct.item() / sums.images,
    }
    if setup.items.val is not None:
        found = evaluate(
            setup.model.behind() if setup.items.cached else setup.model,
            setup.items.val,
            setup.config.eval_batch_size or setup.config.batch_size,
            num_classes=setup.model.num_classes,
            num_workers=setup.num_workers,
            mixed_precision=setup.precision,
            accelerator=setup.accelerator,
            check=check,
        )
        row["val_accuracy"] = found.accuracy
        row["val_balanced_accuracy"] = found.balanced_accuracy
        row["val_loss"] = found.loss
    row |= {name: sum(values) / len(values) for name, values in state.diagnostics.items()}
    row["seconds"] = state.epoch_seconds
    state.history.append(row)
    state.seconds += state.epoch_seconds
    state.epoch_seconds, state.diagnostics, state.sums = 0.0, {}, Sums(setup.accelerator.device)
    if setup.items.val is not None and best_epoch(setup, state.history) == len(state.history) - 1:
        weights = setup.model.adapter_state_dict()
        state.best = {name: tensor.detach().clone() for name, tensor in weights.items()}


def best_epoch(setup: Setup, history: list[dict]) -> int:
    """Index of the best epoch by `monitor`, then by loss, then the earliest.

    Of a pruned run, among those that ended with the pruned weights, once there are any.
    """
    name, last = f"val_{setup.config.monitor}", len(history) - 1
    sign = -1.0 if setup.config.monitor == "loss" else 1.0
    return max(
        range(min(setup.first_pruned, last), last + 1),
        key=lambda i: (sign * history[i][name], -history[i]["val_loss"], -i),
    )


def patience_is_over(setup: Setup, history: list[dict]) -> bool:
    """Whether `early_stop` epochs have passed since the best one."""
    patience = setup.config.early_stop
    return bool(patience and history) and len(history) - 1 - best_epoch(setup, history) >= patience
