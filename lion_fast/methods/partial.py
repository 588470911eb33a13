"""Methods that train some of the backbone's own parameters: full, partial, bitfit, lntune.

The backbone they are given stays as it is: they work on a copy that shares the memory of everything they do
not train. Dropout and stochastic depth stay off and batch statistics stay as they were pretrained.

Sources: Zaken et al., "BitFit", ACL 2022, arXiv 2106.10199; partial-k as in Jia et al., "Visual Prompt
Tuning", arXiv 2203.12119; norm tuning in many places, for instance Frankle et al., arXiv 2003.00152.
"""

from collections.abc import Callable

import torch
from torch import nn

from lion_fast.backbones import Backbone
from lion_fast.errors import OptionError, check_bool, check_whole
from lion_fast.methods.base import TunedModel, register
from lion_fast.methods.owned import Merged, own_copy, runs


class TrainsBackbone(TunedModel):
    """Base of the methods whose parameters are the backbone's own; `trained` says which, by name."""

    def __init__(self, backbone, num_classes: int, **options):
        super().__init__(backbone, num_classes, **options)
        chosen, used = self.trained(self.backbone), runs(self.backbone, self.pool)
        self.backbone = own_copy(self.backbone, lambda name: chosen(name) and used(name))
        self.backbone.tuned_by = self.method
        if not self.num_trainable():
            raise OptionError(f"method {self.method} finds nothing to train in {self.backbone.name}")

    def trained(self, backbone: Backbone) -> Callable[[str], bool]:
        raise TypeError(f"{type(self).__name__} must say which parameters it trains")

    @torch.no_grad()
    def merge(self) -> Merged:
        """The tuned weights as a frozen backbone."""
        tuned = {name for name, p in self.backbone.model.named_parameters() if p.requires_grad}
        return Merged(self, own_copy(self.backbone, tuned.__contains__))


@register("full")
class Full(TrainsBackbone):
    """Every parameter of the backbone that has a part in the features, and the head.

    >>> from lion_fast import load_backbone
    >>> vit = load_backbone("vit_tiny_patch16_224", pretrained=False)
    >>> Full(vit, num_classes=10).num_trainable()
    5524416
    """

    summary = "Full fine-tuning: every parameter of the backbone, and the head."

    def trained(self, backbone: Backbone) -> Callable[[str], bool]:
        return lambda name: True


@register("partial")
class Partial(TrainsBackbone):
    """The last blocks, and what follows them up to the head.

    A block is a transformer block of a ViT, Swin or ConvNeXt, a residual block of a ResNet, an inverted
    residual of an EfficientNet or MobileNetV3. What follows is the last norm, and in the last two families
    the last convolution with it; Swin's patch merging between stages stays frozen.

    Args:
        blocks: how many of the last blocks.
        last_norm: also what lies between the last block and the head.
        pool, head_bias: see `TunedModel`.

    >>> from lion_fast import load_backbone
    >>> vit = load_backbone("vit_tiny_patch16_224", pretrained=False)
    >>> Partial(vit, num_classes=10).num_trainable() - 2 * 192
    444864
    """

    summary = "Partial fine-tuning: the last blocks of the backbone, its last norm, and the head."

    def __init__(self, backbone, num_classes: int, *, blocks: int = 1, last_norm: bool = True, **options):
        check_whole("blocks", blocks)
        check_bool("last_norm", last_norm)
        self._wanted = blocks, last_norm
        super().__init__(backbone, num_classes, **options)
        self.record(blocks=blocks, last_norm=last_norm)

    def trained(self, backbone: Backbone) -> Callable[[str], bool]:
        blocks, last_norm = self._wanted
        names = block_names(backbone)
        if blocks > len(names):
            raise OptionError(f"blocks must be at most {len(names)} on {backbone.name}; got {blocks}")
        tops = tuple(f"{name}." for name in names[-blocks:])
        if last_norm:
            tops += ("norm.", "fc_norm.", "head.", "conv_head.", "bn2.", "norm_head.")
            # a ViT has a norm of this name in front of its blocks
            tops += ("norm_pre.",) if backbone.family == "cnn" else ()
        return lambda name: name.startswith(tops)


def block_names(backbone: Backbone) -> list[str]:
    """Names in `backbone.model` of its blocks, from the first to the last."""
    model = backbone.model
    if backbone.family == "vit":
        return [f"blocks.{i}" for i in range(len(model.blocks))]
    if backbone.family == "swin":
        stages = [(f"layers.{i}.blocks", layer.blocks) for i, layer in enumerate(model.layers)]
    elif hasattr(model, "layer1"):
        stages = [(f"layer{i}", getattr(model, f"layer{i}", ())) for i in range(1, 5)]
    elif hasattr(model, "stages"):
        stages = [(f"stages.{i}.blocks", stage.blocks) for i, stage in enumerate(model.stages)]
    else:
        stages = [(f"blocks.{i}", stage) for i, stage in enumerate(model.blocks)]
    return [f"{name}.{j}" for name, stage in stages for j in range(len(stage))]


@register("bitfit")
class BitFit(TrainsBackbone):
    """Every bias of the backbone: of linear maps, convolutions and norms; D (2 + 11 L) numbers in a ViT.

    In a CNN most convolutions have no bias, so there these are chiefly the shifts of its batch norms; in a
    Swin V2 also its separate query and value biases. Position tables that are only called a bias are not.

    >>> from lion_fast import load_backbone
    >>> BitFit(load_backbone("vit_tiny_patch16_224", pretrained=False), num_classes=10).num_trainable()
    25728
    """

    summary = "BitFit: every bias of the backbone, and the head."

    def trained(self, backbone: Backbone) -> Callable[[str], bool]:
        return lambda name: name.endswith(("bias", "_bias"))


@register("lntune")
class NormTune(TrainsBackbone):
    """Scale and shift of every norm of the backbone; D (4 L + 2) numbers in a ViT.

    In a CNN: the affine maps of its batch norms (of the layer norms in a ConvNeXt). Their statistics stay.

    >>> from lion_fast import load_backbone
    >>> NormTune(load_backbone("vit_tiny_patch16_224", pretrained=False), num_classes=10).num_trainable()
    9600
    """

    summary = "Norm tuning: scale and shift of every norm of the backbone, and the head."

    def trained(self, backbone: Backbone) -> Callable[[str], bool]:
        norms = {name for name, module in backbone.model.named_modules() if is_norm(module)}
        return lambda name: name.rpartition(".")[0] in norms


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm with an affine map of its own."""
    return "norm" in type(module).__name__.lower() and any(True for _ in module.parameters(recurse=False))
