"""What a run works with: its images, accelerator, network and optimiser, checked before any of it trains."""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lion_fast.files import say_once
from lion_fast.pruning import RobustPruner
from lion_fast.training.config import TrainConfig
from lion_fast.training.features import FeaturesTooLarge, FeatureStore, features_are_constant
from lion_fast.training.items import collate, is_constant, read, with_transform
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
    def num_workers(self) -> int:
        """Processes that read items."""
        return 0 if self.items.cached else self.config.num_workers

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
            num_workers=self.num_workers,
            worker_init_fn=quiet_worker,
            pin_memory=self.accelerator.device.type == "cuda" and not cached,
            collate_fn=collate,
        )
        return read(loader)


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
    model.to(accelerator.device).train()
    items = _read_items(model, splits, config, store, progress, check)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = accelerator.prepare(_make_optimizer(model, trained, config))
    pruner = None
    if config.prune is not None:
        names = ("granularity", "block", "criterion", "scope", "decay")
        options = {name: getattr(config, f"prune_{name}") for name in names}
        pruner = RobustPruner(
            model, optimizer, keep=config.prune, total_steps=plan.steps, seed=config.seed, **options
        )
    net = model.behind() if items.cached else model
    if accelerator.num_processes > 1:
        # Accelerate would also wrap the forward for autocast, which `take_step` does around the loss.
        place = None if accelerator.device.type == "cpu" else [accelerator.local_process_index]
        net = nn.parallel.DistributedDataParallel(net, place, broadcast_buffers=False)
    return Setup(model, config, accelerator, plan, items, net, trained, optimizer, pruner)


def _read_items(
    model: "TunedModel",
    splits: "Splits",
    config: TrainConfig,
    store: FeatureStore,
    progress: bool,
    check: Callable[[], None],
) -> Items:
    """Features where they do not change and fit into memory, else images as the model takes them."""
    train = with_transform(model, splits.train, True, config.augment)
    val = with_transform(model, splits.val) if splits.val else None
    images = Items(train, val)
    if not features_are_constant(model, config):
        return images
    if not all(is_constant(items) for items in (splits.train, splits.val) if items):
        say_once(
            "images are read anew in every epoch, as the data may give others each time: features are "
            "computed once for an ImageSet without a transform, a TensorDataset, or data with constant = True"
        )
        return images
    read = functools.partial(
        store.features,
        model,
        batch_size=config.eval_batch_size or config.batch_size,
        num_workers=config.num_workers,
        mixed_precision=config.mixed_precision,
        progress=progress,
        check=check,
        worker_init_fn=quiet_worker,
    )
    try:
        features, seconds = read(splits.train, train)
        return Items(features, val and read(splits.val, val)[0], cached=True, seconds=seconds)
    except FeaturesTooLarge:
        return images


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
        {"params": p, "weight_decay": decay, "lr_scale": scale} for (scale, decay), p in groups.items()
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(settings, lr=config.lr, momentum=0.9)
    return torch.optim.AdamW(settings, lr=config.lr)
