"""CVPT: tokens read prompts by cross-attention, with the frozen self-attention's own projections.

Source: Huang et al., "CVPT: Cross Visual Prompt Tuning", ICCV 2025, arXiv 2408.14961; written from its
mathematics (insertion between attention and MLP).
"""

import copy
import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lion_fast.backbones.at_work import works_for_first
from lion_fast.backbones.cheaper import mlp_branch
from lion_fast.equilibrium.masked import Seen
from lion_fast.methods.base import register
from lion_fast.methods.blocks import after_attention, attend, attention_branch, heads
from lion_fast.methods.prefix import KV, is_recorded
from lion_fast.methods.prompts import PromptMethod, drawn


@register("cvpt")
class CVPT(PromptMethod):
    """x <- x + Attn(LN1 x);  x <- x + CA(x, P);  x <- x + MLP(LN2 x).

    CA: queries from the raw rows x and keys and values from the raw prompts P (length, D), none of them
    normed, by the block's own frozen query, key, value and output projections (with its query and key norms,
    and what it does behind its attention: a LayerScale, where it has them). L P D numbers.

    form="exact" uses the self-attention's projections in place and computes keys and values once per step
    (kept between calls while evaluating without gradients); form="naive" holds copies of the projections
    and projects the prompts of every image anew, as the published code does. One function.

    Not the identity at first: even P = 0 adds W_o b_v + b_o to every token. It costs L 2 N D^2 more
    multiplications per image however few prompts there are.

    Args:
        dropout: of prompts; the paper's code has 0.1.
        length, form, pool, head_bias: see `PromptMethod`.

    Prompts are drawn as Xavier draws the (L, P, D) tensor: uniform within sqrt(6 / (D (P + L))).

    >>> from lion_fast import load_backbone
    >>> vit = load_backbone("vit_tiny_patch16_224", pretrained=False, img_size=32, depth=2)
    >>> CVPT(vit, num_classes=10, length=10).num_trainable()
    3840
    """

    def __init__(self, backbone, num_classes: int, **options):
        super().__init__(backbone, num_classes, **options)
        shape = len(self.backbone.blocks), self.length, self.backbone.width_in
        self.prompts = drawn(math.sqrt(6 / (shape[2] * (shape[1] + shape[0]))), *shape)
        self.copies: nn.ModuleList | None = None
        self._copied: Seen | None = None
        if self.form == "naive":
            self._follow_backbone()

    def _follow_backbone(self) -> None:
        """Copies of the projections as they are now."""
        frozen = [p for block in self.backbone.blocks for p in block.attn.parameters()]
        if self._copied is None or not self._copied.same(frozen):
            self.copies = nn.ModuleList(copy.deepcopy(block.attn) for block in self.backbone.blocks)
            self._copied = Seen(frozen)

    def features(self, images: Tensor) -> Tensor:
        x = self.backbone.enter(images)
        if self.form == "naive" and not is_recorded():
            self._follow_backbone()
        kv = self.prefix() if self.copies is None else None
        for i, block in enumerate(self.backbone.blocks):
            x = x + attention_branch(block, x)
            if kv is not None:
                attn, (k, v) = block.attn, (part.expand(len(x), -1, -1, -1) for part in kv[i])
            else:
                attn = self.copies[i]
                k, v = project(attn, self._carried(i, x))
            x = x + after_attention(block, cross_attention(attn, x, k, v))
            x = x + mlp_branch(block, x)
        return self.backbone.pool(self.backbone.norm(x), self.pool)

    def _prefix(self) -> KV:
        prompts = self.dropped(self.prompts)
        return [project(block.attn, rows) for block, rows in zip(self.backbone.blocks, prompts, strict=True)]

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """As every method's; the naive form's copies of frozen projections are left out."""
        return {k: v for k, v in super().adapter_state_dict().items() if not k.startswith("copies.")}

    def train(self, mode: bool = True) -> "CVPT":
        super().train(mode)
        if self.copies is not None:
            self.copies.eval()
        return self

    def requires_grad_(self, requires_grad: bool = True) -> "CVPT":
        super().requires_grad_(requires_grad)
        if self.copies is not None:
            self.copies.requires_grad_(False)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_copied": None}


@works_for_first
def project(attn: nn.Module, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (..., h, P, d) of raw rows (..., P, D) by a frozen attention's projections."""
    inner = attn.proj.in_features
    bias = None if attn.qkv.bias is None else attn.qkv.bias[inner:]
    k, v = (heads(attn, part) for part in F.linear(rows, attn.qkv.weight[inner:], bias).chunk(2, -1))
    return attn.k_norm(k), v


@works_for_first
def cross_attention(attn: nn.Module, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Rows (B, N, D) reading keys and values (B, h, P, d) by a frozen attention's projections."""
    inner = attn.proj.in_features
    bias = None if attn.qkv.bias is None else attn.qkv.bias[:inner]
    q = attn.q_norm(heads(attn, F.linear(x, attn.qkv.weight[:inner], bias)))
    return attend(attn, x, q, k.to(q.dtype), v.to(q.dtype))
