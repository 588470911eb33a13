"""What a head reads of a frozen backbone: its pooled features, coarse maps from inside it, or both."""

import itertools
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lion_fast.backbones import Backbone
from lion_fast.equilibrium.solve import SolveInfo
from lion_fast.equilibrium.states import StateLayer
from lion_fast.errors import OptionError, check_bool, check_choice, check_whole, shown
from lion_fast.methods.base import TunedModel

READINGS = ("auto", "fixed")
GRID = 4  # cells of a map along each side, by default
GRIDS = (1, 2, 4)  # those that are chosen among
FINEST, WIDEST = 256, 8192  # cells along a side, width of states: above them an option is a slip


@dataclass(frozen=True)
class Reading:
    """What a head reads.

    at: the blocks (ViT) or stages (Swin, CNN), from 0, behind which maps are taken; none: the pooled features
    alone. Cells of several maps are read together, at their places. grid: cells along each side of a map.
    pooled: whether the head reads the pooled features too.

    >>> Reading(at=(4, 11), grid=2).in_words()
    'blocks 4 and 11 in 2 x 2 cells beside the pooled features'
    """

    at: tuple[int, ...]
    grid: int = GRID
    pooled: bool = True

    def in_words(self, place: str = "block") -> str:
        """place: what the backbone calls that which a map comes from."""
        if not self.at:
            return "the pooled features alone"
        where = f"{place}{'s' * (len(self.at) > 1)} {' and '.join(map(str, self.at))}"
        cells = f"{self.grid} x {self.grid} cell{'s' * (self.grid > 1)}"
        return f"{where} in {cells}" + (" beside the pooled features" if self.pooled else " alone")


def map_place(backbone: Backbone) -> int:
    """Where a map is taken by default: behind block L // 3 of a ViT (from 0), else the last stage but one.

    Found on validation images of grey drawings: on a ViT-S/14 blocks 4 to 6 are alike, the last ones far
    worse. On photographs later places are better (docs/accuracy.md).
    """
    depth = len(backbone.map_widths)
    return depth // 3 if backbone.family == "vit" else max(depth - 2, 0)


def places_of(backbone: Backbone) -> tuple[int, ...]:
    """An early, a middle and the last place of a backbone, to choose among; a shallow one has fewer."""
    depth = len(backbone.map_widths)
    vit = (depth // 3, 2 * depth // 3, depth - 1)
    return tuple(sorted({*vit} if backbone.family == "vit" else {*range(max(depth - 3, 0), depth)}))


def fixed_reading(
    backbone: Backbone,
    at: int | Sequence[int] | None,
    grid: int | None,
    pooled: bool | None,
    default: Sequence[int],
) -> Reading:
    """The reading of these options, `default` and 4 x 4 cells beside the features where they are None.

    Raises `OptionError` for places that the backbone does not have, and for nothing to read.
    """
    places = default if at is None else at if isinstance(at, (list, tuple)) else (at,)
    for place in places:
        check_whole("at", place, 0, len(backbone.map_widths) - 1)
    if len(set(places)) < len(places):
        raise OptionError(f"at names a place twice: {shown(places)}")
    grid, pooled = GRID if grid is None else grid, True if pooled is None else pooled
    check_whole("grid", grid, most=FINEST)
    check_bool("pooled", pooled)
    if not places and not pooled:
        raise OptionError("pooled=False needs a map to read: give at")
    return Reading(tuple(places), grid, pooled)


def read(backbone: Backbone, x: Tensor, reading: Reading, pool: str) -> Tensor:
    """Tokens of `enter` to what `Cells` takes: the pooled features (B, F), and the cells of the maps.

    (B, F + grid^2 C) in float32 at least, C channels over all maps; the features are there whether they are
    read or not. Nothing here is trained, so it can be computed once.
    """
    if not reading.at:
        return backbone.pool(backbone.body(x), pool)
    y, maps = backbone.body_and_maps(x, reading.at)
    return features_and_cells(backbone.pool(y, pool), maps, reading.grid)


def encoding_of(pool: str, reading: Reading) -> tuple:
    """What tells the output of `read` apart, as `TunedModel.encoding` does."""
    return (read, pool, reading.at, reading.grid if reading.at else 0)


def features_and_cells(features: Tensor, maps: Tensor | Sequence[Tensor], grid: int) -> Tensor:
    """Features (B, F) and maps (B, H, W, C) side by side, (B, F + grid^2 C), float32 at least.

    Each map is averaged to `grid` x `grid` cells; of several, the channels of a cell stand together.
    """
    dtype = torch.promote_types(features.dtype, torch.float32)
    cells = [cells_of(one, grid) for one in ([maps] if isinstance(maps, Tensor) else maps)]
    return torch.cat([features.to(dtype), torch.cat(cells, 2).flatten(1)], 1)


def cells_of(maps: Tensor, grid: int) -> Tensor:
    """A map (B, H, W, C) averaged to cells (B, grid^2, C), float32 at least; a small one repeats."""
    dtype = torch.promote_types(maps.dtype, torch.float32)
    return F.adaptive_avg_pool2d(maps.permute(0, 3, 1, 2).to(dtype), grid).flatten(2).transpose(1, 2)


class Everything(nn.Module):
    """Images to the pooled features and the cells of several maps at several grids, side by side.

    One pass over the backbone for all readings of these places and grids: see `split`.
    """

    def __init__(self, backbone: Backbone, pool: str, at: Sequence[int], grids: Sequence[int]):
        super().__init__()
        self.backbone, self.how, self.at, self.grids = backbone, pool, tuple(at), tuple(grids)

    def encoding(self) -> tuple:
        """What tells the output of `encode` apart, as `TunedModel.encoding` does."""
        return (Everything, self.how, self.at, self.grids)

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to (B, E)."""
        y, maps = self.backbone.body_and_maps(self.backbone.enter(images), self.at)
        cells = [cells_of(one, grid).flatten(1) for one in maps for grid in self.grids]
        return torch.cat([self.backbone.pool(y, self.how).to(cells[0].dtype), *cells], 1)

    def split(self, encoded: Tensor) -> tuple[Tensor, dict[tuple[int, int], Tensor]]:
        """What `encode` gave to features (N, F) and cells (N, grid^2, C) by place and grid."""
        named = list(itertools.product(self.at, self.grids))
        widths = self.backbone.map_widths
        sizes = [grid**2 * widths[place] for place, grid in named]
        features, *cells = encoded.split([encoded.shape[1] - sum(sizes), *sizes], 1)
        return features, {
            (place, grid): part.unflatten(1, (grid**2, widths[place]))
            for (place, grid), part in zip(named, cells, strict=True)
        }


def encoded_for(features: Tensor, cells: Mapping[tuple[int, int], Tensor], reading: Reading) -> Tensor:
    """What `read` gives for a reading, out of `Everything.split`."""
    if not reading.at:
        return features
    parts = torch.cat([cells[place, reading.grid] for place in reading.at], 2)
    return torch.cat([features, parts.flatten(1)], 1)


class Cells(nn.Module):
    """What `features_and_cells` makes, with features and each map's cells normed; no parameters.

    width: channels of a cell, of one map or of each. pooled: whether the features are part of the output.

    >>> Cells(features=8, cells=4, width=6)(torch.randn(3, 8 + 4 * 6)).shape
    torch.Size([3, 32])
    >>> Cells(features=8, cells=4, width=(6, 2), pooled=False)(torch.randn(3, 8 + 4 * 8)).shape
    torch.Size([3, 32])
    """

    def __init__(self, features: int, cells: int, width: int | Sequence[int], pooled: bool = True):
        super().__init__()
        self.widths = (width,) if isinstance(width, int) else tuple(width)
        self.features, self.cells, self.width, self.pooled = features, cells, sum(self.widths), pooled
        self.out_features = features * pooled + cells * self.width

    def split(self, encoded: Tensor) -> tuple[Tensor, Tensor]:
        """Normed features (B, F), none where they are not read, and normed cells (B, cells, C)."""
        features, cells = encoded.split((self.features, self.cells * self.width), 1)
        parts = cells.unflatten(1, (self.cells, self.width)).split(self.widths, 2) if self.widths else ()
        cells = torch.cat([F.layer_norm(part, part.shape[2:]) for part in parts] or [cells[:, None, :0]], 2)
        return F.layer_norm(features, (self.features,))[:, : self.features * self.pooled], cells

    def forward(self, encoded: Tensor) -> Tensor:
        features, cells = self.split(encoded)
        return torch.cat([features, cells.flatten(1)], 1)


class ReadOut(nn.Module):
    """The states of each cell of the maps, at their places, beside the backbone's own features.

    (B, F + cells C) as `features_and_cells` makes it gives (B, F + cells R), without `pooled` (B, cells R).
    The cells of `Cells` go through a `StateLayer` of width R, and the head that follows has weights of its
    own for every cell. Of several maps each has an injection of its own into the one equilibrium, as A has
    columns of its own for each: z = phi(W z + A1 x1 + A2 x2 + b). Options as `StateLayer`.

    >>> ReadOut(features=8, cells=4, width=6, state_dim=2)(torch.randn(3, 8 + 4 * 6)).shape
    torch.Size([3, 16])
    """

    def __init__(
        self,
        features: int,
        cells: int,
        width: int | Sequence[int],
        state_dim: int,
        pooled: bool = True,
        **solve,
    ):
        super().__init__()
        self.cells = Cells(features, cells, width, pooled)
        self.layer = StateLayer(self.cells.width, state_dim, **solve)
        self.out_features = features * pooled + cells * state_dim

    def forward(self, encoded: Tensor, return_info: bool = False) -> Tensor | tuple[Tensor, SolveInfo]:
        features, cells = self.cells.split(encoded)
        found = self.layer(cells, return_info=return_info)
        z, info = found if return_info else (found, None)
        out = torch.cat([features, z.flatten(1).to(encoded.dtype)], 1)
        return (out, info) if return_info else out


class ReadingModel(TunedModel):
    """A method whose head may read maps from inside the backbone, by the options reading, at, grid, pooled.

    `reading` is the `Reading` that it has. With reading="auto" the options that are None are `open`, and
    `settle` gives them values. has_states: what reads cells is a layer of `state_dim` states. both: a front
    and a back map are asked for.
    """

    has_states: bool = False
    both: bool = False

    def take_reading(self, reading: str, at, grid, pooled, default: Sequence[int], **more: Any) -> None:
        """Take these options as given, and `default` places; `more` are options that are open beside them."""
        check_choice("reading", reading, READINGS)
        self.reading = fixed_reading(self.backbone, at, grid, pooled, default)
        given = {"at": at, "grid": grid, "pooled": pooled, **more}
        alone = at is not None and not self.reading.at  # with nothing to choose about maps
        if reading == "auto" and not alone:
            self.open = tuple(name for name, value in given.items() if value is None)
        self.record(reading=reading)
        self._record_reading()
        self.output_end: nn.Module | None = None

    def _record_reading(self) -> None:
        at = self.reading.at
        found = {"at": at[0] if len(at) == 1 else list(at), "grid": self.reading.grid}
        found["pooled"] = self.reading.pooled
        self.record(**{name: None if name in self.open else value for name, value in found.items()})

    def read_widths(self) -> tuple[int, int, tuple[int, ...], bool]:
        """Features, cells, channels of each map and whether the features are read, as `Cells` takes them."""
        reading, widths = self.reading, self.backbone.map_widths
        channels = tuple(widths[place] for place in reading.at)
        features = self.backbone.pooled_width(self.pool)
        return features, reading.grid**2 if channels else 0, channels, reading.pooled

    @abstractmethod
    def build(self) -> None:
        """Make the output end and the head for the reading."""

    def settle(self, chosen: Mapping[str, Any], seed: int) -> None:
        values = {name: getattr(self.reading, name) for name in ("at", "grid", "pooled")} | dict(chosen)
        self.reading = fixed_reading(self.backbone, values["at"], values["grid"], values["pooled"], ())
        self.open, self.settled = (), self.open
        self._record_reading()
        place = self.head.weight
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.build()
        self.to(place.device)
        self.train(self.training)

    def reads_backbone(self) -> bool:
        """Whether nothing of the method's own is in front of what is read."""
        return True

    def encode(self, images: Tensor) -> Tensor:
        return read(self.backbone, self.backbone.enter(images), self.reading, self.pool)

    def encoding(self) -> tuple:
        return encoding_of(self.pool, self.reading)

    def everything(self) -> Everything:
        """What this reading and all that could be chosen are cut from."""
        at, grids = {*places_of(self.backbone), *self.reading.at}, {*GRIDS, self.reading.grid}
        return Everything(self.backbone, self.pool, sorted(at), sorted(grids))

    def behind(self) -> nn.Module:
        return self.head if self.output_end is None else nn.Sequential(self.output_end, self.head)

    def features(self, images: Tensor) -> Tensor:
        encoded = self.encode(images)
        return encoded if self.output_end is None else self.output_end(encoded)
