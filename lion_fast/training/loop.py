"""The fit loop on Accelerate: one optimiser step is the same numbers however it is shared out."""

import contextlib
import csv
import hashlib
import io
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from lion_fast.errors import CheckpointError, DataError, LionError, OptionError
from lion_fast.files import write_atomically
from lion_fast.pruning import RobustPruner
from lion_fast.training import checkpoints
from lion_fast.training.config import TrainConfig
from lion_fast.training.features import FeatureStore, RowsTooLarge, encode
from lion_fast.training.memory import PeakMemory
from lion_fast.training.metrics import Metrics, autocast, check_labels, evaluate, with_transform
from lion_fast.training.order import (
    Plan,
    SeededItems,
    ShareSampler,
    derive_seed,
    private_generators,
    seed_everything,
)

_PRUNER_TENSORS = ("masks", "scores", "growth")


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop (Ctrl-C, or a termination signal) and has written a checkpoint.

    Attributes:
        checkpoint: The checkpoint to resume from.
    """

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(f"interrupted; the checkpoint {checkpoint} is written, resume to continue from it")
        self.checkpoint = checkpoint


class TrainingError(LionError, RuntimeError):
    """Training that cannot go on: the loss or a parameter is not finite."""


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

    def to_dict(self) -> dict:
        """JSON-able."""
        return asdict(self)


def fit(
    model: nn.Module,
    splits,
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
        store: Rows of the frozen part from earlier runs on these images, for further ones; None: this run's.

    Raises:
        CheckpointError: The output cannot be written, a checkpoint is damaged or of another run, or
            `out_dir` holds checkpoints and neither `resume` nor `overwrite` is given.
        DataError: No training images, one class only, or labels out of range.
        OptionError: Options that do not go together.
        TrainingError: The loss became NaN or infinite; the last checkpoint is from before.
        Interrupted: Ctrl-C or a termination signal; a checkpoint has been written.

    Example:
        >>> model = lion_fast.create("vit_tiny_patch16_224", "lion", num_classes=10)  # doctest: +SKIP
        >>> fit(model, lion_fast.load_data("photos/"), TrainConfig(epochs=5), "runs/a")  # doctest: +SKIP
    """
    config = config or TrainConfig()
    _check_splits(splits, model.num_classes, config)
    _name_classes(model, splits)
    which = "latest" if resume is True else (resume or None)
    prepare_output(out_dir, resume=resume, overwrite=overwrite)
    with private_generators(), _Interruption() as interruption, _deterministic(config.deterministic):
        return _Run(model, splits, config, Path(out_dir), interruption, progress, store).run(which, overwrite)


def prepare_output(
    out_dir: str | os.PathLike, *, resume: bool | str = False, overwrite: bool = False
) -> None:
    """Make the output folder, and refuse one that holds an earlier run unless that is meant.

    Raises:
        CheckpointError: It cannot be made, or holds checkpoints while neither `resume` nor `overwrite` is
            given, or none while `resume` is.
    """
    folder = Path(out_dir) / "checkpoints"
    found = checkpoints.list_checkpoints(folder)
    if resume:
        checkpoints.find_checkpoint(folder, "latest" if resume is True else resume)
    elif found and not overwrite:
        raise CheckpointError(
            f"{folder} holds checkpoints of an earlier run, up to {found[-1].name}: resume it (--resume), "
            "overwrite it (--overwrite), or choose another output folder"
        )
    checkpoints.check_room(Path(out_dir), 0)


@dataclass
class _Sums:
    """Running totals of one epoch; on the device, so that adding does not wait for it."""

    loss: torch.Tensor
    correct: torch.Tensor
    images: int = 0

    @classmethod
    def zeros(cls, device: torch.device) -> "_Sums":
        exact = torch.float32 if device.type == "mps" else torch.float64
        return cls(torch.zeros((), dtype=exact, device=device), torch.zeros((), dtype=exact, device=device))


@dataclass
class _Progress:
    """What a checkpoint holds beside tensors."""

    step: int = 0
    history: list[dict] = field(default_factory=list)
    seconds: float = 0.0
    epoch_seconds: float = 0.0
    diagnostics: dict[str, list[float]] = field(default_factory=dict)


class _Run:
    def __init__(
        self, model, splits, config: TrainConfig, out_dir: Path, interruption, progress, store
    ) -> None:
        self.model, self.splits, self.config, self.out_dir = model, splits, config, out_dir
        self.interruption = interruption
        self.accelerator = _make_accelerator(config)
        self.device = self.accelerator.device
        self.main = self.accelerator.is_main_process
        self.progress = self.main and (sys.stderr.isatty() if progress is None else progress)
        self.lines = self.main and progress is None and not self.progress
        self.plan = Plan(
            n=len(splits.train),
            batch_size=config.batch_size,
            epochs=config.epochs,
            seed=config.seed,
            processes=self.accelerator.num_processes,
            accumulation=config.grad_accumulation,
        )
        own = getattr(splits.train, "transform", None)  # of the caller's, and it may be random
        self.cached = own is None and features_are_constant(model, config)
        self.store = FeatureStore() if store is None else store
        self.at = _Progress()
        self.best: dict[str, torch.Tensor] | None = None

    # -- the run

    def run(self, which: str | None, overwrite: bool) -> FitResult:
        folder = self.out_dir / "checkpoints"
        found = checkpoints.list_checkpoints(folder)
        checkpoint = (
            checkpoints.read_checkpoint(checkpoints.find_checkpoint(folder, which)) if which else None
        )
        fingerprint = self._fingerprint()
        if checkpoint:
            checkpoints.check_fingerprint(checkpoint.state["fingerprint"], fingerprint, checkpoint.path)
        self.fingerprint = fingerprint
        if self.main:
            trained = sum(p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)
            checkpoints.check_room(self.out_dir, 4 * trained)
            for path in found if which is None else ():
                checkpoints.remove(path)
        self.accelerator.wait_for_everyone()

        seed_everything(derive_seed(self.config.seed, "start"))
        with PeakMemory(self.device) as memory:
            self._prepare()
            if checkpoint:
                self._restore(checkpoint)
            self._open_logs()
            try:
                stopped = self._train(folder)
            finally:
                self._close()
        if self.best is not None and self.config.keep == "best":
            self.model.load_adapter_state_dict(self.best)
        if self.pruner is not None:  # behind it: the best of a run too short to be cut is not pruned yet
            self.pruner.finalize()
        self.model.eval()
        history, best = self.at.history, self._best()
        chosen = best if self.best is not None and self.config.keep == "best" else len(history) - 1
        return FitResult(
            history=history,
            best_epoch=chosen + 1,
            epochs=len(history),
            steps=self.at.step,
            stopped_early=stopped,
            seconds=self.at.seconds,
            peak_memory_bytes=memory.bytes,
            memory_measured=memory.how,
            cached_features=self.cached,
            device=self.device.type,
            processes=self.accelerator.num_processes,
            pruning=self.pruner.report() if self.pruner is not None else None,
        )

    def _best(self) -> int:
        """Index of the best epoch; of a pruned run, of those that ended with the pruned weights."""
        history, monitor = self.at.history, self.config.monitor
        first = min(self._first_pruned(), len(history) - 1) if history else 0
        return first + _best(history[first:], monitor)

    def _first_pruned(self) -> int:
        """Index of the first epoch that ends with pruned weights; 0 where nothing is pruned."""
        return self.pruner.hard // self.plan.steps_per_epoch if self.pruner is not None else 0

    def _train(self, folder: Path) -> bool:
        at, plan = self.at, self.plan
        batches = iter(self._loader(at.step))
        bar = tqdm(
            total=plan.steps,
            initial=at.step,
            desc="train",
            unit="step",
            disable=not self.progress,
            leave=False,
        )
        with bar:
            while True:
                ended = at.step // plan.steps_per_epoch
                if at.step % plan.steps_per_epoch == 0 and len(at.history) < ended:
                    try:
                        self._end_epoch(bar)
                    except _Leave:
                        raise self._interrupted(folder) from None
                    self._check_finite()
                    epochs = self.config.checkpoint_epochs
                    every = self.config.checkpoint_every
                    if (epochs and len(at.history) % epochs == 0) or (every and at.step % every == 0):
                        self._save(folder)
                if len(at.history) == ended and self._patience_is_over():
                    return True
                if at.step == plan.steps:
                    return False
                started = time.perf_counter()
                self._step(batches)
                at.epoch_seconds += time.perf_counter() - started
                at.step += 1
                bar.update()
                if self._asked_to_stop():
                    raise self._interrupted(folder)
                every = self.config.checkpoint_every
                if every and at.step % every == 0 and at.step % plan.steps_per_epoch:
                    self._save(folder)

    def _step(self, batches: Iterator) -> None:
        config, accelerator, step = self.config, self.accelerator, self.at.step
        seed_everything(derive_seed(config.seed, "step", step, accelerator.process_index))
        lr = config.lr * _schedule(step, self.plan, config.warmup_epochs)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        shares = self.plan.shares(step, accelerator.process_index)
        n = len(self.plan.indices(step))
        step_loss = torch.zeros_like(self.sums.loss)
        for k, share in enumerate(shares):
            images, labels = next(batches)
            check_labels(labels, self.model.num_classes)
            images, labels = (
                images.to(self.device, non_blocking=True),
                labels.to(self.device, non_blocking=True),
            )
            last = k == len(shares) - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(self.net):
                with autocast(self.device, self.net_precision):
                    logits = self.net(images).float()
                    losses = nn.functional.cross_entropy(
                        logits, labels, reduction="none", label_smoothing=config.label_smoothing
                    )
                    loss = losses.sum() * (len(share) > 0) / n
                    if not self.cached:
                        extra = self.model.loss_terms(images, labels)
                        loss = loss + sum(extra.values()) * (len(share) / n)
                # Data parallelism averages gradients over processes; the sum over all images is wanted.
                accelerator.backward(loss * accelerator.num_processes)
            with torch.no_grad():
                step_loss += loss.detach()
                if share:
                    self.sums.correct += (logits.argmax(1) == labels).sum()
        self.sums.loss += step_loss * n
        self.sums.images += n
        if config.clip_norm is not None:
            accelerator.clip_grad_norm_(self.trained.values(), config.clip_norm)
        if self.pruner is None:
            self.optimizer.step()
        else:
            if config.clip_norm is None:
                accelerator.unscale_gradients()
            self.pruner.step()
        self.optimizer.zero_grad(set_to_none=True)
        place = (step + 1) % self.plan.steps_per_epoch
        if (step + 1) % config.log_every == 0 or place == 0 or self.device.type == "cpu":
            self._look(step, lr, step_loss, log=(step + 1) % config.log_every == 0 or place == 0)

    def _look(self, step: int, lr: float, step_loss: torch.Tensor, log: bool) -> None:
        """Wait for the device, refuse a loss that is not finite, and log a row."""
        loss = self.accelerator.reduce(step_loss).item()
        total = self.sums.loss.item()
        if not (math.isfinite(loss) and math.isfinite(total)):
            raise self._not_finite(step, f"the loss is {loss if not math.isfinite(loss) else total}")
        if not log:
            return
        row = {"step": step + 1, "epoch": self.plan.epoch_of(step) + 1, "lr": lr, "loss": loss}
        found = {name: float(value) for name, value in self.model.diagnostics().items()}
        for name, value in found.items():
            self.at.diagnostics.setdefault(name, []).append(value)
        row.update(found)
        if self.main:
            self.steps_log.add(row)
            self._tensorboard(
                {f"step/{k}": v for k, v in row.items() if k not in ("step", "epoch")}, step + 1
            )

    def _end_epoch(self, bar: tqdm) -> None:
        at, sums = self.at, self.sums
        loss, correct = self.accelerator.reduce(sums.loss), self.accelerator.reduce(sums.correct)
        epoch = at.step // self.plan.steps_per_epoch
        row = {
            "epoch": epoch,
            "step": at.step,
            "lr": self.config.lr * _schedule(at.step - 1, self.plan, self.config.warmup_epochs),
            "train_loss": loss.item() / sums.images,
            "train_accuracy": correct.item() / sums.images,
        }
        if self.val_items is not None:
            metrics = self._validate()
            row |= {
                "val_accuracy": metrics.accuracy,
                "val_balanced_accuracy": metrics.balanced_accuracy,
                "val_loss": metrics.loss,
            }
            bar.set_postfix_str(f"epoch {epoch}, val accuracy {metrics.accuracy:.3f}")
        row |= {name: sum(values) / len(values) for name, values in at.diagnostics.items()}
        row["seconds"] = at.epoch_seconds
        at.history.append(row)
        at.seconds += at.epoch_seconds
        at.epoch_seconds, at.diagnostics = 0.0, {}
        self.sums = _Sums.zeros(self.device)
        if self.val_items is not None and self._best() == len(at.history) - 1:
            self.best = _clone(self.model.adapter_state_dict())
        if self.lines:
            told = f", val accuracy {row['val_accuracy']:.4f}" if "val_accuracy" in row else ""
            line = f"epoch {epoch} of {self.config.epochs}: loss {row['train_loss']:.4f}{told}"
            print(f"{line} ({row['seconds']:.1f} s)", file=sys.stderr, flush=True)
        if self.main:
            write_atomically(self.out_dir / "metrics.csv", _to_csv(at.history).encode())
            self._tensorboard(
                {f"epoch/{k}": v for k, v in row.items() if k not in ("step", "epoch")}, at.step
            )

    def _validate(self) -> Metrics:
        alone = self.accelerator.num_processes == 1
        return evaluate(
            self.model.behind() if self.cached else self.model,
            self.val_items,
            self.config.eval_batch_size or self.config.batch_size,
            num_classes=self.model.num_classes,
            num_workers=0 if self.cached else self.config.num_workers,
            mixed_precision=self.net_precision,
            accelerator=self.accelerator,
            check=self._leave_if_asked if alone else None,
        )

    def _patience_is_over(self) -> bool:
        patience, history = self.config.early_stop, self.at.history
        return bool(patience and history) and len(history) - 1 - self._best() >= patience

    # -- set-up

    def _prepare(self) -> None:
        config = self.config
        train, val = _with_transforms(self.model, self.splits, config)
        self.model.to(self.device).train()
        if self.cached:
            try:
                rows, self.at.seconds = self._cache(self.splits.train, train)
                train, val = rows, self._cache(self.splits.val, val)[0]
            except RowsTooLarge:
                self.cached, self.at.seconds = False, 0.0
        self.train_items, self.val_items = train, val
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = self.accelerator.prepare(_make_optimizer(self.model, self.trained, config))
        self.pruner = None
        if config.prune is not None:
            self.pruner = RobustPruner(
                self.model,
                self.optimizer,
                keep=config.prune,
                total_steps=self.plan.steps,
                granularity=config.prune_granularity,
                block=config.prune_block,
                criterion=config.prune_criterion,
                scope=config.prune_scope,
                decay=config.prune_decay,
                seed=config.seed,
            )
        self.sums = _Sums.zeros(self.device)
        net = self.model.behind() if self.cached else self.model
        self.net_precision = (
            "no" if self.cached else config.mixed_precision
        )  # heads compute in their own dtype
        self.net = net
        if self.accelerator.num_processes > 1:
            # Accelerate would also wrap the forward for autocast, which is done here where the loss is; DDP
            # is all that is needed of its preparation, and a single process needs none.
            amp, self.accelerator.native_amp = self.accelerator.native_amp, False
            self.net = self.accelerator.prepare_model(net)
            self.accelerator.native_amp = amp

    def _cache(self, images: Dataset | None, items: Dataset | None) -> tuple[Dataset | None, float]:
        """The rows of `images`, of which `items` are the transformed view, and the seconds they took."""
        if items is None:
            return None, 0.0
        batch, precision = self.config.eval_batch_size or self.config.batch_size, self.config.mixed_precision

        def compute() -> Dataset:
            return encode(
                self.model,
                items,
                batch,
                num_workers=self.config.num_workers,
                mixed_precision=precision,
                progress=self.progress,
                check=self._raise_if_asked,
                worker_init_fn=_quiet_worker,
            )

        return self.store.rows(self.model, images, precision, batch, compute)

    def _raise_if_asked(self) -> None:
        if self.interruption.asked:
            raise KeyboardInterrupt

    def _loader(self, step: int) -> DataLoader:
        workers = 0 if self.cached else self.config.num_workers
        return DataLoader(
            SeededItems(self.train_items, None if self.cached else self.config.seed),
            batch_sampler=ShareSampler(self.plan, self.accelerator.process_index, step),
            num_workers=workers,
            worker_init_fn=_quiet_worker,
            pin_memory=self.device.type == "cuda" and not self.cached,
        )

    def _open_logs(self) -> None:
        self.board = None
        if not self.main:
            return
        self.steps_log = _CsvLog(self.out_dir / "steps.csv", keep_to_step=self.at.step)
        if self.config.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise OptionError(
                    "tensorboard is not installed; pip install tensorboard, or leave it out"
                ) from error
            self.board = SummaryWriter(str(self.out_dir / "tensorboard"), purge_step=self.at.step)

    def _tensorboard(self, values: dict, step: int) -> None:
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)

    def _close(self) -> None:
        if self.board is not None:
            self.board.close()
        if self.accelerator.num_processes > 1:
            self.accelerator.unwrap_model(self.net, keep_fp32_wrapper=False)

    # -- checkpoints

    def _check_finite(self) -> None:
        for name, parameter in self.trained.items():
            if not torch.isfinite(parameter).all():
                raise self._not_finite(self.at.step - 1, f"the parameter {name} is not finite")

    def _save(self, folder: Path) -> Path:
        self._check_finite()
        loss, correct = self.accelerator.reduce(self.sums.loss), self.accelerator.reduce(self.sums.correct)
        if self.main:
            tensors = {f"model/{name}": tensor for name, tensor in self.model.adapter_state_dict().items()}
            tensors |= {f"best/{name}": tensor for name, tensor in (self.best or {}).items()}
            states = self._optimizer().state
            for name, parameter in self.trained.items():
                for key, value in states.get(parameter, {}).items():
                    if value is not None:
                        tensors[f"optimizer/{name}/{key}"] = torch.as_tensor(value)
            pruner = self.pruner.state_dict() if self.pruner is not None else {}
            for part, found in pruner.items():
                if part in _PRUNER_TENSORS:
                    tensors |= {f"pruner/{part}/{name}": tensor for name, tensor in found.items()}
            state = {
                "pruner": {k: v for k, v in pruner.items() if k not in _PRUNER_TENSORS},
                "progress": asdict(self.at),
                "sums": {"loss": loss.item(), "correct": correct.item(), "images": self.sums.images},
                "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
                "fingerprint": self.fingerprint,
            }
            checkpoints.write_checkpoint(folder, self.at.step, tensors, state)
        self.accelerator.wait_for_everyone()
        return folder / f"step-{self.at.step:08d}"

    def _restore(self, checkpoint: checkpoints.Checkpoint) -> None:
        parts: dict[str, dict[str, torch.Tensor]] = {"model": {}, "best": {}, "optimizer": {}, "pruner": {}}
        for name, tensor in checkpoint.tensors.items():
            part, rest = name.split("/", 1)
            parts[part][rest] = tensor.to(self.device, copy=True)
        self.model.load_adapter_state_dict(parts["model"])
        self.best = parts["best"] or None
        states = self._optimizer().state
        for name, tensor in parts["optimizer"].items():
            parameter, key = name.rsplit("/", 1)
            # Adam counts its steps on the CPU
            states[self.trained[parameter]][key] = tensor.cpu() if key == "step" else tensor
        state = checkpoint.state
        if self.pruner is not None:
            found = {part: {} for part in _PRUNER_TENSORS}
            for name, tensor in parts["pruner"].items():
                part, matrix = name.split("/", 1)
                found[part][matrix] = tensor
            self.pruner.load_state_dict(state["pruner"] | found)
        if state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.at = _Progress(**state["progress"])
        if self.main:  # sums are added up over the processes
            self.sums.loss += state["sums"]["loss"]
            self.sums.correct += state["sums"]["correct"]
        self.sums.images = state["sums"]["images"]

    def _optimizer(self) -> torch.optim.Optimizer:
        return self.optimizer.optimizer

    def _fingerprint(self) -> dict:
        model, backbone = self.model, self.model.backbone
        return {
            "method": model.method,
            "options": _plain(model.options),
            "num_classes": model.num_classes,
            "backbone": {
                "name": backbone.name,
                "sha256": _backbone_sha256(backbone),
                "img_size": _plain(backbone.img_size),
                # as it was before there was a choice, so that checkpoints of then still resume
                **({"resize": "direct"} if getattr(backbone, "resize", "crop") == "direct" else {}),
            },
            "data": _data_digest(self.splits),
            "config": self.config.to_fingerprint(),
        }

    # -- stopping

    def _asked_to_stop(self) -> bool:
        if self.accelerator.num_processes == 1:
            return self.interruption.asked
        asked = torch.tensor(float(self.interruption.asked), device=self.device)
        return self.accelerator.reduce(asked).item() > 0  # together, or one would wait for the others

    def _leave_if_asked(self) -> None:
        if self.interruption.asked:
            raise _Leave

    def _interrupted(self, folder: Path) -> Interrupted:
        return Interrupted(self._save(folder))

    def _not_finite(self, step: int, what: str) -> TrainingError:
        found = checkpoints.list_checkpoints(self.out_dir / "checkpoints")
        last = f"the last good checkpoint is {found[-1]}" if found else "there is no checkpoint yet"
        return TrainingError(f"{what} at step {step + 1}; {last}. Try a lower lr, more warm-up or clip_norm")


class _Leave(Exception):
    pass


class _Interruption:
    """While active, the first SIGINT or SIGTERM is noted and the second acts as usual."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "_Interruption":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: object) -> None:
        self.asked = True
        signal.signal(number, self._before[number])

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _quiet_worker(_: int) -> None:
    # Ctrl-C reaches the whole process group; the training process decides when its readers end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def _deterministic(asked: bool) -> Iterator[None]:
    if not asked:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


def _make_accelerator(config: TrainConfig):
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    # The state is a singleton that would refuse a second run with another precision or device.
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    try:
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            cpu=config.device == "cpu",
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
    except ValueError as error:
        raise OptionError(f"mixed_precision={config.mixed_precision!r} cannot run here: {error}") from error
    if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        # Accelerate would go on without a loss scaler
        raise OptionError(
            "mixed_precision='fp16' cannot run here: it needs an accelerator; a CPU has bf16 or no"
        )
    supported = (
        DistributedType.NO,
        DistributedType.MULTI_CPU,
        DistributedType.MULTI_GPU,
        DistributedType.MULTI_XPU,
    )
    if accelerator.distributed_type not in supported:
        raise OptionError(
            f"{accelerator.distributed_type.value} is not supported: launch with data parallelism (the "
            "trained parameters are small, the frozen backbone is not synchronised)"
        )
    accelerator.gradient_accumulation_steps = (
        1  # `_step` accumulates; the launcher's environment may say otherwise
    )
    return accelerator


def _make_optimizer(model: nn.Module, trained: dict[str, nn.Parameter], config: TrainConfig):
    head = {id(p) for p in model.head.parameters()}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in trained.values():
        scale = config.lr_head / config.lr if config.lr_head and id(parameter) in head else 1.0
        decay = config.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((scale, decay), []).append(parameter)
    settings = [
        {"params": parameters, "weight_decay": decay, "lr_scale": scale}
        for (scale, decay), parameters in groups.items()
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(settings, lr=config.lr, momentum=0.9)
    return torch.optim.AdamW(settings, lr=config.lr)


def _schedule(step: int, plan: Plan, warmup_epochs: float) -> float:
    """Share of the peak rate at a step: linear up over the warm-up, then a half-cosine down to 0."""
    warm = min(round(warmup_epochs * plan.steps_per_epoch), plan.steps)
    if step < warm:
        return (step + 1) / (warm + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, plan.steps - warm)))


def _best(history: list[dict], monitor: str) -> int:
    """Index of the best epoch by monitor, then by loss, then the earliest; the last without validation."""
    if not history or f"val_{monitor}" not in history[0]:
        return len(history) - 1
    sign = -1.0 if monitor == "loss" else 1.0
    return max(
        range(len(history)), key=lambda i: (sign * history[i][f"val_{monitor}"], -history[i]["val_loss"], -i)
    )


def features_are_constant(model: nn.Module, config: TrainConfig) -> bool:
    """In front of `behind` is the frozen backbone alone, and the images do not change from epoch to epoch."""
    known = {id(p) for p in model.behind().parameters()}
    known |= {id(p) for p in model.backbone.parameters() if not p.requires_grad}
    alone = all(id(p) in known for p in model.parameters())
    # what a method overrides without `encode` is not in the rows: prompts that are frozen by now, say
    place = {name: i for i, kind in reversed([*enumerate(type(model).__mro__)]) for name in vars(kind)}
    overridden = any(place[name] < place["encode"] for name in ("features", "forward", "loss_terms"))
    return config.cache_features and config.augment == "none" and alone and not overridden


def _with_transforms(model: nn.Module, splits, config: TrainConfig) -> tuple[Dataset, Dataset | None]:
    if config.augment != "none" and getattr(splits.train, "transform", None) is not None:
        raise OptionError(
            f'augment="{config.augment}" goes with images that fit transforms itself; the training '
            'images have a transform of their own. Put the augmentation there, or leave augment "none"'
        )
    train = with_transform(model, splits.train, True, config.augment)
    return train, with_transform(model, splits.val) if splits.val else None


def _check_splits(splits, num_classes: int, config: TrainConfig) -> None:
    if not splits.train:
        raise DataError("there are no training images")
    for name in ("train", "val"):
        items = getattr(splits, name)
        labels = getattr(items, "labels", None)
        if labels is not None and len(labels):
            labels = torch.as_tensor(labels)
            check_labels(labels, num_classes)
            if name == "train" and len(labels.unique()) < 2:
                raise DataError(
                    "all training images are of one class; at least two are needed to learn anything"
                )
    if config.early_stop and not splits.val:
        raise OptionError("early_stop needs validation images; this split has none (val=0)")


def _name_classes(model, splits) -> None:
    """The model takes the data's class names, or must have the same already."""
    names = getattr(splits, "classes", None)
    if names is None:
        return
    if len(names) != model.num_classes:
        raise DataError(
            f"the data has {len(names)} classes and the model {model.num_classes} outputs; "
            f"create the model with num_classes={len(names)}"
        )
    if model.classes is not None and list(model.classes) != list(names):
        raise DataError(
            f"the model's classes are {', '.join(model.classes[:6])}, the data's {', '.join(names[:6])}; "
            "make a new model, or set model.classes where they mean the same"
        )
    model.classes = list(names)


def _data_digest(splits) -> dict:
    digests = {}
    for name in ("train", "val"):
        items = getattr(splits, name)
        if not items:
            digests[name] = None
            continue
        labels = torch.as_tensor(items.labels).tolist() if hasattr(items, "labels") else []
        content = repr((len(items), labels, list(getattr(items, "names", [])))).encode()
        digests[name] = {"images": len(items), "sha256": hashlib.sha256(content).hexdigest()}
    return digests


def _backbone_sha256(backbone: nn.Module) -> str:
    known = getattr(backbone, "weights_sha256", None)
    if known:
        return known
    from lion_fast.backbones import backbone_sha256

    return backbone_sha256(backbone)


def _plain(value: object) -> object:
    """As it comes back from JSON."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _clone(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def _to_csv(rows: list[dict]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


class _CsvLog:
    """A CSV file that grows; rows after `keep_to_step`, from before an interruption, are dropped."""

    def __init__(self, path: Path, keep_to_step: int) -> None:
        self.path, rows = path, []
        self.names: list[str] | None = None
        if keep_to_step and path.exists():
            with open(path, newline="") as file:
                for row in csv.DictReader(file):
                    if None in row.values() or not row["step"].isdigit():
                        continue  # a line that was being written when the process died
                    if int(row["step"]) <= keep_to_step:
                        rows.append(row)
        write_atomically(path, (_to_csv(rows) if rows else "").encode())
        self.names = list(rows[0]) if rows else None

    def add(self, row: dict) -> None:
        with open(self.path, "a", newline="") as file:
            first = self.names is None
            self.names = self.names or list(row)
            writer = csv.DictWriter(file, self.names, lineterminator="\n", extrasaction="ignore")
            if first:
                writer.writeheader()
            writer.writerow(row)
