"""Which maps a head reads, chosen from the training images alone: the candidates, their judging, the rule.

Where to read and how finely depends on the task: early and place by place for strokes, from the middle for
textures, late for objects (docs/accuracy.md). So no reading is right for all, and the training images say
which one is right for these.

Candidates. Three places, a third and two thirds of the way through a ViT and its last block, else the last
three stages, and the last place together with either of the others (the front and the back map of one
equilibrium); one map in 1, 2 or 4 cells a side, two maps in 1 or 2; each beside the pooled features and
alone; and the pooled features alone. Then, at the reading taken, the widths `WIDTHS`. Options that are
given are kept.

Judging. The features of up to `MOST_IMAGES` training images are computed once, for all candidates in one
pass. In stratified folds, groups of near-duplicates undivided, each candidate is trained on the others and
predicts the held-out one: a linear head for the probe, for LION one step of its layer, z = tanh(A x + b),
in front of the head, as the equilibrium differs from one step by less than readings do. All folds are
trained at the same time, in `STEPS` steps of AdamW on `BATCH` images whatever the number of images, so
choosing costs the same few seconds for all, and the same seed gives the same choice. Wide maps are turned
into `PRINCIPAL` main directions first.

Rule. The held-out cross-entropy decides, after one temperature for each candidate: a head on many features
is surer of itself than it may be, right or wrong, and that is not what is asked. With few images the lowest
loss is often luck. So one reading is expected beforehand, the middle place in 2 x 2 cells beside the
features (for a probe, which has a weight for every channel of every cell, in one cell), and with it R = 32;
the best of the others is taken where it is better by more than one standard error of the difference, image
by image. What is expected, and that it is, was found on photographs (docs/accuracy.md).
"""

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, Subset

from lion_fast.methods.reading import GRIDS, Cells, Reading, encoded_for, places_of
from lion_fast.training.config import TrainConfig
from lion_fast.training.features import MOST_IMAGES, FeaturesTooLarge, FeatureStore
from lion_fast.training.items import check_labels, with_transform
from lion_fast.training.order import derive_seed

if TYPE_CHECKING:
    from lion_fast.methods.reading import ReadingModel

FOLDS = 3
STEPS, BATCH = 120, 64
LR, DECAY = 5e-3, 0.3  # of LION's presets
PRINCIPAL = 128
WIDTHS = (16, 32, 64)
TEMPERATURES = torch.logspace(-1.5, 1.0, 26)


def readings_of(model: "ReadingModel", needs_map: bool = False) -> list[Reading]:
    """The readings that may be chosen for a model: those that agree with the options it was given."""
    own, places = model.reading, places_of(model.backbone)
    at = [*((place,) for place in places), *((place, places[-1]) for place in places[:-1])]
    if "at" not in model.open:
        at = [own.at]
    elif model.both:
        at = [pair for pair in at if len(pair) == 2] or [own.at]
    found = []
    for where, pooled in itertools.product(at, (True, False) if "pooled" in model.open else (own.pooled,)):
        grids = GRIDS if len(where) == 1 else GRIDS[:2]
        found += [Reading(where, g, pooled) for g in (grids if "grid" in model.open else (own.grid,))]
    free = {"at", "grid", "pooled"} <= set(model.open) and not (model.both or needs_map)
    return [Reading((), own.grid), *found] if free else found


def expected(model: "ReadingModel", readings: Sequence[Reading]) -> Reading:
    """The reading that is taken where none is better by more than chance: the first in the rule's terms."""
    middle, grid = places_of(model.backbone)[-2:][0], 2 if model.has_states else 1

    def far(reading: Reading) -> tuple:
        return reading.at != (middle,), middle not in reading.at, reading.grid != grid, not reading.pooled

    return min(readings, key=far)


def pieces(
    features: Tensor, cells: Mapping[tuple[int, int], Tensor], reading: Reading
) -> tuple[Tensor | None, Tensor | None]:
    """What a head reads, normed: features (N, F) and cells (N, n, C), each None where it reads none."""
    widths = [cells[place, reading.grid].shape[2] for place in reading.at]
    count = reading.grid**2 if widths else 0
    split = Cells(features.shape[1], count, widths, reading.pooled).split(
        encoded_for(features, cells, reading)
    )
    return (split[0] if reading.pooled else None), (split[1] if widths else None)


def stratified_folds(labels: Tensor, folds: int, seed: int) -> Tensor:
    """The fold of each item, int64 (N,): every class spread evenly, from a seed."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = order[labels[order].sort(stable=True).indices]
    found = torch.empty_like(order)
    found[order] = torch.arange(len(order)) % folds
    return found


def whole_groups(folds: Tensor, groups: Sequence[str]) -> Tensor:
    """Folds in which a group is where its first item is; as they were where one fold would be left."""
    first = dict(reversed([*zip(groups, folds.tolist(), strict=True)]))
    found = torch.tensor([first[group] for group in groups])
    return found if len(found.unique()) > 1 else folds


def principal(cells: Tensor) -> tuple[Tensor, float]:
    """Cells (N, n, C) in at most `PRINCIPAL` directions, and by what factor steps in them are to be longer.

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

    features (N, F) and cells (N, n, C): what is read, normed; None where it is not. width: of the states,
    None for a linear head. stretch: of `principal`.
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


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each image (N,), at the temperature that is best for all of them together."""
    return min(
        (F.cross_entropy(logits * t, labels, reduction="none") for t in TEMPERATURES),
        key=lambda found: found.mean().item(),
    )


def choose(
    model: "ReadingModel",
    images: Dataset,
    store: FeatureStore,
    config: TrainConfig,
    *,
    check: Callable[[], None] = lambda: None,
    **reading: Any,
) -> dict[str, Any]:
    """Values for what is open in a model, from its training images, and how they were found; JSON-able.

    images: As `fit` gets them. store: Keeps the features, so that they are computed once.
    config: Its seed decides folds and first values. check: Called between candidates; may raise to leave.
    reading: Further options of `features.encode`.

    "at", "grid", "pooled" and "state_dim" are for `settle`; "loss" is the held-out one, "features_alone" that
    of the pooled features (None where they were no candidate), "candidates" are all with theirs, best first.
    An empty dict, for the defaults, with fewer than four images, or where the maps do not fit into memory or
    are not finite, which training tells. Raises `DataError` for labels out of range.
    """
    if len(images) < 4:
        return {}
    readings = readings_of(model, needs_map=config.prune is not None)
    view, groups = with_transform(model, images), getattr(images, "groups", None)
    given = images, view
    if len(images) > MOST_IMAGES:
        some = few(images, config.seed)
        given = Subset(images, some), Subset(view, some)
        groups = groups and [groups[i] for i in some]
    batch, precision = config.eval_batch_size or config.batch_size, config.mixed_precision
    try:
        made, _ = store.everything(model, *given, batch, mixed_precision=precision, check=check, **reading)
    except FeaturesTooLarge:
        return {}
    check_labels(made.tensors[1], model.num_classes)
    if not torch.isfinite(made.tensors[0]).all():
        return {}
    started = time.perf_counter()
    features, cells = model.everything().split(made.tensors[0])
    judge = _Judge(features, cells, made.tensors[1], model.num_classes, groups, config.seed, check)
    width = model.state_dim if model.has_states else None
    found = {one: judge.losses(one, width) for one in readings}
    taken = best_of(found, expected(model, readings))
    if width is not None and "state_dim" in model.open and taken.at:
        widths = {w: found[taken] if w == width else judge.losses(taken, w) for w in {*WIDTHS, width}}
        width = best_of(widths, width)
    means = {one: loss.mean().item() for one, loss in found.items()}
    place = "block" if model.backbone.family == "vit" else "stage"
    return {
        "at": list(taken.at),
        "grid": taken.grid,
        "pooled": taken.pooled,
        "state_dim": width,
        "words": taken.in_words(place),
        "folds": judge.count,
        "images": len(made),
        "loss": means[taken],
        "features_alone": next((means[one] for one in readings if not one.at), None),
        "seconds": round(time.perf_counter() - started, 3),
        "candidates": {one.in_words(place): round(means[one], 4) for one in sorted(means, key=means.get)},
    }


def best_of(found: Mapping[Any, Tensor], expected: Any) -> Any:
    """What has the lowest mean loss, where it is lower by more than one standard error; else `expected`."""
    best = min(found, key=lambda one: found[one].mean().item())
    gain = found[expected] - found[best]
    return best if gain.mean().item() > gain.std().item() / math.sqrt(len(gain)) else expected


def few(images: Dataset, seed: int) -> list[int]:
    """Indices of at most `MOST_IMAGES` items, every class in its share where the labels are known, sorted."""
    parts = math.ceil(len(images) / MOST_IMAGES)
    labels = getattr(images, "labels", None)
    if labels is None:
        return list(range(0, len(images), parts))
    folds = stratified_folds(torch.as_tensor(labels), parts, derive_seed(seed, "few"))
    return (folds == 0).nonzero().flatten().tolist()


def in_words(chosen: Mapping[str, Any]) -> str:
    """One line about a choice."""
    alone = chosen["features_alone"]
    against = "" if alone is None or not chosen["at"] else f" against {alone:.2f} for the features alone"
    return f"reads {chosen['words']}; {chosen['folds']}-fold loss {chosen['loss']:.2f}{against}"


class _Judge:
    """Held-out losses of readings, on the same folds."""

    def __init__(
        self, features: Tensor, cells: Mapping, labels: Tensor, classes: int, groups, seed: int, check
    ):
        self.features, self.cells, self.labels, self.classes = features, cells, labels, classes
        self.seed, self.count, self.check = derive_seed(seed, "judge"), min(FOLDS, len(labels) // 2), check
        self.folds = stratified_folds(labels, self.count, self.seed)
        if groups is not None:
            self.folds = whole_groups(self.folds, groups)
        self._principal: dict[tuple, tuple[Tensor, float]] = {}

    def losses(self, reading: Reading, width: int | None) -> Tensor:
        """Of each image (N,). width: of states; None: a linear head."""
        self.check()
        features, cells = pieces(self.features, self.cells, reading)
        stretch = 1.0
        if cells is not None and width is not None:
            where = (reading.at, reading.grid)
            if where not in self._principal:
                self._principal[where] = principal(cells)
            cells, stretch = self._principal[where]
        given = (self.labels, self.classes, self.folds, width, stretch, self.seed)
        return losses(held_out(features, cells, *given), self.labels)
