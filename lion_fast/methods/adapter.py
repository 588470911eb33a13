"""Bottleneck adapters beside or behind the halves of a frozen ViT block: AdaptFormer and Houlsby's.

Sources: Chen et al., "AdaptFormer", NeurIPS 2022, arXiv 2205.13535; Houlsby et al., "Parameter-Efficient
Transfer Learning for NLP", ICML 2019, arXiv 1902.00751. Written from their mathematics.
"""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from lion_fast.backbones import Backbone
from lion_fast.backbones.cheaper import mlp_branch
from lion_fast.errors import check_number, check_whole
from lion_fast.methods.base import MOST, register
from lion_fast.methods.blocks import BlockMethod, attention_branch
from lion_fast.methods.noise import dropout


class Bottleneck(nn.Module):
    """up(dropout(sigma(down(x)))): D -> r -> D, with biases; 2 D r + r + D numbers.

    The down projection is drawn as `nn.Linear` draws (Kaiming uniform, a = sqrt 5), the up projection and
    both biases are zero, so a bottleneck starts as the zero function.
    """

    def __init__(self, dim: int, rank: int, *, activation: str = "relu", dropout: float = 0.0):
        super().__init__()
        self.down = nn.Linear(dim, rank)
        self.up = nn.Linear(rank, dim)
        self.activation, self.dropout = activation, dropout
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor) -> Tensor:
        z = self.down(x)
        z = F.gelu(z) if self.activation == "gelu" else F.relu(z)
        return self.up(dropout(z, self.dropout, self.training))


def bottlenecks(backbone: Backbone, rank: int, dropout: float, activation: str = "relu") -> nn.ModuleList:
    """A `Bottleneck` for every block of a ViT; `OptionError` for a rank or dropout out of range."""
    check_whole("rank", rank, most=MOST)
    check_number("dropout", dropout, least=0, below=1)
    return nn.ModuleList(
        Bottleneck(backbone.width_in, rank, activation=activation, dropout=dropout) for _ in backbone.blocks
    )


@register("adaptformer")
class AdaptFormer(BlockMethod):
    """x <- x + Attn(LN1 x);  x <- x + MLP(LN2 x) + s W_up relu(W_down x), the bottleneck on the un-normed x.

    L (2 D r + r + D) numbers. A new model computes exactly what its backbone does: the up projection is zero,
    and for the same reason the down projection's first gradient is zero.

    Args:
        rank: width r of the bottleneck; 64 in the paper, 8 in the VTAB-1k comparisons of others.
        scale: the factor s.
        dropout: behind the activation, while training; the paper's code has 0.1.
        pool, head_bias: see `TunedModel`.

    >>> from lion_fast import load_backbone
    >>> vit = load_backbone("vit_tiny_patch16_224", pretrained=False, img_size=32, depth=2)
    >>> AdaptFormer(vit, num_classes=10, rank=8).num_trainable()
    6544
    """

    summary = "AdaptFormer: a bottleneck beside the MLP of every frozen ViT block."

    def __init__(
        self,
        backbone,
        num_classes: int,
        *,
        rank: int = 64,
        scale: float = 0.1,
        dropout: float = 0.0,
        **options,
    ):
        super().__init__(backbone, num_classes, **options)
        check_number("scale", scale, least=-1e6, most=1e6)
        self.record(rank=rank, scale=scale, dropout=dropout)
        self.scale = scale
        self.adapters = bottlenecks(self.backbone, rank, dropout)

    def block(self, i: int, block: nn.Module, x: Tensor) -> Tensor:
        x = x + attention_branch(block, x)
        return x + mlp_branch(block, x) + self.scale * self.adapters[i](x)


@register("houlsby")
class Houlsby(BlockMethod):
    """x <- x + a + W_up gelu(W_down a) with a = Attn(LN1 x), and the same with m = MLP(LN2 x).

    Two sequential bottlenecks per block, each on what a branch is about to add (behind a LayerScale where
    there is one): 2 L (2 D r + r + D) numbers. The up projections start at zero, so a new model computes
    exactly what its backbone does; the original draws both projections near zero instead.

    Args:
        rank: width r of the bottlenecks.
        dropout: behind the activation, while training.
        pool, head_bias: see `TunedModel`.

    >>> from lion_fast import load_backbone
    >>> vit = load_backbone("vit_tiny_patch16_224", pretrained=False, img_size=32, depth=2)
    >>> Houlsby(vit, num_classes=10, rank=8).num_trainable()
    13088
    """

    summary = "Houlsby adapters: a bottleneck behind both halves of every frozen ViT block."

    def __init__(self, backbone, num_classes: int, *, rank: int = 8, dropout: float = 0.0, **options):
        super().__init__(backbone, num_classes, **options)
        self.record(rank=rank, dropout=dropout)
        self.after_attention, self.after_mlp = (
            bottlenecks(self.backbone, rank, dropout, "gelu") for _ in range(2)
        )

    def block(self, i: int, block: nn.Module, x: Tensor) -> Tensor:
        a = attention_branch(block, x)
        x = x + a + self.after_attention[i](a)
        m = mlp_branch(block, x)
        return x + m + self.after_mlp[i](m)
