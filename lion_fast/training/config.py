"""The options of a training run: one frozen dataclass, checked where it is made."""

import dataclasses
import math
from dataclasses import dataclass
from difflib import get_close_matches

from lion_fast.errors import OptionError, check_choice
from lion_fast.pruning.masks import CRITERIA, GRANULARITIES, SCOPES

# Options that change speed or what is written, never the numbers: they may differ when a run is resumed.
FREE_ON_RESUME = frozenset(
    {
        "num_workers",
        "eval_batch_size",
        "checkpoint_epochs",
        "checkpoint_every",
        "log_every",
        "tensorboard",
        "device",
    }
)


@dataclass(frozen=True)
class TrainConfig:
    """How a method is trained.

    Args:
        epochs: Passes over the training images.
        batch_size: Images per optimiser step, over all processes and accumulation steps together. Two
            processes, or two accumulation steps, therefore see half of it each and give the same result as
            one.
        optimizer: "adamw", or "sgd" with momentum 0.9.
        lr: Peak learning rate of the method's parameters.
        lr_head: Peak learning rate of the classification head; None: `lr`.
        weight_decay: Decoupled for adamw, L2 for sgd. Parameters with one dimension (biases, scales) get
            none.
        warmup_epochs: Length of the linear warm-up; a half-cosine to zero follows. Both move at every step.
        label_smoothing: Share of the target spread over all classes, in [0, 1).
        clip_norm: Largest total gradient norm; None: no clipping.
        grad_accumulation: Parts in which each process handles its share of a batch.
        mixed_precision: "no", "bf16" or "fp16" (fp16 needs an accelerator).
        seed: Decides order, augmentation and dropout. Each is a pure function of the seed and of the epoch,
            step or image it is for, so nothing random has to be stored to resume.
        deterministic: Ask torch for deterministic algorithms only.
        early_stop: Stop after this many epochs without a better `monitor` on the validation images; 0: never.
        monitor: What "better" means: "accuracy", "balanced_accuracy" or "loss".
        keep: "best": end with the weights of the best epoch by `monitor`; "last": of the last one.
        prune: Share of the entries of the LION ends to keep, by robust training (see docs/pruning.md); None:
            no pruning. Epochs before the cut are then no candidates for the best one.
        prune_granularity: What is kept or pruned: "element", "unit", "block" or "2:4".
        prune_block: Side of the blocks where prune_granularity is "block": 16, 32 or 64.
        prune_criterion: "saliency", "magnitude" or "random".
        prune_scope: "global" ranks all matrices together, "layer" and "matrix" each apart.
        prune_decay: Shrinking of pruned entries per step, as a multiple of the learning rate.
        augment: Training augmentation: "none", "flip" or "crop".
        cache_features: Run the backbone once over the images where nothing in front of its features is
            trained (the linear probe, LION's default form), augment is "none" and the images have no
            transform of their own. The rows of a data set stay in main memory, up to 4 GiB of them; with
            more the backbone runs in every epoch. False for a data set that gives other tensors each time.
        num_workers: Processes that read images; 0 reads in the training process.
        eval_batch_size: Images per forward pass in evaluation; None: as many as in training.
        checkpoint_epochs: Write a checkpoint after every so many epochs; 0: only when interrupted.
        checkpoint_every: Also write a checkpoint every so many steps; 0: after epochs only.
        log_every: Steps between rows of steps.csv and checks of the loss.
        tensorboard: Also write TensorBoard events (needs the extra `tensorboard`).
        device: "cpu", or None for the accelerator that Accelerate finds.

    Raises:
        OptionError: A value outside its range, with the range in the message.
    """

    epochs: int = 20
    batch_size: int = 64
    optimizer: str = "adamw"
    lr: float = 1e-3
    lr_head: float | None = None
    weight_decay: float = 0.01
    warmup_epochs: float = 1.0
    label_smoothing: float = 0.0
    clip_norm: float | None = None
    grad_accumulation: int = 1
    mixed_precision: str = "no"
    seed: int = 0
    deterministic: bool = False
    early_stop: int = 0
    monitor: str = "accuracy"
    keep: str = "best"
    prune: float | None = None
    prune_granularity: str = "element"
    prune_block: int = 32
    prune_criterion: str = "saliency"
    prune_scope: str = "global"
    prune_decay: float = 1e-2
    augment: str = "none"
    cache_features: bool = True
    num_workers: int = 0
    eval_batch_size: int | None = None
    checkpoint_epochs: int = 1
    checkpoint_every: int = 0
    log_every: int = 10
    tensorboard: bool = False
    device: str | None = None

    def __post_init__(self) -> None:
        check_choice("optimizer", self.optimizer, ("adamw", "sgd"))
        check_choice("mixed_precision", self.mixed_precision, ("no", "bf16", "fp16"))
        check_choice("monitor", self.monitor, ("accuracy", "balanced_accuracy", "loss"))
        check_choice("keep", self.keep, ("best", "last"))
        check_choice("augment", self.augment, ("none", "flip", "crop"))
        if self.device not in (None, "cpu"):
            raise OptionError(f"device must be cpu or None (what Accelerate finds); got {self.device!r}")
        for name in ("epochs", "batch_size", "grad_accumulation", "log_every"):
            self._check_int(name, 1)
        for name in ("seed", "early_stop", "num_workers", "checkpoint_epochs", "checkpoint_every"):
            self._check_int(name, 0)
        if self.eval_batch_size is not None:
            self._check_int("eval_batch_size", 1)
        check_choice("prune_granularity", self.prune_granularity, GRANULARITIES)
        check_choice("prune_criterion", self.prune_criterion, CRITERIA)
        check_choice("prune_scope", self.prune_scope, SCOPES)
        self._check_float("prune_decay", 0.0)
        if self.prune is not None and self.prune != 1:
            self._check_float("prune", 0.0, open_low=True, below=1.0)
        self._check_float("lr", 0.0, open_low=True)
        self._check_float("weight_decay", 0.0)
        self._check_float("warmup_epochs", 0.0)
        self._check_float("label_smoothing", 0.0, below=1.0)
        if self.lr_head is not None:
            self._check_float("lr_head", 0.0, open_low=True)
        if self.clip_norm is not None:
            self._check_float("clip_norm", 0.0, open_low=True)
        for field in dataclasses.fields(self):
            if field.type is bool and not isinstance(getattr(self, field.name), bool):
                raise OptionError(f"{field.name} must be true or false; got {getattr(self, field.name)!r}")

    def _check_int(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise OptionError(f"{name} must be an integer of at least {least}; got {value!r}")

    def _check_float(self, name: str, low: float, *, open_low: bool = False, below: float = math.inf) -> None:
        value = getattr(self, name)
        valid = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not valid or value < low or (open_low and value == low) or value >= below:
            wanted = f"{'above' if open_low else 'at least'} {low:g}" + (
                f" and below {below:g}" if math.isfinite(below) else ""
            )
            raise OptionError(f"{name} must be a number {wanted}; got {value!r}")

    @classmethod
    def from_dict(cls, options: dict) -> "TrainConfig":
        """The config with these options; unknown names are refused by name."""
        known = [field.name for field in dataclasses.fields(cls)]
        refuse_unknown(options, known, "training option")
        return cls(**options)

    def to_dict(self) -> dict:
        """All options as JSON-able values."""
        return dataclasses.asdict(self)

    def to_fingerprint(self) -> dict:
        """The options that must agree when a run is resumed."""
        return {name: value for name, value in self.to_dict().items() if name not in FREE_ON_RESUME}


def refuse_unknown(options: dict, known: list[str], what: str) -> None:
    """Raise `OptionError` naming an option that is not known, the nearest valid name, and all of them."""
    for name in options:
        if name not in known:
            near = get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise OptionError(f"unknown {what} {name!r}{hint} Valid: {', '.join(known)}")
