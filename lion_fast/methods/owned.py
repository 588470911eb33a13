"""A backbone of one's own: shares what stays frozen with the one given, copies what is trained."""

import copy
from collections.abc import Callable

from torch import Tensor, nn

from lion_fast.backbones import Backbone
from lion_fast.errors import AdapterError, OptionError
from lion_fast.methods.base import TunedModel

# modules that only the backbone's own pooling runs, by family
_POOLING = {"vit": ("attn_pool",), "swin": (), "cnn": ("head",)}


class BackboneHook:
    """A forward hook that a method put on its own copy of a backbone; further copies leave it behind."""

    def __call__(self, module: nn.Module, args: tuple, out: Tensor) -> Tensor:
        raise TypeError("a BackboneHook says what it does to its module's output")


def own_copy(backbone: Backbone, trained: Callable[[str], bool] = lambda name: False) -> Backbone:
    """A copy whose frozen tensors share the memory of the given backbone's; `trained` names are its own.

    `trained` gets names as in `backbone.model.named_parameters()`; those parameters ask for gradients. The
    copy keeps the hash of the weights as they were given, so an adapter names the backbone it started from.
    """
    memo: dict[int, object] = {}
    names = frozenset(name for name, _ in backbone.model.named_parameters() if trained(name))
    for name, parameter in backbone.model.named_parameters():
        tuned, data = name in names, parameter.detach()
        memo[id(parameter)] = nn.Parameter(data.clone() if tuned else data, requires_grad=tuned)
    for buffer in backbone.model.buffers():
        memo[id(buffer)] = buffer.detach()
    copied = copy.deepcopy(backbone, memo)
    copied.tuned_by, copied.trained = None, names
    if names:
        copied.name_weights(backbone.weights_sha256)  # of what is given: the copy's weights will move
    for module in copied.modules():
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, BackboneHook):
                del module._forward_hooks[key]
    return copied


def runs(backbone: Backbone, pool: str) -> Callable[[str], bool]:
    """Whether a module or parameter of `backbone.model`, by name, has a part in the features under `pool`."""
    unused = () if pool == "backbone" else _POOLING[backbone.family]
    if unused and hasattr(backbone.model, "conv_stem") and hasattr(backbone.model, "norm_head"):
        unused = (*unused, "conv_head", "norm_head")  # MobileNetV3 has them behind its pooling
    return lambda name: name.split(".")[0] not in unused


def mergeable_copy(model: TunedModel) -> Backbone:
    """A copy of a model's backbone to merge into; `OptionError` where its weights cannot take it up."""
    if model.backbone.precision == "fp8":
        raise OptionError(
            f"method {model.method} does not merge into weights held in 8 bits: rounding would lose most of "
            "it. Load the adapter on the backbone in bf16 or fp32 and merge there"
        )
    return own_copy(model.backbone)


class Merged(TunedModel):
    """A model whose method is folded into its backbone: the bare backbone's cost, nothing left to train."""

    def __init__(self, model: TunedModel, backbone: Backbone):
        backbone.trained, backbone._sha256 = frozenset(), None  # other weights now
        backbone.requires_grad_(False)
        super().__init__(backbone, model.num_classes, pool=model.pool, head_bias=model.head.bias is not None)
        self.method = f"{model.method} (merged)"
        self.classes = model.classes
        self.head = copy.deepcopy(model.head)
        self.requires_grad_(False)
        backbone.weights_source += f", {model.method} merged"
        backbone.request = None
        self.train(model.training)

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """Raises `AdapterError`: what was trained is spread over the backbone's weights."""
        raise AdapterError(
            f"{self.method} has no adapter any more: it lies in the weights of the backbone. Save the model "
            "that was merged and merge again after load_adapter, or keep this one whole by "
            "torch.save(model.state_dict(), file)"
        )
