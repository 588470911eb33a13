"""DyT: a dispatcher lets only some tokens through each frozen MLP; an adapter beside it serves them all.

Source: Zhao et al., "Dynamic Tuning Towards Parameter and Inference Efficiency for ViT Adaptation", NeurIPS
2024, arXiv 2403.11808; written from its mathematics (the "MLP dispatch" variant).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lion_fast.backbones.at_work import works_for_first
from lion_fast.backbones.cheaper import mlp_branch
from lion_fast.errors import OptionError, check_choice, check_number
from lion_fast.methods.adapter import bottlenecks
from lion_fast.methods.base import register
from lion_fast.methods.blocks import BlockMethod, attention_branch
from lion_fast.methods.noise import over_step, uniform_like
from lion_fast.methods.prefix import is_recorded

RATE_WEIGHT = 2.0


@register("dyt")
class DyT(BlockMethod):
    """x <- x + Attn(LN1 x);  x <- x + M MLP(LN2 x) + W_up relu(W_down x), M in {0, 1} per token.

    M = 1 where s = sigmoid(w_g x + b_g) exceeds `threshold`, on the un-normed x; prefix tokens always pass.
    While training s is sigmoid((logit + g1 - g2) / temperature) with Gumbel noise and M passes its gradient
    straight through to s. L (2 D r + r + 2 D + 1) numbers.

    Training adds to the cross-entropy of the dispatched model (`loss_terms`): "complete", the cross-entropy
    with every token let through; "distillation", KL(complete || dispatched), the complete one held fixed;
    "rate", 2 (mean of M - rate)^2 over images, blocks and patch tokens at once. Two forwards per step.

    In evaluation form="exact" runs the MLP on the tokens that pass and no others; form="naive" runs it on
    all and masks. The outputs agree to rounding. While training both mask: the gradient of M needs the MLP
    at dropped tokens too.

    The dispatcher starts from a normal of deviation 0.02, truncated, with zero bias, so about half of the
    tokens are dropped at first; a new model is not its backbone, but with a negative threshold it is.

    Args:
        rank: width r of the adapters.
        rate: the share of patch tokens to let through, r in the paper.
        temperature: of the relaxed sample.
        threshold: of s; below 0 every token passes.
        scale, dropout: of the adapters; the paper's code has dropout 0.1 while training.
        form: "exact" or "naive".
        pool, head_bias: see `TunedModel`.

    >>> from lion_fast import load_backbone
    >>> vit = load_backbone("vit_tiny_patch16_224", pretrained=False, img_size=32, depth=2)
    >>> DyT(vit, num_classes=10, rank=8).num_trainable()
    6930
    """

    def __init__(
        self,
        backbone,
        num_classes: int,
        *,
        rank: int = 8,
        rate: float = 0.5,
        temperature: float = 5.0,
        threshold: float = 0.5,
        scale: float = 1.0,
        dropout: float = 0.0,
        form: str = "exact",
        **options,
    ):
        super().__init__(backbone, num_classes, **options)
        check_choice("form", form, ("exact", "naive"))
        check_number("rate", rate, above=0, most=1, note="the share of tokens to let through")
        check_number("temperature", temperature, above=0, most=1e6)
        check_number("scale", scale, least=-1e6, most=1e6)
        check_number("threshold", threshold, below=1, note="and below 0 every token passes")
        self.record(rank=rank, rate=rate, temperature=temperature, threshold=threshold)
        self.record(scale=scale, dropout=dropout, form=form)
        self.rate, self.temperature, self.threshold = rate, temperature, threshold
        self.scale, self.form = scale, form
        self.adapters = bottlenecks(self.backbone, rank, dropout)
        self.dispatchers = nn.ModuleList(nn.Linear(self.backbone.width_in, 1) for _ in self.backbone.blocks)
        for dispatcher in self.dispatchers:
            nn.init.trunc_normal_(dispatcher.weight, std=0.02)
            nn.init.zeros_(dispatcher.bias)
        self._complete = False
        self._masks: list[Tensor] = []  # M of the patch tokens (B, N) in this forward, block by block
        self._last: tuple[Tensor, int, Tensor, Tensor] | None = None
        self._passed: Tensor | None = None

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        drawn, self._masks = self._masks, []
        if drawn:
            masks = torch.stack(drawn)  # (L, B, N)
            self._passed = masks.detach().mean()
            # for loss_terms, which comes next on the same images
            keeps = self.training and torch.is_grad_enabled()
            self._last = (images, _writes(images), logits, masks) if keeps else None
        return logits

    def features(self, images: Tensor) -> Tensor:
        self._masks = []
        return super().features(images)

    def block(self, i: int, block: nn.Module, x: Tensor) -> Tensor:
        x = x + attention_branch(block, x)
        beside = self.scale * self.adapters[i](x)
        if self._complete:
            return x + mlp_branch(block, x) + beside
        mask = self.mask(self.dispatchers[i], x)
        self._masks.append(mask[:, self.backbone.num_prefix_tokens :])
        if self.form == "exact" and not self.training:
            return _gathered(block, x, mask > 0) + beside
        return x + mask.unsqueeze(-1).to(x.dtype) * mlp_branch(block, x) + beside

    def mask(self, dispatcher: nn.Linear, x: Tensor) -> Tensor:
        """M (B, N) of rows (B, N, D), 1 at prefix tokens."""
        prefix = self.backbone.num_prefix_tokens
        logit = dispatcher(x[:, prefix:]).squeeze(-1)
        logit = _wide(logit)
        if self.training:
            # logistic noise: the difference of two Gumbel variables
            noise = uniform_like(logit).logit(eps=1e-7)
            soft = ((logit + noise) / self.temperature).sigmoid()
            hard = (soft > self.threshold).to(soft.dtype)
            mask = hard + soft - soft.detach()
        else:
            mask = (logit.sigmoid() > self.threshold).to(logit.dtype)
        return F.pad(mask, (prefix, 0), value=1.0)

    def loss_terms(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The terms "complete", "distillation" and "rate"; after `forward` on the same images its logits are
        used, else the dispatched model is run again."""
        if self._last is None or self._last[0] is not images or self._last[1] != _writes(images):
            with torch.enable_grad():
                self(images)
        if self._last is None:
            raise OptionError("loss_terms belong to training; call train() first")
        (*_, logits, masks), self._last = self._last, None
        complete = _wide(self.complete(images))
        return {
            "complete": F.cross_entropy(complete, labels if labels.is_floating_point() else labels.long()),
            "distillation": F.kl_div(
                _wide(logits).log_softmax(-1),
                complete.detach().log_softmax(-1),
                reduction="batchmean",
                log_target=True,
            ),
            "rate": RATE_WEIGHT * (over_step(masks.mean()) - self.rate).square(),
        }

    def step_mean(self, images: Tensor) -> Tensor | None:
        """The share of patch tokens let through, which "rate" needs of all images of a step."""
        with torch.no_grad():
            self(images)
        return self._passed

    @works_for_first
    def complete(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) with every token let through every MLP."""
        self._complete = True
        try:
            return super().forward(images)
        finally:
            self._complete = False

    def diagnostics(self) -> dict[str, float]:
        """The share of patch tokens let through in the last forward, over all blocks."""
        return {} if self._passed is None else {"passed": float(self._passed)}

    def __getstate__(self) -> dict[str, Any]:
        # a graph can be neither copied nor pickled
        return {**self.__dict__, "_last": None, "_masks": []}


def _writes(images: Tensor) -> int:
    """How often images were written into, as far as that is counted."""
    return 0 if is_recorded() or images.is_inference() else images._version


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _gathered(block: nn.Module, x: Tensor, keep: Tensor) -> Tensor:
    """x + M MLP(x) with the MLP run on the kept rows only."""
    rows = x.flatten(0, 1)
    at = keep.flatten().nonzero().squeeze(-1)
    added = mlp_branch(block, rows[at])
    return rows.index_add(0, at, added.to(rows.dtype)).view_as(x)
