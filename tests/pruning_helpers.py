"""A small model with two ends of different widths, and what the tests of pruning do with it."""

import torch
from torch import nn

from lion_fast import LionLayer
from lion_fast.pruning import RobustPruner
from lion_fast.pruning.masks import find_layers, find_matrices

D, R = 12, 8
EXACT = {"tol": 0.0, "max_iter": 200, "backward": "exact"}


class TwoEnds(nn.Module):
    """Two ends of different widths around a frozen map, and a head."""

    def __init__(self, state_dim=R, **options):
        super().__init__()
        self.input_end = LionLayer(D, state_dim, **options)
        self.body = nn.Linear(D, 2 * D).requires_grad_(False)
        self.output_end = LionLayer(2 * D, state_dim, **options)
        self.head = nn.Linear(2 * D, 3)

    def forward(self, x):
        return self.head(self.output_end(self.body(self.input_end(x))))


def loud(module):
    """Weights large enough that every end matters."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.requires_grad and not name.startswith("head"):
                p.copy_(0.3 * torch.randn_like(p))
    return module


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def matrices_of(model):
    return {m.full_name: m.parameter for m in find_matrices(find_layers(model))}


def copies_of(model):
    """The matrices' values as they are now."""
    return {k: p.detach().clone() for k, p in matrices_of(model).items()}


def gradients_of(model):
    return {k: p.grad.clone() for k, p in matrices_of(model).items()}


def flat(masks):
    return torch.cat([m.flatten() for m in masks.values()])


def backward(model, step):
    """Gradients of the step's own batch."""
    generator = torch.Generator().manual_seed(step)
    model.zero_grad()
    if isinstance(model, TwoEnds):
        x, y = torch.randn(16, D, generator=generator), torch.randint(3, (16,), generator=generator)
        nn.functional.cross_entropy(model(x), y).backward()
    else:
        model(torch.randn(8, model.dim, generator=generator)).square().mean().backward()


def robust(model, optimizer=None, **options):
    """A `RobustPruner`, by default with plain SGD."""
    optimizer = torch.optim.SGD(trained(model), lr=0.1) if optimizer is None else optimizer
    return RobustPruner(model, optimizer, **{"keep": 0.5, "total_steps": 9} | options)


def train(model, pruner, steps, start=0):
    for step in range(start, steps):
        backward(model, step)
        pruner.step()
