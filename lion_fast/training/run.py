"""A training run on Accelerate: set up, steps, epochs, checkpoints, and the best weights at the end."""

import contextlib
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lion_fast.errors import CheckpointError, LionError, WriteError, check_kind, check_path
from lion_fast.files import output_folder, say_once
from lion_fast.training import checkpoints, choosing
from lion_fast.training.accelerator import make_accelerator
from lion_fast.training.checks import check_run, name_classes
from lion_fast.training.config import TrainConfig
from lion_fast.training.epoch import end_epoch, patience_is_over
from lion_fast.training.features import FeatureStore
from lion_fast.training.logs import Logs
from lion_fast.training.memory import PeakMemory
from lion_fast.training.metrics import NotFinite
from lion_fast.training.order import derive_seed, deterministic, private_generators, seed_everything
from lion_fast.training.result import FitResult, finish
from lion_fast.training.setup import Setup, set_up
from lion_fast.training.state import State, Sums, fingerprint, pack, unpack
from lion_fast.training.step import take_step
from lion_fast.training.stop import Interrupted, Interruption, Leave, TrainingError, quiet_worker

if TYPE_CHECKING:
    from accelerate import Accelerator

    from lion_fast.data import Splits
    from lion_fast.methods import TunedModel


def fit(
    model: "TunedModel",
    splits: "Splits",
    config: TrainConfig | None = None,
    out_dir: str | os.PathLike = "runs/fit",
    *,
    resume: bool | str = False,
    overwrite: bool = False,
    progress: bool | None = None,
    store: FeatureStore | None = None,
) -> FitResult:
    """Train the method and the head of a model; the backbone stays as it is.

    Writes `metrics.csv` (a row per epoch), `steps.csv` (a row every `log_every` steps) and `checkpoints/` to
    `out_dir`. Every random choice is a pure function of `config.seed`; the global generators are given back
    as they were. On one CPU process a resumed run ends with the same bits as one that was never interrupted.

    Args:
        model: A `TunedModel`. It is left on the training device with the weights of the best epoch (or the
            last, see `TrainConfig.keep`).
        splits: A `Splits`; its `train` images are learnt, its `val` images (may be None) judge the epochs.
        config: Training options; None: the defaults.
        out_dir: Where everything is written.
        resume: True or "latest", "previous", or the name of a checkpoint. False: a new run.
        overwrite: Allow a new run to delete the checkpoints of an earlier one in `out_dir`.
        progress: Show a progress bar on stderr; None: where stderr is a terminal, else a line an epoch.
        store: Features from earlier runs on these images, for further ones; None: this run's.

    Raises:
        CheckpointError: The output cannot be written, a checkpoint is damaged or of another run, or
            `out_dir` holds checkpoints and neither `resume` nor `overwrite` is given.
        DataError: No training images, one class only, or labels out of range.
        OptionError: Options that do not go together, or another run is writing to `out_dir`.
        TrainingError: The loss became NaN or infinite; the last checkpoint is from before.
        Interrupted: Ctrl-C or a termination signal; a checkpoint has been written.

    Example:
        >>> model = lion_fast.create("vit_tiny_patch16_224", "lion", num_classes=10)  # doctest: +SKIP
        >>> fit(model, lion_fast.load_data("photos/"), TrainConfig(epochs=5), "runs/a")  # doctest: +SKIP
    """
    check_kind("model", model, nn.Module)
    check_kind("config", config, TrainConfig, NoneType)
    check_kind("resume", resume, bool, str)
    check_path("out_dir", out_dir)
    config, store, out_dir = config or TrainConfig(), store or FeatureStore(), Path(out_dir)
    check_run(model, splits, config)
    name_classes(model, splits)
    checkpoints.prepare_output(out_dir, resume=resume, overwrite=overwrite)
    with private_generators(), Interruption() as interruption, deterministic(config.deterministic):
        accelerator = make_accelerator(config)
        main = accelerator.is_main_process
        bar = main and (sys.stderr.isatty() if progress is None else progress)
        with output_folder(out_dir) if main else contextlib.nullcontext():
            identity = fingerprint(model, splits, config)
            checkpoint = _open_output(out_dir, resume, identity, model, accelerator)
            seed_everything(derive_seed(config.seed, "start"))
            leave = interruption.leave_if_asked
            with PeakMemory(accelerator.device) as memory:
                chosen = _settle(model, splits, config, store, checkpoint, accelerator, bar, leave)
                if main and chosen and checkpoint is None and progress is not False:
                    say_once(choosing.in_words(chosen))
                setup = set_up(model, splits, config, accelerator, store, progress=bar, check=leave)
                if checkpoint is None:
                    seconds = setup.items.seconds + chosen.get("seconds", 0.0)
                    state = State(Sums(accelerator.device), seconds=seconds)
                else:
                    state = unpack(setup, checkpoint)
                lines = main and progress is None and not bar
                with Logs(out_dir, setup, state.step, bar=bar, lines=lines) as logs:
                    run = _Run(setup, state, logs, interruption, out_dir / checkpoints.FOLDER, identity)
                    stopped = run.train()
            return finish(setup, state, stopped, memory)


def _settle(model, splits, config, store, checkpoint, accelerator, bar, leave) -> dict:
    """Give what is open in the model its values, the checkpoint's where there is one; how they were found."""
    if not model.open:
        return {}
    chosen = checkpoint.state.get("chosen") if checkpoint is not None else None
    model.to(accelerator.device)
    if chosen is None and accelerator.is_main_process:
        how = {"progress": bar, "check": leave, "worker_init_fn": quiet_worker}
        how["num_workers"] = config.num_workers
        chosen = choosing.choose(model, splits.train, store, config, **how)
    if accelerator.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        (chosen,) = broadcast_object_list([chosen])
    try:
        values = {name: chosen[name] for name in ("at", "grid", "pooled", "state_dim") if name in chosen}
        model.settle(values, derive_seed(config.seed, "settle"))
    except (LionError, TypeError) as error:  # a checkpoint that somebody changed
        if checkpoint is None:
            raise
        raise checkpoints.unusable(checkpoint.path, error) from error
    model.chosen = chosen
    return chosen


def _open_output(
    out_dir: Path, resume: bool | str, identity: dict, model: "TunedModel", accelerator: "Accelerator"
) -> checkpoints.Checkpoint | None:
    """The checkpoint to go on from; for a new run None, and those of an earlier one are gone."""
    folder, checkpoint = out_dir / checkpoints.FOLDER, None
    if resume:
        checkpoint = checkpoints.read_checkpoint(checkpoints.find_checkpoint(folder, resume))
        checkpoints.check_fingerprint(checkpoint, identity)
    if accelerator.is_main_process:
        trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        checkpoints.check_room(out_dir, 4 * trained)
        for path in [] if resume else checkpoints.list_checkpoints(folder):
            checkpoints.remove(path)
    accelerator.wait_for_everyone()
    return checkpoint


@dataclass
class _Run:
    """The steps and epochs of a run; checkpoints go to `folder`."""

    setup: Setup
    state: State
    logs: Logs
    interruption: Interruption
    folder: Path
    identity: dict

    def train(self) -> bool:
        """Go on to the end of the run; whether that is an early one, because nothing got better."""
        setup, state, plan = self.setup, self.state, self.setup.plan
        batches, every = setup.batches(state.step), setup.config.checkpoint_every
        if len(state.history) < plan.epoch_of(state.step):  # interrupted while validating
            self._end_epoch()
        while not patience_is_over(setup, state.history):
            if state.step == plan.steps:
                return False
            started = time.perf_counter()
            loss = take_step(setup, state.sums, state.step, batches)
            row = self._look(loss)
            state.epoch_seconds += time.perf_counter() - started
            state.step += 1
            self.logs.bar.update()
            if row is not None:
                self._log(self.logs.add_step, row)
            if self.interruption.asked_of_any(setup.accelerator):
                raise Interrupted(self._save())
            if state.step % plan.steps_per_epoch == 0:
                self._end_epoch()
            elif every and state.step % every == 0:
                self._save()
        return True

    def _look(self, mean_loss: Tensor) -> dict | None:
        """Wait for the device where it is due, refuse a loss that is not finite; a row to log, or None."""
        setup, state, step = self.setup, self.state, self.state.step
        done = step + 1
        log = done % setup.config.log_every == 0 or done % setup.plan.steps_per_epoch == 0
        if not log and setup.accelerator.device.type != "cpu":
            return None
        loss, total = setup.accelerator.reduce(mean_loss).item(), state.sums.loss.item()
        if not (math.isfinite(loss) and math.isfinite(total)):
            raise self._not_finite(step, f"the loss is {total if math.isfinite(loss) else loss}")
        if not log:
            return None
        found = {name: float(value) for name, value in setup.model.diagnostics().items()}
        for name, value in found.items():
            state.diagnostics.setdefault(name, []).append(value)
        epoch = setup.plan.epoch_of(step) + 1
        return {"step": done, "epoch": epoch, "lr": setup.lr(step), "loss": loss} | found

    def _log(self, add: Callable, what: object) -> None:
        """Log; where the log cannot be written, the run stops with a checkpoint that it can go on from."""
        try:
            add(what)
        except WriteError as error:
            if self.setup.accelerator.num_processes == 1:  # several would have to meet for it
                with contextlib.suppress(CheckpointError):
                    self._save()
            found = checkpoints.list_checkpoints(self.folder)
            hint = f"resume from {found[-1]}" if found else "start again"
            raise CheckpointError(f"{error}, then {hint}") from error

    def _end_epoch(self) -> None:
        setup, state, config = self.setup, self.state, self.setup.config
        alone = setup.accelerator.num_processes == 1
        self._check_finite()
        try:
            end_epoch(setup, state, self.interruption.leave_if_asked if alone else None)
        except Leave:
            raise Interrupted(self._save()) from None
        except NotFinite as error:
            raise self._not_finite(
                state.step - 1, "an output for the validation images is not finite"
            ) from error
        self._log(self.logs.add_epoch, state.history)
        epochs, every = config.checkpoint_epochs, config.checkpoint_every
        if (epochs and len(state.history) % epochs == 0) or (every and state.step % every == 0):
            self._save()

    def _save(self) -> Path:
        self._check_finite()
        tensors, told = pack(self.setup, self.state)
        if self.setup.accelerator.is_main_process:
            told |= {"fingerprint": self.identity, "chosen": self.setup.model.chosen}
            checkpoints.write_checkpoint(self.folder, self.state.step, tensors, told)
        self.setup.accelerator.wait_for_everyone()
        return self.folder / f"step-{self.state.step:08d}"

    def _check_finite(self) -> None:
        for name, parameter in self.setup.trained.items():
            if not torch.isfinite(parameter).all():
                raise self._not_finite(self.state.step - 1, f"the parameter {name} is not finite")

    def _not_finite(self, step: int, what: str) -> TrainingError:
        found = checkpoints.list_checkpoints(self.folder)
        last = f"the last good checkpoint is {found[-1]}" if found else "there is no checkpoint yet"
        return TrainingError(f"{what} at step {step + 1}; {last}. Try a lower lr, more warm-up or clip_norm")
