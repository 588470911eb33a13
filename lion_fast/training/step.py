"""One optimiser step: the same numbers however its images are shared out."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lion_fast.training.metrics import autocast, check_labels
from lion_fast.training.order import derive_seed, seed_everything
from lion_fast.training.setup import Setup
from lion_fast.training.state import Sums


def take_step(setup: Setup, sums: Sums, step: int, batches: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
    """Train on the images of one step, this process' share in parts; its part of the mean loss, a scalar.

    batches: (images or features, labels) of each part. What is found is added to `sums`.
    """
    config, plan, accelerator = setup.config, setup.plan, setup.accelerator
    device, rank = accelerator.device, accelerator.process_index
    seed_everything(derive_seed(config.seed, "step", step, rank))
    for group in setup.optimizer.param_groups:
        group["lr"] = setup.lr(step) * group["lr_scale"]
    n, shares = len(plan.indices(step)), plan.shares(step, rank)
    mean_loss = torch.zeros_like(sums.loss)
    for k, share in enumerate(shares):
        images, labels = next(batches)
        check_labels(labels, setup.model.num_classes)
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        last = k == len(shares) - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(setup.net):
            with autocast(device, setup.precision):
                logits = setup.net(images).float()
                losses = nn.functional.cross_entropy(
                    logits, labels, reduction="none", label_smoothing=config.label_smoothing
                )
                loss = losses.sum() * (len(share) > 0) / n  # a share without images borrows one
                if not setup.items.cached:
                    loss = loss + sum(setup.model.loss_terms(images, labels).values()) * (len(share) / n)
            # Data parallelism averages gradients over processes; the sum over all images is wanted.
            accelerator.backward(loss * accelerator.num_processes)
        with torch.no_grad():
            mean_loss += loss.detach()
            if share:
                sums.correct += (logits.argmax(1) == labels).sum()
    sums.loss += mean_loss * n
    sums.images += n
    _update(setup)
    return mean_loss


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
