"""VPT on a CNN: a learnable border of pixels around the image.

Source: Jia et al., "Visual Prompt Tuning", ECCV 2022, arXiv 2203.12119, its form for ConvNets.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lion_fast.errors import DataError


class PixelBorder(nn.Module):
    """Images (B, 3, H, W) in a frame `pixels` wide: (B, 3, H + 2 p, W + 2 p), the border the same for all.

    Two parameters: `row_pixels` (3, 2 p, W + 2 p), top above bottom, and `column_pixels` (3, H, 2 p), left
    beside right; 12 p (S + p) numbers on a square of side S. They are pixels as published, drawn uniformly
    from (0, 1) and normalised in every forward as the images are; `rows` and `columns` are normalised.

    >>> border = PixelBorder(10, (224, 224), (0.5,) * 3, (0.5,) * 3)
    >>> sum(p.numel() for p in border.parameters())
    28080
    >>> border(torch.zeros(2, 3, 224, 224)).shape
    torch.Size([2, 3, 244, 244])
    """

    def __init__(self, pixels: int, size: tuple[int, int], mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        height, width = size
        self.pixels = pixels
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)
        self.row_pixels = nn.Parameter(torch.empty(len(mean), 2 * pixels, width + 2 * pixels))
        self.column_pixels = nn.Parameter(torch.empty(len(mean), height, 2 * pixels))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.row_pixels.uniform_(0, 1)
        self.column_pixels.uniform_(0, 1)

    @property
    def rows(self) -> Tensor:
        """The rows as the backbone sees them."""
        return (self.row_pixels - self.mean) / self.std

    @property
    def columns(self) -> Tensor:
        """The columns as the backbone sees them."""
        return (self.column_pixels - self.mean) / self.std

    def renewed(self, state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
        """A state that may hold `rows` and `columns` as parameters, as it was once, with pixels instead."""
        state = dict(state)
        for name in ("rows", "columns"):
            old = state.get(f"{prefix}{name}")
            if old is not None and old.ndim == 3 and len(old) == len(self.mean):
                pixels = state.pop(f"{prefix}{name}") * self.std.to(old.device) + self.mean.to(old.device)
                state[f"{prefix}{name[:-1]}_pixels"] = pixels
        return state

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        super()._load_from_state_dict(self.renewed(state_dict, prefix), prefix, *args)

    def forward(self, images: Tensor) -> Tensor:
        p, size = self.pixels, (self.column_pixels.shape[1], self.row_pixels.shape[2] - 2 * self.pixels)
        if images.shape[2:] != size:
            raise DataError(f"the border is around images of {size}; got {tuple(images.shape)}")
        rows, columns = (
            part.to(images.dtype).expand(len(images), -1, -1, -1) for part in (self.rows, self.columns)
        )
        middle = torch.cat([columns[..., :p], images, columns[..., p:]], -1)
        return torch.cat([rows[:, :, :p], middle, rows[:, :, p:]], -2)
