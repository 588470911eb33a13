"""VFPT: deep visual prompts, some of them seen through a Fourier transform.

Source: Zeng et al., "Visual Fourier Prompt Tuning", NeurIPS 2024, arXiv 2411.01327; written from its
mathematics.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lion_fast.backbones import prefix_block, prefix_kv
from lion_fast.errors import check_choice, check_number, check_whole
from lion_fast.methods.base import TunedModel, register
from lion_fast.methods.blocks import check_blocks
from lion_fast.methods.prefix import KV, PrefixCache
from lion_fast.methods.vpt import carry_prompts, prompt_bound


@register("vfpt")
class VFPT(PrefixCache, TunedModel):
    """VPT-deep whose first m = floor(fraction P) prompts of every block are F(P_f) = Re FFT(FFT(P_f)).

    The transform runs over the hidden dimension, then over the m prompts, without normalisation, and has no
    inverse; images take no part in it and no parameter is added: L P D numbers. Only the norm of a prompt
    enters a block, so the transform's gain of about sqrt(m D / 2) has no effect.

    form="naive" transforms by `torch.fft` and carries the prompts through every block, as published;
    form="exact" uses that the transform is the real linear map C_m X C_D - S_m X S_D of cosines and sines,
    and that prompts act through their keys and values alone, computed once per step and, while evaluating
    without gradients, once.

    Args:
        length: prompts per block.
        fraction: the share alpha of prompts to transform, in [0, 1]; 0 is VPT-deep.
        dropout: of prompts in front of the transform, while training; per image in the naive form, one mask
            for the batch in the exact one. The paper has 0.1.
        form: "exact" or "naive".
        pool, head_bias: see `TunedModel`.

    >>> from lion_fast import load_backbone
    >>> vit = load_backbone("vit_tiny_patch16_224", pretrained=False, img_size=32, depth=2)
    >>> VFPT(vit, num_classes=10, length=10).num_trainable()
    3840
    """

    families = ("vit",)

    def __init__(
        self,
        backbone,
        num_classes: int,
        *,
        length: int = 10,
        fraction: float = 0.5,
        dropout: float = 0.0,
        form: str = "exact",
        **options,
    ):
        super().__init__(backbone, num_classes, **options)
        check_blocks(self.method, self.backbone)
        check_whole("length", length)
        check_number("dropout", dropout, least=0, below=1)
        check_choice("form", form, ("exact", "naive"))
        check_number("fraction", fraction, least=0, most=1, note="the share of prompts to transform")
        self.record(length=length, fraction=fraction, dropout=dropout, form=form)
        self.length, self.dropout, self.form = length, dropout, form
        # 0.7 of 10 is 7, whatever the binary fraction says
        self.transformed = math.floor(fraction * length + 1e-9)
        bound = prompt_bound(self.backbone)
        shape = len(self.backbone.blocks), length, self.backbone.width_in
        self.prompts = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))

    def features(self, images: Tensor) -> Tensor:
        x = self.backbone.enter(images)
        if self.form == "exact":
            for block, (k, v) in zip(self.backbone.blocks, self.prefix(), strict=True):
                x = prefix_block(block, x, k, v)
        else:
            x = carry_prompts(self.backbone, x, self._naive_prompts)
        return self.backbone.pool(self.backbone.norm(x), self.pool)

    def _naive_prompts(self, i: int, x: Tensor) -> Tensor:
        prompts = self.prompts[i].expand(len(x), -1, -1)
        prompts = F.dropout(prompts, self.dropout, self.training)
        if m := self.transformed:
            prompts = torch.cat([fourier_fft(prompts[:, :m]), prompts[:, m:]], 1)
        return prompts.to(x.dtype)

    def _prefix(self) -> KV:
        prompts = F.dropout(self.prompts, self.dropout, self.training)
        if m := self.transformed:
            prompts = torch.cat([fourier_map(prompts[:, :m]), prompts[:, m:]], 1)
        return [prefix_kv(block, rows) for block, rows in zip(self.backbone.blocks, prompts, strict=True)]

    def _prefix_sources(self) -> tuple[Tensor, ...]:
        return (self.prompts,)


def fourier_fft(x: Tensor) -> Tensor:
    """Re FFT over dimension -2 of the FFT over dimension -1, in float32 or float64."""
    x = x if x.dtype == torch.float64 else x.float()
    return torch.fft.fft(torch.fft.fft(x, dim=-1), dim=-2).real


def fourier_map(x: Tensor) -> Tensor:
    """The same as real products: C_m x C_D - S_m x S_D with cosines and sines of 2 pi j k / n.

    >>> x = torch.randn(2, 3, 8, dtype=torch.float64)
    >>> torch.allclose(fourier_map(x), fourier_fft(x))
    True
    """
    x = x if x.dtype == torch.float64 else x.float()
    with torch.autocast(x.device.type, enabled=False):
        (cos_m, sin_m), (cos_d, sin_d) = (_waves(n, x) for n in x.shape[-2:])
        return cos_m @ x @ cos_d - sin_m @ x @ sin_d


def _waves(n: int, like: Tensor) -> tuple[Tensor, Tensor]:
    steps = torch.arange(n, device=like.device)
    # the product modulo n before the angle: large angles would cost digits
    angle = (steps[:, None] * steps % n).to(torch.float64) * (2 * math.pi / n)
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)
