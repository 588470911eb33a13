"""What the head reads of a backbone beside its own features: a coarse map from inside it, cell by cell."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lion_fast.backbones import Backbone
from lion_fast.equilibrium.solve import SolveInfo
from lion_fast.equilibrium.states import StateLayer

GRID = 4  # cells of the map along each side, by default
FINEST, WIDEST = 256, 8192  # cells along a side, width of states: above them an option is a slip


def map_place(backbone: Backbone) -> int:
    """Where the map is taken by default: behind block L // 3 of a ViT (from 0), else the last stage but one.

    Found on validation images: on a ViT-S/14 blocks 4 to 6 are alike, the last ones far worse.
    """
    depth = len(backbone.map_widths)
    return depth // 3 if backbone.family == "vit" else max(depth - 2, 0)


def features_and_cells(features: Tensor, maps: Tensor, grid: int) -> Tensor:
    """Features (B, F) and a map (B, H, W, C) side by side, (B, F + grid^2 C), float32 at least.

    The map is averaged to `grid` x `grid` cells. Nothing here is trained, so it can be computed once.
    """
    dtype = torch.promote_types(features.dtype, torch.float32)
    cells = F.adaptive_avg_pool2d(maps.permute(0, 3, 1, 2).to(dtype), grid).flatten(2).transpose(1, 2)
    return torch.cat([features.to(dtype), cells.flatten(1)], 1)


class Cells(nn.Module):
    """What `features_and_cells` makes, (B, F + cells C), with features and each cell normed, no parameters.

    >>> Cells(features=8, cells=4, width=6)(torch.randn(3, 8 + 4 * 6)).shape
    torch.Size([3, 32])
    """

    def __init__(self, features: int, cells: int, width: int):
        super().__init__()
        self.features, self.cells, self.width = features, cells, width
        self.out_features = features + cells * width

    def forward(self, encoded: Tensor) -> Tensor:
        features, cells = encoded.split((self.features, self.cells * self.width), 1)
        cells = F.layer_norm(cells.unflatten(1, (self.cells, self.width)), (self.width,))
        return torch.cat([F.layer_norm(features, (self.features,)), cells.flatten(1)], 1)


class ReadOut(nn.Module):
    """The states of each cell of a map, at their places, beside the backbone's own features.

    (B, F + cells C) as `features_and_cells` makes it gives (B, F + cells R): the cells of `Cells` go through
    a `StateLayer` of width R, and the head that follows has weights of its own for every cell. Options as
    `StateLayer`.

    >>> ReadOut(features=8, cells=4, width=6, state_dim=2)(torch.randn(3, 8 + 4 * 6)).shape
    torch.Size([3, 16])
    """

    def __init__(self, features: int, cells: int, width: int, state_dim: int, **solve):
        super().__init__()
        self.cells = Cells(features, cells, width)
        self.layer = StateLayer(width, state_dim, **solve)
        self.out_features = features + cells * state_dim

    def forward(self, encoded: Tensor, return_info: bool = False) -> Tensor | tuple[Tensor, SolveInfo]:
        cells = self.cells
        features, maps = cells(encoded).split((cells.features, cells.cells * cells.width), 1)
        found = self.layer(maps.unflatten(1, (cells.cells, cells.width)), return_info=return_info)
        z, info = found if return_info else (found, None)
        out = torch.cat([features, z.flatten(1).to(encoded.dtype)], 1)
        return (out, info) if return_info else out
