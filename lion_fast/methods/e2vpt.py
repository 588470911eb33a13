"""E2VPT: deep visual prompts, prompts of keys and values beside them, and pruning of the former.

Source: Han et al., "E2VPT: An Effective and Efficient Approach for Visual Prompt Tuning", ICCV 2023, arXiv
2307.13770; written from its mathematics.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lion_fast.backbones import prefix_block
from lion_fast.errors import (
    AdapterError,
    BackboneError,
    OptionError,
    check_bool,
    check_choice,
    check_number,
    check_whole,
)
from lion_fast.methods.base import MOST, register
from lion_fast.methods.prefix import KV
from lion_fast.methods.prompts import PromptMethod, carry_prompts, prefix_of, prompt_bound

SEGMENTS = 16
LEAST_SEGMENTS = 4


@register("e2vpt")
class E2VPT(PromptMethod):
    """VPT-deep prompts P (P, D) and key-value prompts (h, M, D/h) per block; the visual ones can be pruned.

    The key-value prompts stand in front of keys and values behind their projection, one tensor for both:
    L D (P + M) numbers (share_kv=False: L D (P + 2 M)). They ask no query.

    Pruning. A token mask rho (P) and a segment mask sigma (P, 16), each one for all blocks, multiply the
    visual prompts; dimension j of a prompt lies in segment j mod 16. `importance` gives the gradients of the
    masks, `prune` takes out what has the lowest, `rewind` draws new values for what is left, which the paper
    then trains again from the start. What is pruned is no parameter any more: with t tokens and s segments
    gone L D ((P - t)(16 - s) / 16 + M) numbers are left.

    A pruned token is one of two different functions: removal="masked" keeps it as a zero prompt, as the
    published code does, and the norm's shift still gives it a key and a value that draw attention;
    removal="removed" takes it out. Pruned segments are zeros in both.

    Args:
        length: visual prompts per block, P.
        kv_length: key-value prompts per block, M; 0 for none.
        share_kv: one tensor for keys and values.
        masks: "fixed" at 1 until `prune`, or "learned": 17 P more numbers, which `prune` drops.
        removal: "masked" or "removed".
        pruned: tokens and segments pruned; `prune` sets it, and given at the start it prunes the last ones.
        dropout: of visual prompts; the paper's code has 0.1.
        form, pool, head_bias: see `PromptMethod`.

    Visual prompts start as VPT's; key-value prompts uniform within sqrt(6 / (M D/h)) (Kaiming).

    >>> from lion_fast import load_backbone
    >>> vit = load_backbone("vit_tiny_patch16_224", pretrained=False, img_size=32, depth=2)
    >>> model = E2VPT(vit, num_classes=10, length=10, kv_length=5)
    >>> model.num_trainable()
    5760
    >>> batches = [(torch.randn(4, 3, 32, 32), torch.arange(4))]
    >>> model.prune(0.5, 0.5, model.importance(batches))
    (5, 8)
    >>> model.num_trainable()
    2880
    """

    def __init__(
        self,
        backbone,
        num_classes: int,
        *,
        kv_length: int = 5,
        share_kv: bool = True,
        masks: str = "fixed",
        removal: str = "masked",
        pruned: Sequence[int] = (0, 0),
        **options,
    ):
        super().__init__(backbone, num_classes, **options)
        length = self.length
        check_whole("kv_length", kv_length, 0, MOST)
        check_bool("share_kv", share_kv)
        check_choice("masks", masks, ("fixed", "learned"))
        check_choice("removal", removal, ("masked", "removed"))
        if self.backbone.width_in % SEGMENTS:
            raise BackboneError(
                f"method e2vpt cuts prompts into {SEGMENTS} segments; the width {self.backbone.width_in} of "
                f"{self.backbone.name} is no multiple of it"
            )
        tokens, segments = _check_pruned(pruned, length)
        if masks == "learned" and (tokens or segments):
            raise OptionError('masks="learned" comes before pruning; with pruned prompts use masks="fixed"')
        self.record(kv_length=kv_length, share_kv=share_kv, masks=masks)
        self.record(removal=removal, pruned=(tokens, segments))
        self.kv_length, self.removal = kv_length, removal
        blocks, attn = self.backbone.blocks, self.backbone.blocks[0].attn
        self.kv_prompts: nn.Parameter | None = None
        if kv_length:
            shape = len(blocks), 1 if share_kv else 2, attn.num_heads, kv_length
            self.kv_prompts = nn.Parameter(torch.empty(*shape, attn.proj.in_features // attn.num_heads))
        self.token_mask = nn.Parameter(torch.ones(length)) if masks == "learned" else None
        self.segment_mask = nn.Parameter(torch.ones(length, SEGMENTS)) if masks == "learned" else None
        self._probe: tuple[Tensor, Tensor] | None = None  # the masks whose gradients `importance` takes
        kept = torch.arange(length - tokens)
        self._keep(kept, torch.arange(SEGMENTS - segments).repeat(len(kept), 1))
        self._reset_prompts()

    # what the blocks see

    def _naive(self, x: Tensor) -> Tensor:
        prompts, kv = self.visual_prompts(), self._kv()
        return carry_prompts(
            self.backbone,
            x,
            lambda i, x: self.dropped(prompts[i].to(x.dtype).expand(len(x), -1, -1), each=True),
            lambda i, block, x: prefix_block(block, x, *kv[i]),
        )

    def visual_prompts(self) -> Tensor:
        """The prompts as the blocks see them, zeros where pruned: (L, P, D), pruned tokens left out with
        removal="removed"."""
        rows = self.prompts  # (L, tokens kept, D/16 times the segments kept)
        if self.kept_segments.shape[1] < SEGMENTS:
            rows = rows.unflatten(-1, (-1, self.kept_segments.shape[1]))
            at = self.kept_segments[None, :, None].expand_as(rows)
            whole = rows.new_zeros(*rows.shape[:-1], SEGMENTS)
            rows = whole.scatter(-1, at, rows).flatten(-2)
        masks = self._probe if self.token_mask is None else (self.token_mask, self.segment_mask)
        if masks is not None:
            token, segment = masks
            rows = token[:, None] * segment.repeat(1, rows.shape[-1] // SEGMENTS) * rows
        if self.removal == "masked" and len(self.kept_tokens) < self.length:
            whole = rows.new_zeros(rows.shape[0], self.length, rows.shape[-1])
            rows = whole.index_copy(1, self.kept_tokens, rows)
        return rows

    def _kv(self) -> KV:
        """The key-value prompts (h, M, d) of every block, keys normed where the block norms its keys."""
        if self.kv_prompts is None:
            attn = self.backbone.blocks[0].attn
            none = self.prompts.new_zeros(attn.num_heads, 0, attn.proj.in_features // attn.num_heads)
            return [(none, none)] * len(self.backbone.blocks)
        return [
            (block.attn.k_norm(rows[0]), rows[-1])
            for block, rows in zip(self.backbone.blocks, self.kv_prompts, strict=True)
        ]

    def _prefix(self) -> KV:
        visual = prefix_of(self.backbone, self.dropped(self.visual_prompts()))
        return [
            tuple(torch.cat([a, b.to(a.dtype)], 1) for a, b in zip(first, second, strict=True))
            for first, second in zip(visual, self._kv(), strict=True)
        ]

    def _prefix_sources(self) -> tuple[Tensor, ...]:
        own = (self.prompts, self.kv_prompts, self.token_mask, self.segment_mask)
        return (*(t for t in own if t is not None), self.kept_tokens, self.kept_segments)

    # pruning

    def importance(
        self, batches: Iterable[tuple[Tensor, Tensor]], absolute: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Mean gradients of the cross-entropy to the masks: of tokens (P) and of segments (P, 16).

        The gradient of a batch is taken as it is, signed, as the published code does, or with
        `absolute=True` by its size, as the paper writes it. Parameters and their gradients are left alone.
        """
        if self.options["pruned"] != [0, 0]:
            raise OptionError("importance is taken before pruning; this model is pruned already")
        device, dtype = self.prompts.device, self.prompts.dtype
        shapes = (self.length,), (self.length, SEGMENTS)
        sums, count = [torch.zeros(shape, device=device, dtype=dtype) for shape in shapes], 0
        masks = self.token_mask, self.segment_mask
        if self.token_mask is None:
            masks = tuple(torch.ones(s, device=device, dtype=dtype, requires_grad=True) for s in shapes)
        try:
            if self.token_mask is None:
                self._probe = masks
            for images, labels in batches:
                with torch.enable_grad():
                    loss = F.cross_entropy(self(images.to(device)).float(), labels.to(device).long())
                for total, gradient in zip(sums, torch.autograd.grad(loss, masks), strict=True):
                    total += gradient.abs() if absolute else gradient
                count += 1
        finally:
            self._probe = None
        if not count:
            raise OptionError("importance needs at least one batch of (images, labels)")
        return sums[0] / count, sums[1] / count

    @torch.no_grad()
    def prune(
        self, token_ratio: float, segment_ratio: float, scores: tuple[Tensor, Tensor]
    ) -> tuple[int, int]:
        """Take out the floor(ratio) share of tokens, and of each token's segments, that score lowest.

        scores: what `importance` gave, or any two tensors of these shapes. At least one token and 4 of 16
        segments stay. Returns how many tokens and segments went. Parameters change shape: make the
        optimiser afterwards. The paper tries 10, 20, ..., 90 % of both.
        """
        check_number("token_ratio", token_ratio, least=0, below=1)
        check_number("segment_ratio", segment_ratio, least=0, below=1)
        if self.options["pruned"] != [0, 0]:
            raise OptionError("this model is pruned already; prune a fresh one by both ratios at once")
        token, segment = (torch.as_tensor(score) for score in scores)
        if not (token.isfinite().all() and segment.isfinite().all()):
            raise OptionError("scores hold NaN or Inf; take the importance of a model that is finite")
        if token.shape != (self.length,) or segment.shape != (self.length, SEGMENTS):
            raise OptionError(
                f"scores must be of shapes ({self.length},) and ({self.length}, {SEGMENTS}); "
                f"got {tuple(token.shape)} and {tuple(segment.shape)}"
            )
        tokens = min(math.floor(token_ratio * self.length + 1e-9), self.length - 1)
        segments = min(math.floor(segment_ratio * SEGMENTS + 1e-9), SEGMENTS - LEAST_SEGMENTS)
        # stable sorts: ties go by position, whatever the device
        kept = token.argsort(stable=True)[tokens:].sort().values.to(self.prompts.device)
        order = segment.to(kept.device)[kept].argsort(dim=1, stable=True)
        kept_segments = order[:, segments:].sort(1).values
        rows = self.prompts[:, kept].unflatten(-1, (-1, SEGMENTS))
        rows = rows.gather(-1, kept_segments[None, :, None].expand(*rows.shape[:-1], -1)).flatten(-2)
        self._keep(kept, kept_segments)
        self.prompts = nn.Parameter(rows.contiguous())
        self.token_mask = self.segment_mask = None
        self.record(pruned=(tokens, segments), masks="fixed")
        self.clear_cache()
        return tokens, segments

    def rewind(self) -> None:
        """New first values for prompts, key-value prompts and head; what is pruned stays pruned."""
        self._reset_prompts()
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        if self.head.bias is not None:
            nn.init.zeros_(self.head.bias)
        self.clear_cache()

    def _keep(self, tokens: Tensor, segments: Tensor) -> None:
        self.register_buffer("kept_tokens", tokens)
        self.register_buffer("kept_segments", segments)

    @torch.no_grad()
    def _reset_prompts(self) -> None:
        L, D = len(self.backbone.blocks), self.backbone.width_in
        shape = L, len(self.kept_tokens), D // SEGMENTS * self.kept_segments.shape[1]
        bound = prompt_bound(self.backbone)
        if not hasattr(self, "prompts"):
            self.prompts = nn.Parameter(torch.empty(shape))
        self.prompts.uniform_(-bound, bound)
        for mask in (self.token_mask, self.segment_mask):
            if mask is not None:
                mask.fill_(1)
        if self.kv_prompts is not None:
            bound = math.sqrt(6 / (self.kv_length * self.kv_prompts.shape[-1]))
            self.kv_prompts.uniform_(-bound, bound)

    def _apply(self, fn: Callable, recurse: bool = True):
        # torch refuses a layout of maps (channels_last) for the five dimensions of the key-value prompts
        def flat(t: Tensor) -> Tensor:
            return fn(t.flatten(0, 2)).unflatten(0, t.shape[:3]) if t.ndim == 5 else fn(t)

        return super()._apply(flat, recurse)

    def load_adapter_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """As every method's; indices of kept tokens and segments are checked too."""
        for name, limit in (("kept_tokens", self.length), ("kept_segments", SEGMENTS)):
            index = state.get(name)
            if index is None or index.shape != getattr(self, name).shape:
                continue  # told by the strict check
            increasing = bool((index.diff(dim=-1) > 0).all())
            if index.is_floating_point() or not increasing or index.min() < 0 or index.max() >= limit:
                raise AdapterError(f"{name} of the adapter are no increasing indices below {limit}")
        super().load_adapter_state_dict(state)


def _check_pruned(pruned: object, length: int) -> tuple[int, int]:
    good = isinstance(pruned, Sequence) and len(pruned) == 2
    if good and all(isinstance(n, int) and not isinstance(n, bool) for n in pruned):
        tokens, segments = pruned
        if 0 <= tokens < length and 0 <= segments <= SEGMENTS - LEAST_SEGMENTS:
            return tokens, segments
    raise OptionError(
        f"pruned must be (tokens, segments) with tokens below length={length} and segments at most "
        f"{SEGMENTS - LEAST_SEGMENTS}; got {pruned!r}"
    )
