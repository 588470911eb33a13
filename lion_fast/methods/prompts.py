"""Prompts in front of the blocks of a ViT: first values, two forms, and the base of such methods."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lion_fast.backbones import Backbone, prefix_block, prefix_kv
from lion_fast.errors import check_choice, check_number, check_whole
from lion_fast.methods.base import MOST
from lion_fast.methods.blocks import BlockMethod
from lion_fast.methods.noise import dropout
from lion_fast.methods.prefix import KV, PrefixCache


class PromptMethod(PrefixCache, BlockMethod):
    """`length` prompts of width D for every block of a ViT; a method draws `prompts` (L, P, D).

    form="exact" computes their keys and values once per step (kept while evaluating without gradients);
    form="naive" carries the prompts through every block as published. One function.

    Args:
        length: prompts per block, P.
        dropout: of prompts, while training; per image in the naive form, one mask for the batch in the
            exact one.
        form: "exact" or "naive".
        pool, head_bias: see `TunedModel`.
    """

    prompts: nn.Parameter

    def __init__(
        self,
        backbone,
        num_classes: int,
        *,
        length: int = 10,
        dropout: float = 0.0,
        form: str = "exact",
        **options,
    ):
        super().__init__(backbone, num_classes, **options)
        check_whole("length", length, most=MOST)
        check_number("dropout", dropout, least=0, below=1)
        check_choice("form", form, ("exact", "naive"))
        self.record(length=length, dropout=dropout, form=form)
        self.length, self.dropout, self.form = length, dropout, form

    def features(self, images: Tensor) -> Tensor:
        x = self.backbone.enter(images)
        if self.form == "exact":
            for block, (k, v) in zip(self.backbone.blocks, self.prefix(), strict=True):
                x = prefix_block(block, x, k, v)
        else:
            x = self._naive(x)
        return self.backbone.pool(self.backbone.norm(x), self.pool)

    def dropped(self, prompts: Tensor, each: bool = False) -> Tensor:
        """Prompts as training drops them; `each`: the rows are those of each image, (B, P, D)."""
        return (dropout if each else F.dropout)(prompts, self.dropout, self.training)

    def _naive(self, x: Tensor) -> Tensor:
        return carry_prompts(self.backbone, x, self._carried)

    def _carried(self, i: int, x: Tensor) -> Tensor:
        """The prompts (B, P, D) that the naive form puts in front of block i with rows x."""
        return self.dropped(self.prompts[i].to(x.dtype).expand(len(x), -1, -1), each=True)

    def _prefix(self) -> KV:
        return prefix_of(self.backbone, self.dropped(self.prompts))

    def _prefix_sources(self) -> tuple[Tensor, ...]:
        return (self.prompts,)


def drawn(bound: float, *shape: int) -> nn.Parameter:
    """A parameter drawn uniformly within +-bound."""
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


def prefix_of(backbone: Backbone, prompts: Tensor) -> KV:
    """Keys and values of prompts (L, P, D) in front of every block of a ViT."""
    return [prefix_kv(block, rows) for block, rows in zip(backbone.blocks, prompts, strict=True)]


def prompt_bound(backbone: Backbone) -> float:
    """v of the uniform draw of prompts on (-v, v): sqrt(6 / (3 h w + D)) for patches of h x w pixels."""
    return math.sqrt(6 / (3 * math.prod(backbone.patch_size) + backbone.width_in))


def carry_prompts(
    backbone: Backbone,
    x: Tensor,
    prompts: Callable[[int, Tensor], Tensor | None],
    run: Callable[[int, nn.Module, Tensor], Tensor] = lambda i, block, x: block(x),
    keep: bool = False,
) -> Tensor:
    """Rows (B, N, D) of a ViT through its blocks with prompts carried along behind the prefix tokens.

    prompts(i, x): those (B, P, D) that take the place of the former ones in front of block i, or None: the
    former ones go on. run(i, block, x) is the block itself. Gives the rows without prompts, or with `keep`
    what the last block made of them too, behind the prefix tokens.
    """
    head, count = backbone.num_prefix_tokens, 0
    for i, block in enumerate(backbone.blocks):
        new = prompts(i, x)
        if new is not None:
            x = torch.cat([x[:, :head], new, x[:, head + count :]], 1)
            count = new.shape[1]
        x = run(i, block, x)
    return x if keep else torch.cat([x[:, :head], x[:, head + count :]], 1)
