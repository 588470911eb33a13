"""Visual prompt tuning (VPT): learnable tokens in front of the patches, in the first block or in every one.

Source: Jia et al., "Visual Prompt Tuning", ECCV 2022, arXiv 2203.12119; written from its mathematics.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lion_fast.backbones import prefix_block, prefix_kv, takes_prefix
from lion_fast.errors import OptionError, check_choice
from lion_fast.methods.base import TunedModel, register


@register("vpt")
class VPT(TunedModel):
    """`length` prompts of width D, in front of block 1 ("shallow") or anew in front of every block ("deep").

    Prompts stand behind the prefix tokens and in front of the patches, carry no position embedding, and are
    left out of the final norm and of pooling. Shallow trains P D numbers, deep L P D.

    Deep prompts have two forms of one function. What a block computes at a prompt's position is thrown away
    by the next block, so a prompt acts only through the keys and values it puts in front of the image's:
    form="exact" computes those (once per step, not per image; kept between calls while evaluating without
    gradients), form="naive" carries the prompts through every block as the paper writes it.

    Dropout of prompts is 0 by default, where both forms agree to rounding; the paper's deep runs use 0.1,
    its shallow ones 0. The naive form drops per image, as published; in the exact form the images of a batch
    share one mask, since they share the keys and values.

    Args:
        depth: "deep" or "shallow".
        length: prompts per layer.
        dropout: of prompts, while training.
        form: "exact" (deep only), "naive", or None: exact where it exists.
        pool, head_bias: see `TunedModel`.

    Initial values are uniform on (-v, v), v = sqrt(6 / (3 h w + D)) for patches of h x w pixels.

    >>> from lion_fast import load_backbone
    >>> vit = load_backbone("vit_tiny_patch16_224", pretrained=False, img_size=32, depth=2)
    >>> VPT(vit, num_classes=10, length=5).num_trainable()
    1920
    """

    families = ("vit",)

    def __init__(
        self,
        backbone,
        num_classes: int,
        *,
        depth: str = "deep",
        length: int = 10,
        dropout: float = 0.0,
        form: str | None = None,
        **options,
    ):
        super().__init__(backbone, num_classes, **options)
        backbone = self.backbone
        check_choice("depth", depth, ("deep", "shallow"))
        if isinstance(length, bool) or not isinstance(length, int) or length < 1:
            raise OptionError(f"length must be a positive integer; got {length!r}")
        if not 0 <= dropout < 1:
            raise OptionError(f"dropout must be in [0, 1); got {dropout!r}")
        known = all(takes_prefix(block) for block in backbone.blocks)
        if form is None:
            form = "exact" if depth == "deep" and known else "naive"
        check_choice("form", form, ("exact", "naive"))
        if form == "exact" and depth == "shallow":
            raise OptionError(
                'form="exact" exists for depth="deep" only: shallow prompts change from block to block '
                'and with the image, so their keys and values do too. Use form="naive"'
            )
        if form == "exact" and not known:
            raise OptionError(
                f'form="exact" knows timm\'s plain blocks; {backbone.name} has '
                f'{type(backbone.blocks[0]).__name__} blocks. Use form="naive"'
            )
        self.record(depth=depth, length=length, dropout=dropout, form=form)
        self.depth, self.length, self.dropout, self.form = depth, length, dropout, form
        rows = len(backbone.blocks) if depth == "deep" else 1
        bound = math.sqrt(6 / (3 * math.prod(backbone.patch_size) + backbone.width_in))
        self.prompts = nn.Parameter(torch.empty(rows, length, backbone.width_in).uniform_(-bound, bound))
        self._cache: tuple[Any, list[tuple[Tensor, Tensor]]] | None = None

    def features(self, images: Tensor) -> Tensor:
        x = self.backbone.enter(images)
        x = self._exact(x) if self.form == "exact" else self._naive(x)
        return self.backbone.pool(self.backbone.norm(x), self.pool)

    def _exact(self, x: Tensor) -> Tensor:
        for block, (k, v) in zip(self.backbone.blocks, self.prefix(), strict=True):
            x = prefix_block(block, x, k, v)
        return x

    def _naive(self, x: Tensor) -> Tensor:
        head, p = self.backbone.num_prefix_tokens, self.length
        x = torch.cat([x[:, :head], self._dropped(self.prompts[0], x), x[:, head:]], 1)
        for i, block in enumerate(self.backbone.blocks):
            if i and self.depth == "deep":
                x = torch.cat([x[:, :head], self._dropped(self.prompts[i], x), x[:, head + p :]], 1)
            x = block(x)
        return torch.cat([x[:, :head], x[:, head + p :]], 1)

    def _dropped(self, prompts: Tensor, x: Tensor) -> Tensor:
        prompts = prompts.to(x.dtype).expand(x.shape[0], -1, -1)
        return F.dropout(prompts, self.dropout, self.training)

    def prefix(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values (h, P, D/h) of every block's prompts; the exact form's whole use of them."""
        if self.training or torch.is_grad_enabled():
            return self._prefix()
        # an in-place update, a cast and an autocast region each make another key
        device = self.prompts.device.type
        cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        key = (self.prompts, self.prompts._version, self.prompts.device, cast)
        if self._cache is None or not _same(self._cache[0], key):
            self._cache = (key, self._prefix())
        return self._cache[1]

    def _prefix(self) -> list[tuple[Tensor, Tensor]]:
        prompts = F.dropout(self.prompts, self.dropout, self.training)
        return [prefix_kv(block, rows) for block, rows in zip(self.backbone.blocks, prompts, strict=True)]

    def clear_cache(self) -> None:
        """Forget kept keys and values; needed by hand only after writing to `prompts.data` in evaluation."""
        self._cache = None

    def train(self, mode: bool = True) -> "VPT":
        self.clear_cache()
        return super().train(mode)

    def _apply(self, fn, recurse: bool = True):
        self.clear_cache()
        return super()._apply(fn, recurse)


def _same(old: tuple, new: tuple) -> bool:
    return old[0] is new[0] and old[1:] == new[1:]
