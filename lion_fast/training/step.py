"""One optimiser step: the same numbers however its images are shared out."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from lion_fast.methods import TunedModel
from lion_fast.methods.noise import Part, part_of_step
from lion_fast.training.items import check_labels
from lion_fast.training.metrics import autocast
from lion_fast.training.order import derive_seed, seed_everything
from lion_fast.training.setup import Setup
from lion_fast.training.state import Sums

Batch = tuple[Part, Tensor, Tensor]  # of a part: its images or features, and labels


def take_step(setup: Setup, sums: Sums, step: int, batches: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
    """Train on the images of one step, this process' share in parts; its part of the mean loss, a scalar.

    batches: (images or features, labels) of each part. What is found is added to `sums`.
    """
    config, plan, accelerator = setup.config, setup.plan, setup.accelerator
    rank = accelerator.process_index
    for group in setup.optimizer.param_groups:
        group["lr"] = setup.lr(step) * group["lr_scale"]
    n, mean, parts = len(plan.indices(step)), None, _read(setup, plan.parts(step, rank), batches)
    several = plan.processes * plan.accumulation > 1
    if several and not setup.items.cached and type(setup.model).step_mean is not TunedModel.step_mean:
        parts = list(parts)
        mean = _step_mean(setup, step, parts)
    mean_loss = torch.zeros_like(sums.loss)
    for k, (part, images, labels) in enumerate(parts):
        last = k == plan.accumulation - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(setup.net):
            with _drawn(setup, step, replace(part, mean=mean)):
                logits = setup.net(images).float()
                losses = nn.functional.cross_entropy(
                    logits, labels, reduction="none", label_smoothing=config.label_smoothing
                )
                loss = losses.sum() * part.counts / n
                if not setup.items.cached:
                    terms = setup.model.loss_terms(images, labels).values()
                    loss = loss + sum(terms) * (part.counts * len(labels) / n)
            # Data parallelism averages gradients over processes; the sum over all images is wanted.
            accelerator.backward(loss * accelerator.num_processes)
        with torch.no_grad():
            mean_loss += loss.detach()
            sums.correct += (logits.argmax(1) == labels).sum() * part.counts
    sums.loss += mean_loss * n
    sums.images += n
    _update(setup)
    return mean_loss


def _read(setup: Setup, parts: list[Part], batches: Iterator) -> Iterator[Batch]:
    device = setup.accelerator.device
    for part in parts:
        images, labels = next(batches)
        check_labels(labels, setup.model.num_classes)
        yield part, images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


@contextlib.contextmanager
def _drawn(setup: Setup, step: int, part: Part) -> Iterator[None]:
    """The forward of a part of a step: what is random in it is cut from what is drawn for the whole step."""
    seed_everything(derive_seed(setup.config.seed, "step", step, 0))
    with part_of_step(part), autocast(setup.accelerator.device, setup.precision):
        yield


def _step_mean(setup: Setup, step: int, parts: list[Batch]) -> Tensor:
    """What the loss of a part needs of all parts, which go through the model once more for it."""
    mean = torch.zeros((), device=setup.accelerator.device)
    for part, images, labels in parts:
        with _drawn(setup, step, part):
            mean += setup.model.step_mean(images) * (part.counts * len(labels) / part.n)
    return setup.accelerator.reduce(mean)


def _update(setup: Setup) -> None:
    clip_norm, accelerator = setup.config.clip_norm, setup.accelerator
    if clip_norm is not None:
        accelerator.clip_grad_norm_(setup.trained.values(), clip_norm)
    if setup.pruner is None:
        setup.optimizer.step()
    else:
        if clip_norm is None:
            accelerator.unscale_gradients()
        setup.pruner.step()
    setup.optimizer.zero_grad(set_to_none=True)
