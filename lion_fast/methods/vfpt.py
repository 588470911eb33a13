"""VFPT: deep visual prompts, some of them seen through a Fourier transform.

Source: Zeng et al., "Visual Fourier Prompt Tuning", NeurIPS 2024, arXiv 2411.01327; written from its
mathematics.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lion_fast.errors import check_number
from lion_fast.methods.base import register
from lion_fast.methods.prefix import KV
from lion_fast.methods.prompts import PromptMethod, drawn, prefix_of, prompt_bound


@register("vfpt")
class VFPT(PromptMethod):
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
        dropout: of prompts in front of the transform; the paper has 0.1.
        form, pool, head_bias: see `PromptMethod`.

    >>> from lion_fast import load_backbone
    >>> vit = load_backbone("vit_tiny_patch16_224", pretrained=False, img_size=32, depth=2)
    >>> VFPT(vit, num_classes=10, length=10).num_trainable()
    3840
    """

    def __init__(self, backbone, num_classes: int, *, fraction: float = 0.5, **options):
        super().__init__(backbone, num_classes, **options)
        check_number("fraction", fraction, least=0, most=1, note="the share of prompts to transform")
        self.record(fraction=fraction)
        # 0.7 of 10 is 7, whatever the binary fraction says
        self.transformed = math.floor(fraction * self.length + 1e-9)
        shape = len(self.backbone.blocks), self.length, self.backbone.width_in
        self.prompts = drawn(prompt_bound(self.backbone), *shape)

    def _carried(self, i: int, x: Tensor) -> Tensor:
        prompts = self.dropped(self.prompts[i].expand(len(x), -1, -1), each=True)
        return self._seen(fourier_fft, prompts).to(x.dtype)

    def _prefix(self) -> KV:
        return prefix_of(self.backbone, self._seen(fourier_map, self.dropped(self.prompts)))

    def _seen(self, transform: Callable[[Tensor], Tensor], prompts: Tensor) -> Tensor:
        """Prompts (..., P, D), the first m through the transform."""
        m = self.transformed
        return torch.cat([transform(prompts[:, :m]), prompts[:, m:]], 1) if m else prompts


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
