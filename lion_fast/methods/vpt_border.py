"""VPT on a CNN: a learnable border of pixels around the image.

Source: Jia et al., "Visual Prompt Tuning", ECCV 2022, arXiv 2203.12119, its form for ConvNets.
"""

import torch
from torch import Tensor, nn


class PixelBorder(nn.Module):
    """Images (B, 3, H, W) in a frame `pixels` wide: (B, 3, H + 2 p, W + 2 p), the border the same for all.

    Two parameters: `rows` (3, 2 p, W + 2 p), top above bottom, and `columns` (3, H, 2 p), left beside right;
    12 p (S + p) numbers on a square of side S. They are drawn uniformly from (0, 1), as pixels are, and then
    normalised as the images are.

    >>> border = PixelBorder(10, (224, 224), (0.5,) * 3, (0.5,) * 3)
    >>> sum(p.numel() for p in border.parameters())
    28080
    >>> border(torch.zeros(2, 3, 224, 224)).shape
    torch.Size([2, 3, 244, 244])
    """

    def __init__(self, pixels: int, size: tuple[int, int], mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        height, width = size
        self.pixels, self.mean, self.std = pixels, tuple(mean), tuple(std)
        self.rows = nn.Parameter(torch.empty(3, 2 * pixels, width + 2 * pixels))
        self.columns = nn.Parameter(torch.empty(3, height, 2 * pixels))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for part in (self.rows, self.columns):
            mean, std = (part.new_tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
            part.uniform_(0, 1).sub_(mean).div_(std)

    def forward(self, images: Tensor) -> Tensor:
        p = self.pixels
        rows, columns = (
            part.to(images.dtype).expand(len(images), -1, -1, -1) for part in (self.rows, self.columns)
        )
        middle = torch.cat([columns[..., :p], images, columns[..., p:]], -1)
        return torch.cat([rows[:, :, :p], middle, rows[:, :, p:]], -2)
