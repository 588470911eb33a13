"""Visual prompt tuning (VPT): learnable tokens in front of the patches, in the first block or in every one.

Source: Jia et al., "Visual Prompt Tuning", ECCV 2022, arXiv 2203.12119; written from its mathematics.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lion_fast.backbones import prefix_block, takes_prefix
from lion_fast.errors import BackboneError, OptionError, check_bool, check_choice, check_number, check_whole
from lion_fast.methods import vpt_swin
from lion_fast.methods.base import MOST, TunedModel, register
from lion_fast.methods.noise import dropout
from lion_fast.methods.prefix import KV, PrefixCache
from lion_fast.methods.prompts import carry_prompts, drawn, prefix_of, prompt_bound
from lion_fast.methods.reading import GRID, WIDEST, ReadOut, features_and_cells, map_place
from lion_fast.methods.vpt_border import PixelBorder
from lion_fast.options import sides


@register("vpt")
class VPT(PrefixCache, TunedModel):
    """`length` prompts of width D, in front of block 1 ("shallow") or anew in front of every block ("deep").

    Prompts stand behind the prefix tokens and in front of the patches and carry no position embedding. They
    are left out of pooling; `prompt_pooling=True` lets what the last block makes of them into a mean, as the
    published code does on MAE and Swin. Shallow trains P D numbers, deep L P D.

    Deep prompts have two forms of one function. What a block computes at a prompt's position is thrown away
    by the next block, so a prompt acts only through the keys and values it puts in front of the image's:
    form="exact" computes those (once per step, not per image; kept between calls while evaluating without
    gradients), form="naive" carries the prompts through every block as the paper writes it.

    On a Swin the prompts stand in front of the rows of every window and are dropped where patches are merged
    (`vpt_swin`): deep trains P times the sum of the blocks' widths; shallow prompts live through the first
    stage. On a CNN `length` is the width p of a learnable border of pixels around the image (`PixelBorder`),
    12 p (S + p) numbers; there are no deep prompts and no dropout.

    Dropout of prompts is 0 by default, where both forms agree to rounding; the paper's deep runs use 0.1,
    its shallow ones 0. The naive form drops per image, as published; in the exact form the images of a batch
    share one mask, since they share the keys and values.

    With `state_dim`, deep prompts on a ViT get the reading of LION's default variant: states of a map from
    inside, of blocks that the prompts changed. That is not VPT as published; it is there to tell what is
    gained by reading from what is gained by tuning.

    Args:
        depth: "deep", "shallow", or None: deep where it exists.
        length: prompts per layer; pixels of border on a CNN.
        dropout: of prompts, while training.
        form: "exact" (deep only), "naive", or None: exact where it exists.
        prompt_pooling: whether prompts enter a mean over tokens (naive form; on a Swin deep prompts).
        state_dim: width R of an output end as LION's with its defaults (`ReadOut`); None: none, as published.
        pool, head_bias: see `TunedModel`.

    Initial values are uniform on (-v, v), v = sqrt(6 / (3 h w + D)) for patches of h x w pixels and D the
    width of the first block.

    >>> from lion_fast import load_backbone
    >>> vit = load_backbone("vit_tiny_patch16_224", pretrained=False, img_size=32, depth=2)
    >>> VPT(vit, num_classes=10, length=5).num_trainable()
    1920
    """

    def __init__(
        self,
        backbone,
        num_classes: int,
        *,
        depth: str | None = None,
        length: int = 10,
        dropout: float = 0.0,
        form: str | None = None,
        prompt_pooling: bool = False,
        state_dim: int | None = None,
        **options,
    ):
        super().__init__(backbone, num_classes, **options)
        backbone = self.backbone
        cnn = backbone.family == "cnn"
        if depth is None:
            depth = "shallow" if cnn else "deep"
        check_choice("depth", depth, ("deep", "shallow"))
        check_whole("length", length, most=max(sides(backbone.img_size)) if cnn else MOST)
        check_number("dropout", dropout, least=0, below=1)
        known = backbone.family == "swin" or (
            not cnn and all(takes_prefix(block) for block in backbone.blocks)
        )
        check_bool("prompt_pooling", prompt_pooling)
        if form is None:
            form = "exact" if depth == "deep" and known and not prompt_pooling else "naive"
        check_choice("form", form, ("exact", "naive"))
        if cnn and (depth == "deep" or form == "exact" or dropout):
            raise OptionError(
                'vpt on a cnn is a border of pixels: depth="shallow", form="naive", dropout=0; '
                f"got depth={depth!r}, form={form!r}, dropout={dropout!r}"
            )
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
        carried = backbone.family == "vit" or (backbone.family == "swin" and depth == "deep")
        if prompt_pooling and not (carried and form == "naive" and backbone.takes_mean(self.pool)):
            raise OptionError(
                "prompt_pooling puts prompts into a mean over tokens: it needs a pool of patches' mean, the "
                f'naive form, and on a Swin depth="deep"; got pool={self.pool!r}, form={form!r}, '
                f"depth={depth!r} on {backbone.name}"
            )
        if state_dim is not None and (backbone.family != "vit" or form != "exact"):
            raise OptionError(
                "state_dim goes with deep prompts in their exact form on a ViT; "
                f"got form={form!r} on {backbone.name}, a {backbone.family} backbone"
            )
        self.record(depth=depth, length=length, dropout=dropout, form=form, state_dim=state_dim)
        if prompt_pooling:  # adapters without it are read by versions that do not know it
            self.record(prompt_pooling=True)
        self.prompt_pooling = prompt_pooling
        self.depth, self.length, self.dropout, self.form = depth, length, dropout, form
        if cnn:
            if len(backbone.mean) != backbone.channels:
                raise BackboneError(
                    f"{backbone.name} takes {backbone.channels} channels; its mean is {backbone.mean}"
                )
            self.border = PixelBorder(length, sides(backbone.img_size), backbone.mean, backbone.std)
            return
        self.output_end: ReadOut | None = None
        if state_dim is not None:
            check_whole("state_dim", state_dim, most=WIDEST)
            width = backbone.pooled_width(self.pool)
            self.output_end = ReadOut(width, GRID * GRID, backbone.width_out, state_dim)
            self.head = self.new_head(self.output_end.out_features)
        bound = prompt_bound(backbone)

        if backbone.family == "vit":
            self.prompts = drawn(
                bound, len(backbone.blocks) if depth == "deep" else 1, length, backbone.width_in
            )
        else:  # one tensor per stage, of its width
            stages = backbone.model.layers
            widths = [stage.blocks[0].norm1.weight.shape[0] for stage in stages]
            if depth == "deep":
                rows = [
                    drawn(bound, len(s.blocks), length, width)
                    for s, width in zip(stages, widths, strict=True)
                ]
            else:
                rows = [drawn(bound, 1, length, widths[0])]
            self.prompts = nn.ParameterList(rows)

    def features(self, images: Tensor) -> Tensor:
        if self.backbone.family == "cnn":
            return super().features(self.border(images))
        x = self.backbone.enter(images)
        if self.backbone.family == "swin":
            x = self._swin_exact(x) if self.form == "exact" else self._swin_naive(x)
            return self.backbone.pool(self.backbone.model.norm(x), self.pool)
        if self.form == "naive":
            return self.backbone.pool(self.backbone.norm(self._naive(x)), self.pool)
        x, inside = self._exact(x)
        features = self.backbone.pool(self.backbone.norm(x), self.pool)
        if self.output_end is None:
            return features
        return self.output_end(features_and_cells(features, self.backbone.map_of(inside), GRID))

    def load_adapter_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """As every method's; a border that was saved normalised becomes pixels."""
        border = getattr(self, "border", None)
        super().load_adapter_state_dict(state if border is None else border.renewed(state, "border."))

    def _exact(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Rows behind the last block, and behind the one that an output end reads."""
        inside, at = x, map_place(self.backbone)
        for i, (block, (k, v)) in enumerate(zip(self.backbone.blocks, self.prefix(), strict=True)):
            x = prefix_block(block, x, k, v)
            inside = x if i == at else inside
        return x, inside

    def _naive(self, x: Tensor) -> Tensor:
        return carry_prompts(
            self.backbone,
            x,
            lambda i, x: self._dropped(self.prompts[i], x) if i == 0 or self.depth == "deep" else None,
            keep=self.prompt_pooling,
        )

    def _swin_exact(self, x: Tensor) -> Tensor:
        prefix = iter(self.prefix())
        for stage in self.backbone.model.layers:
            x = stage.downsample(x)
            for block in stage.blocks:
                x = vpt_swin.prefix_block(block, x, *next(prefix))
        return x

    def _swin_naive(self, x: Tensor) -> Tensor:
        for s, stage in enumerate(self.backbone.model.layers):
            if s == len(self.prompts):  # shallow prompts went with the first merging
                return self.backbone.model.layers[s:](x)
            x = stage.downsample(x)
            for i, block in enumerate(stage.blocks):
                if i == 0 or self.depth == "deep":
                    prompts = self._dropped(self.prompts[s][i], x)
                x, prompts = vpt_swin.carry_block(block, x, prompts)
        if self.prompt_pooling:  # a map of one row, for the mean alone
            x = torch.cat([prompts, x.flatten(1, 2)], 1).unsqueeze(1)
        return x

    def _dropped(self, prompts: Tensor, x: Tensor) -> Tensor:
        prompts = prompts.to(x.dtype).expand(x.shape[0], -1, -1)
        return dropout(prompts, self.dropout, self.training)

    def _prefix(self) -> KV:
        if self.backbone.family == "swin":
            blocks = [block for stage in self.backbone.model.layers for block in stage.blocks]
            rows = [row for stage in self.prompts for row in stage]
            return [
                vpt_swin.prompt_kv(block, F.dropout(row, self.dropout, self.training))
                for block, row in zip(blocks, rows, strict=True)
            ]
        prompts = F.dropout(self.prompts, self.dropout, self.training)
        return prefix_of(self.backbone, prompts)

    def _prefix_sources(self) -> tuple[Tensor, ...]:
        return tuple(self.prompts) if self.backbone.family == "swin" else (self.prompts,)
