"""APT: what prompt tokens do, approximated per token without lengthening the sequence.

Source: "Approximated Prompt Tuning for Vision-Language Pre-trained Models", arXiv 2306.15706. The original
is for vision-language models; this is a port to a plain ViT without published reference figures.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lion_fast.backbones.cheaper import mlp_branch
from lion_fast.errors import check_whole
from lion_fast.methods.base import MOST, register
from lion_fast.methods.blocks import BlockMethod, attention_branch

RANK = 4


@register("apt")
class APT(BlockMethod):
    """out = (y + w e) exp(s) in place of a block's attention output y, from the attention's input t.

    a = relu(t (P + P A B)^T) (N, T), e = a P, w = the largest entry of a per token, which gets no gradient.
    P (T, D) is drawn from a normal of deviation 0.02, A (D, 4) from a unit normal, B (4, D) and s are zero:
    L ((T + 8) D + 1) numbers. A new model is near its backbone, and is its backbone where P = 0; A's first
    gradient is zero because B is.

    Args:
        length: T, the prompts per layer.
        pool, head_bias: see `TunedModel`.

    >>> from lion_fast import load_backbone
    >>> vit = load_backbone("vit_tiny_patch16_224", pretrained=False, img_size=32, depth=2)
    >>> APT(vit, num_classes=10, length=50).num_trainable()
    22274
    """

    def __init__(self, backbone, num_classes: int, *, length: int = 200, **options):
        super().__init__(backbone, num_classes, **options)
        check_whole("length", length, most=MOST)
        self.record(length=length)
        L, D = len(self.backbone.blocks), self.backbone.width_in
        self.P = nn.Parameter(torch.empty(L, length, D).normal_(std=0.02))
        self.A = nn.Parameter(torch.empty(L, D, RANK).normal_())
        self.B = nn.Parameter(torch.zeros(L, RANK, D))
        self.s = nn.Parameter(torch.zeros(L))

    def block(self, i: int, block: nn.Module, x: Tensor) -> Tensor:
        x = x + attention_branch(block, x, lambda t: self.approximate(i, t, block.attn(t)))
        return x + mlp_branch(block, x)

    def approximate(self, i: int, t: Tensor, y: Tensor) -> Tensor:
        """Attention output y (B, N, D) of input t (B, N, D) as layer i's prompts change it."""
        P = self.P[i]
        a = F.relu(F.linear(t, P + P @ self.A[i] @ self.B[i]))  # (B, N, T)
        w = a.detach().amax(-1, keepdim=True)
        return (y + w * (a @ P.to(a.dtype))) * self.s[i].exp()
