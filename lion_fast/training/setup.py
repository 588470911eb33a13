"""What a run works with: its images, accelerator, network and optimiser, checked before any of it trains."""

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lion_fast.errors import DataError, OptionError
from lion_fast.pruning import RobustPruner
from lion_fast.training.config import TrainConfig
from lion_fast.training.features import FeaturesTooLarge, FeatureStore, encode, features_are_constant
from lion_fast.training.metrics import check_labels, with_transform
from lion_fast.training.order import Plan, SeededItems, ShareSampler
from lion_fast.training.stop import quiet_worker

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    from lion_fast.data import Splits
    from lion_fast.methods import TunedModel


@dataclass(frozen=True)
class Items:
    """What is read: items (image or features, label); `val` may be None.

    Attributes:
        cached: They are features, computed once.
        seconds: Time that computing those of `train` took.
    """

    train: Dataset
    val: Dataset | None
    cached: bool = False
    seconds: float = 0.0


@dataclass(frozen=True)
class Setup:
    """What a run works with, and keeps.

    Attributes:
        plan: The images of every step.
        items: What is read of them.
        net: Maps items to logits; under data parallelism it averages gradients over the processes.
        trained: The parameters that are trained, by name.
        pruner: Makes the optimiser's steps where the run prunes, else None.
    """

    model: "TunedModel"
    config: TrainConfig
    accelerator: "Accelerator"
    plan: Plan
    items: Items
    net: nn.Module
    trained: dict[str, nn.Parameter]
    optimizer: "AcceleratedOptimizer"
    pruner: RobustPruner | None

    @property
    def precision(self) -> str:
        """Of `net`: what stands behind features computes in its own dtype."""
        return "no" if self.items.cached else self.config.mixed_precision

    @property
    def first_pruned(self) -> int:
        """Index of the first epoch that ends with pruned weights; 0 where nothing is pruned."""
        return self.pruner.hard // self.plan.steps_per_epoch if self.pruner is not None else 0

    def lr(self, step: int) -> float:
        """The learning rate of a step: linear up over the warm-up, then a half-cosine down to 0."""
        plan, config = self.plan, self.config
        warm = min(round(config.warmup_epochs * plan.steps_per_epoch), plan.steps)
        if step < warm:
            return config.lr * ((step + 1) / (warm + 1))
        return config.lr * (0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, plan.steps - warm))))

    def batches(self, step: int) -> Iterator:
        """The batches of this process from a step on to the end of the run."""
        cached, config = self.items.cached, self.config
        loader = DataLoader(
            SeededItems(self.items.train, None if cached else config.seed),
            batch_sampler=ShareSampler(self.plan, self.accelerator.process_index, step),
            num_workers=0 if cached else config.num_workers,
            worker_init_fn=quiet_worker,
            pin_memory=self.accelerator.device.type == "cuda" and not cached,
        )
        return iter(loader)


def set_up(
    model: "TunedModel",
    splits: "Splits",
    config: TrainConfig,
    accelerator: "Accelerator",
    store: FeatureStore,
    *,
    progress: bool,
    check: Callable[[], None],
) -> Setup:
    """Move a model to its device, and make what trains it.

    store: Features of earlier runs, for further ones. progress: Show a bar while features are computed.
    check: Called after each batch of that; may raise to leave.
    """
    plan = Plan(
        n=len(splits.train),
        batch_size=config.batch_size,
        epochs=config.epochs,
        seed=config.seed,
        processes=accelerator.num_processes,
        accumulation=config.grad_accumulation,
    )
    images = _images(model, splits, config)
    model.to(accelerator.device).train()
    own = getattr(splits.train, "transform", None)  # of the caller's, and it may be random
    items = images
    if own is None and features_are_constant(model, config):
        with contextlib.suppress(FeaturesTooLarge):
            items = _features(model, splits, images, config, store, progress, check)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = accelerator.prepare(_make_optimizer(model, trained, config))
    pruner = None
    if config.prune is not None:
        pruner = RobustPruner(
            model,
            optimizer,
            keep=config.prune,
            total_steps=plan.steps,
            granularity=config.prune_granularity,
            block=config.prune_block,
            criterion=config.prune_criterion,
            scope=config.prune_scope,
            decay=config.prune_decay,
            seed=config.seed,
        )
    net = model.behind() if items.cached else model
    if accelerator.num_processes > 1:
        # Accelerate would also wrap the forward for autocast, which `take_step` does around the loss.
        place = None if accelerator.device.type == "cpu" else [accelerator.local_process_index]
        net = nn.parallel.DistributedDataParallel(net, place, broadcast_buffers=False)
    return Setup(model, config, accelerator, plan, items, net, trained, optimizer, pruner)


def _images(model: "TunedModel", splits: "Splits", config: TrainConfig) -> Items:
    if config.augment != "none" and getattr(splits.train, "transform", None) is not None:
        raise OptionError(
            f'augment="{config.augment}" goes with images that fit transforms itself; the training '
            'images have a transform of their own. Put the augmentation there, or leave augment "none"'
        )
    train = with_transform(model, splits.train, True, config.augment)
    return Items(train, with_transform(model, splits.val) if splits.val else None)


def _features(model, splits, images: Items, config, store, progress: bool, check) -> Items:
    """The features of images, and the seconds that those to train on took."""
    batch, precision = config.eval_batch_size or config.batch_size, config.mixed_precision

    def read(own: Dataset, view: Dataset) -> tuple[Dataset, float]:
        def compute() -> Dataset:
            return encode(
                model,
                view,
                batch,
                num_workers=config.num_workers,
                mixed_precision=precision,
                progress=progress,
                check=check,
                worker_init_fn=quiet_worker,
            )

        return store.features(model, own, precision, batch, compute)

    train, seconds = read(splits.train, images.train)
    val = read(splits.val, images.val)[0] if images.val is not None else None
    return Items(train, val, cached=True, seconds=seconds)


def _make_optimizer(
    model: "TunedModel", trained: dict[str, nn.Parameter], config: TrainConfig
) -> torch.optim.Optimizer:
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


def make_accelerator(config: TrainConfig) -> "Accelerator":
    """Accelerate's device and processes; `OptionError` for what does not run here."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    # The state is a singleton that would refuse a second run with another precision or device.
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    try:
        accelerator = Accelerator(mixed_precision=config.mixed_precision, cpu=config.device == "cpu")
    except ValueError as error:
        raise OptionError(f"mixed_precision={config.mixed_precision!r} cannot run here: {error}") from error
    if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        # Accelerate would go on without a loss scaler
        raise OptionError(
            "mixed_precision='fp16' cannot run here: it needs an accelerator; a CPU has bf16 or no"
        )
    kind = accelerator.distributed_type
    if kind not in [getattr(DistributedType, name) for name in ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU")]:
        raise OptionError(
            f"{kind.value} is not supported: launch with data parallelism (the trained parameters are small, "
            "the frozen backbone is not synchronised)"
        )
    accelerator.gradient_accumulation_steps = 1  # `take_step` accumulates, whatever the launcher says
    return accelerator


@contextlib.contextmanager
def deterministic(asked: bool) -> Iterator[None]:
    """Torch's deterministic algorithms only, while it lasts."""
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


def check_splits(splits: "Splits", num_classes: int, config: TrainConfig) -> None:
    """Refuse images that nothing can be learnt from, and early stopping without images to judge by."""
    if not splits.train:
        raise DataError("there are no training images")
    for name in ("train", "val"):
        labels = getattr(getattr(splits, name), "labels", None)
        if labels is not None and len(labels):
            labels = torch.as_tensor(labels)
            check_labels(labels, num_classes)
            if name == "train" and len(labels.unique()) < 2:
                raise DataError(
                    "all training images are of one class; at least two are needed to learn anything"
                )
    if config.early_stop and not splits.val:
        raise OptionError("early_stop needs validation images; this split has none (val=0)")


def name_classes(model: "TunedModel", splits: "Splits") -> None:
    """Give a model the data's class names; `DataError` where it has others already."""
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
