"""The options of a training run: one frozen dataclass, checked where it is made."""

from dataclasses import dataclass

from lion_fast.errors import OptionError
from lion_fast.options import (
    BLOCKS,
    CRITERIA,
    GRANULARITIES,
    PRECISIONS,
    SCOPES,
    Options,
    documented,
    setting,
)

# Options that change speed or what is written, never the numbers: they may differ when a run is resumed.
FREE_ON_RESUME = frozenset(
    {
        "num_workers", "eval_batch_size", "checkpoint_epochs", "checkpoint_every", "log_every", "tensorboard",
        "device",
    }
)  # fmt: skip


@documented
@dataclass(frozen=True)
class TrainConfig(Options):
    """How a method is trained; raises `OptionError` for a value outside its range.

    >>> TrainConfig(epochs=5, lr=1e-2).to_dict()["optimizer"]
    'adamw'
    """

    epochs: int = setting(20, "passes over the training images", least=1)
    batch_size: int = setting(
        64,
        "images per optimiser step, over all processes and accumulation steps together: two of either see "
        "half of it each and give the same result as one",
        least=1,
    )
    optimizer: str = setting("adamw", "optimiser, sgd with momentum 0.9", choices=("adamw", "sgd"))
    lr: float = setting(1e-3, "peak learning rate of the method's parameters", above=0)
    lr_head: float | None = setting(None, "peak learning rate of the head", default_is="lr", above=0)
    weight_decay: float = setting(
        0.01, "decoupled for adamw, L2 for sgd; none for biases and scales, which have one dimension", least=0
    )
    warmup_epochs: float = setting(
        1.0, "length of the linear warm-up; a half-cosine to zero follows, both by the step", least=0
    )
    label_smoothing: float = setting(0.0, "share of the target spread over all classes", least=0, below=1)
    clip_norm: float | None = setting(None, "largest total gradient norm", default_is="no clipping", above=0)
    grad_accumulation: int = setting(1, "parts in which each process handles its share of a batch", least=1)
    mixed_precision: str = setting("no", "of autocast; fp16 needs an accelerator", choices=PRECISIONS)
    seed: int = setting(
        0,
        "of order, augmentation and dropout; each is a pure function of it and of the epoch, step or image "
        "it is for, so nothing random has to be stored to resume",
        least=0,
        most=2**64 - 1,
    )
    deterministic: bool = setting(False, "ask torch for deterministic algorithms only")
    early_stop: int = setting(
        0, "stop after so many epochs without a better monitor on the validation images; 0: never", least=0
    )
    monitor: str = setting("accuracy", "what better means", choices=("accuracy", "balanced_accuracy", "loss"))
    keep: str = setting("best", "epoch whose weights are kept, best by monitor", choices=("best", "last"))
    prune: float | None = setting(
        None,
        "share of the entries of the LION ends to keep, in (0, 1], by robust training (docs/pruning.md); "
        "epochs before the cut are then no candidates for the best one",
        default_is="no pruning",
        above=0,
        most=1,
    )
    prune_granularity: str = setting("element", "what is kept or pruned", choices=GRANULARITIES)
    prune_block: int = setting(
        32, f"side of the blocks where prune_granularity is block: {', '.join(map(str, BLOCKS))}"
    )
    prune_criterion: str = setting("saliency", "what ranks the entries", choices=CRITERIA)
    prune_scope: str = setting(
        "global", "global ranks all matrices together, layer and matrix each apart", choices=SCOPES
    )
    prune_decay: float = setting(
        1e-2, "shrinking of pruned entries per step, as a multiple of the learning rate", least=0
    )
    augment: str = setting("none", "training augmentation", choices=("none", "flip", "crop"))
    cache_features: bool = setting(
        True,
        "run the backbone once over the images where nothing in front of its features is trained (the linear "
        "probe, LION's default variant), augment is none and the data is known to be the same each time: an "
        "ImageSet without a transform of its own, a TensorDataset, or what has an attribute constant = True. "
        "Up to 4 GiB of a data set's features stay in main memory, with more the backbone runs each epoch",
    )
    num_workers: int = setting(0, "processes that read images; 0: the training process does", least=0)
    eval_batch_size: int | None = setting(
        None, "images of a forward pass in evaluation", default_is="batch_size"
    )
    checkpoint_epochs: int = setting(1, "epochs between checkpoints; 0: only when interrupted", least=0)
    checkpoint_every: int = setting(0, "steps between further checkpoints; 0: after epochs only", least=0)
    log_every: int = setting(10, "steps between rows of steps.csv and checks of the loss", least=1)
    tensorboard: bool = setting(False, "also write TensorBoard events (needs the extra `tensorboard`)")
    device: str | None = setting(
        None, "cpu keeps it off the accelerator, cuda wants one", default_is="what Accelerate finds"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.device not in (None, "cpu", "cuda"):
            raise OptionError(
                f"device must be cpu, cuda or None (what Accelerate finds); got {self.device!r}. "
                "$CUDA_VISIBLE_DEVICES chooses among several"
            )

    def to_fingerprint(self) -> dict:
        """The options that must agree when a run is resumed."""
        return {name: value for name, value in self.to_dict().items() if name not in FREE_ON_RESUME}
