"""LoRA: low-rank terms beside the frozen query, key and value projections of a ViT.

Source: Hu et al., "LoRA", ICLR 2022, arXiv 2106.09685; written from its mathematics.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lion_fast.backbones.cheaper import mlp_branch
from lion_fast.errors import check_choice, check_number, check_whole
from lion_fast.methods.base import MOST, register
from lion_fast.methods.blocks import BlockMethod, attention_branch, self_attention
from lion_fast.methods.noise import dropout
from lion_fast.methods.owned import Merged, mergeable_copy


@register("lora")
class LoRA(BlockMethod):
    """qkv(x) <- qkv(x) + (alpha / r) B A x in every block.

    Two different methods carry the name and, at one r, the same 4 L D r numbers: target="qkv" has one A
    (r, D) for the fused projection and B (3 D, r); target="qv" has an A and a B for the queries and another
    pair for the values, and leaves the keys alone. A is drawn uniformly from +-1/sqrt(D) (Kaiming, a = sqrt
    5), B is zero: a new model computes exactly what its backbone does, and A's first gradient is zero.
    `merge()` adds the product to the frozen weights.

    Args:
        rank: r.
        alpha: numerator of the scale; None: `rank`, a scale of 1.
        target: "qkv" or "qv".
        dropout: on what A reads, while training.
        pool, head_bias: see `TunedModel`.

    >>> from lion_fast import load_backbone
    >>> vit = load_backbone("vit_tiny_patch16_224", pretrained=False, img_size=32, depth=2)
    >>> LoRA(vit, num_classes=10, rank=8).num_trainable()
    12288
    """

    def __init__(
        self,
        backbone,
        num_classes: int,
        *,
        rank: int = 8,
        alpha: float | None = None,
        target: str = "qkv",
        dropout: float = 0.0,
        **options,
    ):
        super().__init__(backbone, num_classes, **options)
        check_whole("rank", rank, most=MOST)
        check_choice("target", target, ("qkv", "qv"))
        check_number("dropout", dropout, least=0, below=1)
        if alpha is not None:
            check_number("alpha", alpha, above=0, most=1e6)
        self.record(rank=rank, alpha=alpha, target=target, dropout=dropout)
        self.target, self.dropout, self.scale = target, dropout, (rank if alpha is None else alpha) / rank
        L, D = len(self.backbone.blocks), self.backbone.width_in
        inner = self.backbone.blocks[0].attn.proj.in_features
        parts, out = (1, 3 * inner) if target == "qkv" else (2, inner)
        bound = 1 / math.sqrt(D)
        self.A = nn.Parameter(torch.empty(L, parts, rank, D).uniform_(-bound, bound))
        self.B = nn.Parameter(torch.zeros(L, parts, out, rank))

    def block(self, i: int, block: nn.Module, x: Tensor) -> Tensor:
        x = x + attention_branch(block, x, lambda t: self_attention(block.attn, t, self.delta(i, t)))
        return x + mlp_branch(block, x)

    def delta(self, i: int, rows: Tensor) -> Tensor:
        """What block i adds to q, k, v of rows (B, N, D): (B, N, 3 D)."""
        z = dropout(rows, self.dropout, self.training)
        parts = [F.linear(F.linear(z, A), B) for A, B in zip(self.A[i], self.B[i], strict=True)]
        if self.target == "qv":
            parts.insert(1, torch.zeros_like(parts[0]))
        return self.scale * torch.cat(parts, -1)

    def delta_weight(self, i: int) -> Tensor:
        """The same as one matrix (3 D, D)."""
        parts = [B @ A for A, B in zip(self.A[i], self.B[i], strict=True)]
        if self.target == "qv":
            parts.insert(1, torch.zeros_like(parts[0]))
        return self.scale * torch.cat(parts)

    @torch.no_grad()
    def merge(self) -> Merged:
        """The same function with the low-rank terms in the weights of a backbone of its own."""
        backbone = mergeable_copy(self)
        for i, block in enumerate(backbone.blocks):
            weight = block.attn.qkv.weight
            # the sum first, then the weight's own precision
            merged = (weight + self.delta_weight(i)).to(weight)
            block.attn.qkv.weight = nn.Parameter(merged, requires_grad=False)
        return Merged(self, backbone)
