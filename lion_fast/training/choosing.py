"""Which maps a head reads, chosen from the training images alone: the candidates, their judging, the rule.

Where to read and how finely depends on the task: early and place by place for strokes, from the middle for
textures, late or nowhere but the pooled features for objects (docs/accuracy.md). So no reading is right for
all, and the training images say which one is right for these.

Candidates. Three places, a third and two thirds of the way through a ViT and its last block, else the last
three stages, and the last place together with either of the others; one map in 1, 2 or 4 cells a side, two
maps in 1 or 2; each beside the pooled features and alone; and the pooled features alone. Options that are given are
kept, whatever they are.

Judging. The features of up to `MOST_IMAGES` training images are computed once, for all candidates in one pass.
In stratified folds each candidate is trained on the others and predicts the held-out one: a linear head for
the probe, for LION one step of its layer, z = tanh(A x + b), in front of the head, as the equilibrium differs
from one step by less than readings do. All folds are trained at the same time, in `STEPS` steps of AdamW on
`BATCH` images whatever the number of images, so that choosing costs the same few seconds for all. Wide maps are
turned into their `PRINCIPAL` main directions first.

Rule. The lowest held-out cross-entropy wins, after one temperature for each candidate: a head on many features
is surer of itself than it may be, right or wrong, and that is not what is asked. Candidates whose loss is not
above the lowest one by more than `SLACK` standard errors of their difference, image by image, count as equal;
of equals the one with the fewest parameters is taken.
"""

import itertools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lion_fast.methods.reading import Reading, cells_of
from lion_fast.training.order import derive_seed

if TYPE_CHECKING:
    from lion_fast.backbones import Backbone
    from lion_fast.methods.reading import ReadingModel

MOST_IMAGES = 500
FOLDS = 3
STEPS, BATCH = 120, 64
LR, DECAY = 5e-3, 0.3  # of LION's presets
PRINCIPAL = 128
SLACK = 0.5
WIDTHS = (16, 32, 64)


@dataclass(frozen=True)
class Candidate:
    """A reading and a width of states (None: none are trained)."""

    reading: Reading
    width: int | None


def places_of(backbone: "Backbone") -> tuple[int, ...]:
    """An early, a middle and the last place of a backbone; of a shallow one, what it has of them."""
    depth = len(backbone.map_widths)
    if backbone.family == "vit":
        found = {depth // 3, 2 * depth // 3, depth - 1}
    else:
        found = set(range(max(depth - 3, 0), depth))
    return tuple(sorted(found))


def readings_of(model: "ReadingModel") -> list[Reading]:
    """The readings that may be chosen for a model: those that agree with the options it was given."""
    own, places = model.reading, places_of(model.backbone)
    last = places[-1]
    at = [*((place,) for place in places), *((place, last) for place in places[:-1])]
    if "at" not in model.open:
        at = [own.at]
    elif getattr(model, "both", False):
        at = [pair for pair in at if len(pair) == 2] or [own.at]
    found = []
    for where, pooled in itertools.product(at, (True, False) if "pooled" in model.open else (own.pooled,)):
        grids = (1, 2, 4) if len(where) == 1 else (1, 2)
        found += [Reading(where, g, pooled) for g in (grids if "grid" in model.open else (own.grid,))]
    free = {"at", "grid", "pooled"} <= set(model.open) and not getattr(model, "both", False)
    return [Reading((), own.grid, True), *found] if free else found


class Everything(nn.Module):
    """Images to the pooled features and the cells of all maps that some readings ask for, side by side."""

    def __init__(self, model: "ReadingModel", readings: list[Reading]):
        super().__init__()
        self.backbone, self.how = model.backbone, model.pool
        self.at = sorted({place for reading in readings for place in reading.at})
        self.grids = sorted({reading.grid for reading in readings if reading.at})

    def encode(self, images: Tensor) -> Tensor:
        x = self.backbone.enter(images)
        if not self.at:
            return self.backbone.pool(self.backbone.body(x), self.how)
        y, maps = self.backbone.body_and_maps(x, self.at)
        cells = [cells_of(one, grid).flatten(1) for one in maps for grid in self.grids]
        return torch.cat([self.backbone.pool(y, self.how).to(cells[0].dtype), *cells], 1)

    def split(self, encoded: Tensor) -> tuple[Tensor, dict[tuple[int, int], Tensor]]:
        """What `encode` gave to features (N, F) and cells (N, grid^2, C) by place and grid."""
        widths = self.backbone.map_widths
        named = [(place, grid) for place in self.at for grid in self.grids]
        sizes = [grid**2 * widths[place] for place, grid in named]
        features, *cells = encoded.split([encoded.shape[1] - sum(sizes), *sizes], 1)
        return features, {
            (place, grid): part.unflatten(1, (grid**2, widths[place]))
            for (place, grid), part in zip(named, cells, strict=True)
        }


def encoded_for(features: Tensor, cells: Mapping[tuple[int, int], Tensor], reading: Reading) -> Tensor:
    """What `methods.reading.read` gives for a reading, out of `Everything.split`."""
    if not reading.at:
        return features
    parts = torch.cat([cells[place, reading.grid] for place in reading.at], 2)
    return torch.cat([features, parts.flatten(1)], 1)


def stratified_folds(labels: Tensor, folds: int, seed: int) -> Tensor:
    """The fold of each item, int64 (N,): every class spread evenly, from a seed."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = order[labels[order].sort(stable=True).indices]
    found = torch.empty_like(order)
    found[order] = torch.arange(len(order)) % folds
    return found


def principal(cells: Tensor) -> tuple[Tensor, float]:
    """Cells (N, n, C) in at most `PRINCIPAL` directions, and the factor that steps in them are to be longer by.

    The directions are mixed at random, so that none is much larger than another, as no channel is.
    """
    count, width = PRINCIPAL, cells.shape[2]
    if width <= count:
        return cells, 1.0
    rows = cells.flatten(0, 1)
    mean = rows.mean(0)
    some = (rows - mean)[:: math.ceil(len(rows) / 512)]
    directions = torch.linalg.svd(some, full_matrices=False).Vh[:count]
    mix = torch.linalg.qr(
        torch.randn(len(directions), len(directions), generator=torch.Generator().manual_seed(0))
    )
    return (cells - mean) @ (directions.T @ mix.Q), math.sqrt(width / len(directions))


def held_out(
    features: Tensor | None,
    cells: Tensor | None,
    labels: Tensor,
    classes: int,
    folds: Tensor,
    width: int | None,
    stretch: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """Logits (N, K) of each image by the head that was trained without its fold.

    features (N, F) and cells (N, n, C): what is read, normed; None where it is not. width: of the states, None
    for a linear head. stretch: of `principal`.
    """
    draw = torch.Generator().manual_seed(seed)
    count = int(folds.max()) + 1

    def new(*shape: int, std: float) -> nn.Parameter:
        return nn.Parameter(torch.randn(count, *shape, generator=draw) * std)

    groups, states = [], cells is not None and width is not None
    inputs = 0 if features is None else features.shape[1]
    if cells is not None:
        inputs += cells.shape[1] * (width if states else cells.shape[2])
    if states:
        A, b = new(cells.shape[2], width, std=cells.shape[2] ** -0.5 / stretch), new(1, width, std=0.0)
        groups += [{"params": [A], "scale": stretch, "weight_decay": DECAY / stretch}]
        groups += [{"params": [b], "scale": 1.0, "weight_decay": 0.0}]
    head, bias = new(inputs, classes, std=0.02), new(1, classes, std=0.0)
    groups += [{"params": [head], "scale": 1.0, "weight_decay": DECAY}]
    groups += [{"params": [bias], "scale": 1.0, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR)

    def logits(items: Tensor) -> Tensor:
        """Of items (folds, B), by each fold's own head."""
        parts = [] if features is None else [features[items]]
        if cells is not None:
            x = cells[items]
            if states:
                x = torch.tanh(torch.bmm(x.flatten(1, 2), A) + b).unflatten(1, x.shape[1:3])
            parts.append(x.flatten(2))
        return torch.bmm(torch.cat(parts, 2), head) + bias

    own = [(folds != k).nonzero().flatten() for k in range(count)]
    size = min(BATCH, *map(len, own))
    queues = [own[k][:0] for k in range(count)]
    for step in range(STEPS):
        for k in range(count):
            if len(queues[k]) < size:
                queues[k] = torch.cat([queues[k], own[k][torch.randperm(len(own[k]), generator=draw)]])
        items = torch.stack([queue[:size] for queue in queues])
        queues = [queue[size:] for queue in queues]
        for group in optimizer.param_groups:
            group["lr"] = LR * group["scale"] * min(1.0, (step + 1) / 10)
            group["lr"] *= 0.5 * (1 + math.cos(math.pi * step / STEPS))
        loss = count * F.cross_entropy(logits(items).flatten(0, 1), labels[items].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = torch.empty(len(labels), classes)
    with torch.no_grad():
        for k in range(count):
            left = (folds == k).nonzero().flatten()
            for some in left.split(256):
                found[some] = logits(some.expand(count, -1))[k]
    return found
