"""SSF: scale and shift the features behind every operation of a frozen backbone.

Source: Lian et al., "Scaling and Shifting Your Features", NeurIPS 2022, arXiv 2210.08823; written from its
mathematics, which the paper folds into the weights for inference and its published code does not.
"""

import torch
from timm.layers import LayerNorm2d
from timm.models.swin_transformer_v2 import WindowAttention as WindowAttentionV2
from torch import Tensor, nn

from lion_fast.backbones.at_work import works_for_first
from lion_fast.backbones.fp8 import Fp8Linear
from lion_fast.errors import BackboneError
from lion_fast.methods.base import TunedModel, register
from lion_fast.methods.blocks import check_blocks
from lion_fast.methods.owned import BackboneHook, Merged, mergeable_copy, own_copy, runs
from lion_fast.methods.partial import is_norm

STD = 0.02


class ScaleShift(nn.Module):
    """gamma x + beta per channel, channels at dimension `axis`; gamma and beta are drawn near 1 and 0."""

    def __init__(self, channels: int, axis: int, shift: bool = True):
        super().__init__()
        self.axis = axis
        self.scale = nn.Parameter(torch.empty(channels))
        self.shift = nn.Parameter(torch.empty(channels)) if shift else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.scale, 1.0, STD)
        if self.shift is not None:
            nn.init.normal_(self.shift, 0.0, STD)

    def forward(self, x: Tensor) -> Tensor:
        shape = [-1] + [1] * (x.ndim - 1 - self.axis % x.ndim)
        y = x * self.scale.view(shape)
        # in half precision gamma keeps its own: near 1 a bfloat16 moves in steps of 0.8 %
        return (y if self.shift is None else y + self.shift.view(shape)).to(x.dtype)


class _After(BackboneHook):
    def __init__(self, change: ScaleShift):
        self.change = change

    def __call__(self, module, args, out):
        return self.change(out)


class _AfterV2(BackboneHook):
    """Swin V2 adds the bias of its query, key and value projection outside of it: scaled with the rest."""

    def __init__(self, change: ScaleShift, attn: nn.Module):
        self.change, self.attn = change, attn

    def __call__(self, module, args, out):
        bias = torch.cat([self.attn.q_bias, self.attn.k_bias, self.attn.v_bias])
        return self.change(out) + _change_of(self.change, bias).to(out.dtype)


@works_for_first
def _change_of(change: ScaleShift, bias: Tensor) -> Tensor:
    return (change.scale - 1) * bias


@register("ssf")
class SSF(TunedModel):
    """y = gamma x + beta, per channel, behind every convolution, linear map and norm of the backbone.

    In a ViT: patch embedding and, per block, norm1, qkv, the attention's projection, norm2, fc1 (in front of
    the activation), fc2; the last norm; query and key norms where there are any: 2 D (2 + 11 L) numbers in
    a plain one. In a Swin also patch merging, in a CNN every convolution and norm. Norms that cannot have a
    shift (RMS norms) get the scale alone. An attention that pools (SigLIP) and the
    maps that make Swin V2's position biases stay as they are.

    gamma is drawn from a normal of mean 1, beta of mean 0, both of deviation 0.02: a new model is near its
    backbone. `merge()` folds all of it into the weights: y = W x + b becomes (gamma W) x + (gamma b + beta).

    While unmerged the maps are forward hooks on a copy of the backbone's modules that shares all of its
    tensors; the backbone given is not touched.

    >>> from lion_fast import load_backbone
    >>> SSF(load_backbone("vit_tiny_patch16_224", pretrained=False), num_classes=10).num_trainable()
    51456
    """

    def __init__(self, backbone, num_classes: int, **options):
        super().__init__(backbone, num_classes, **options)
        if self.backbone.family == "vit":
            check_blocks(self.method, self.backbone)
        self.backbone = own_copy(self.backbone)
        self.backbone.tuned_by = self.method
        used = runs(self.backbone, self.pool)
        self.changes = nn.ModuleDict()
        model = self.backbone.model
        for name, module in model.named_modules():
            if used(name) and is_feature(name) and is_operation(module):
                self.changes[name.replace(".", "-")] = change = change_for(module)
                if _is_v2_qkv(model, name):
                    attn = model.get_submodule(name.rpartition(".")[0])
                    attn.qkv_bias_separate = True  # else its weight is used without calling it
                    if attn.q_bias is not None:
                        module.register_forward_hook(_AfterV2(change, attn))
                        continue
                # a norm with an activation inside is changed between the two
                place = module.drop if hasattr(module, "act") and hasattr(module, "drop") else module
                place.register_forward_hook(_After(change))

    @torch.no_grad()
    def merge(self) -> Merged:
        """The same function with every gamma and beta in the weights of a backbone of its own."""
        backbone = mergeable_copy(self)
        model = backbone.model
        for key, change in self.changes.items():
            name = key.replace("-", ".")
            module = model.get_submodule(name)
            if _is_v2_qkv(model, name):
                _merge_v2(model.get_submodule(name.rpartition(".")[0]), change)
            else:
                _merge(module, change)
        return Merged(self, backbone)


def is_feature(name: str) -> bool:
    """Not so: an attention that pools, and the maps that make Swin V2's position biases."""
    return not name.startswith("attn_pool") and ".cpb_mlp." not in name


def is_operation(module: nn.Module) -> bool:
    """Whether SSF changes what this module gives."""
    if isinstance(module, nn.Conv2d) and "Std" in type(module).__name__:
        raise BackboneError(f"SSF does not know {type(module).__name__}, which standardises its weights")
    return isinstance(module, (nn.Linear, Fp8Linear, nn.Conv2d)) or is_norm(module)


def change_for(module: nn.Module) -> ScaleShift:
    """A new map for what a module gives."""
    channels = (module.bias if module.weight is None else module.weight).shape[0]
    maps = isinstance(module, (nn.Conv2d, nn.modules.batchnorm._BatchNorm, nn.GroupNorm, LayerNorm2d))
    # an RMS norm has nowhere to put a shift
    shift = isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm))
    return ScaleShift(channels, 1 if maps else -1, shift or not is_norm(module))


def _is_v2_qkv(model: nn.Module, name: str) -> bool:
    parent, _, last = name.rpartition(".")
    return last == "qkv" and isinstance(model.get_submodule(parent), WindowAttentionV2)


def _merge(module: nn.Module, change: ScaleShift) -> None:
    gamma, beta = change.scale, change.shift
    weight = module.weight
    module.weight = _frozen(gamma.view([-1] + [1] * (weight.ndim - 1)) * weight, weight)
    if beta is not None:
        bias = getattr(module, "bias", None)
        module.bias = _frozen(beta if bias is None else gamma * bias + beta, weight)


def _merge_v2(attn: nn.Module, change: ScaleShift) -> None:
    """The shift of the keys has no parameter to go to; it becomes a persistent part of the state."""
    gamma, beta, weight = change.scale, change.shift, attn.qkv.weight
    attn.qkv.weight = _frozen(gamma[:, None] * weight, weight)
    bias = torch.zeros_like(beta)
    if attn.q_bias is not None:
        bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
    q, k, v = (gamma * bias + beta).chunk(3)
    attn.q_bias, attn.v_bias = _frozen(q, weight), _frozen(v, weight)
    if "k_bias" not in attn._buffers:
        del attn.k_bias
    attn.register_buffer("k_bias", k.to(weight), persistent=True)
    attn._non_persistent_buffers_set.discard("k_bias")
    attn.qkv_bias_separate = False


def _frozen(value: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(value.to(like), requires_grad=False)
