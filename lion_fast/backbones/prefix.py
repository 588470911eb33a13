"""Frozen ViT attention with keys and values in front of its own: what prompt methods reduce to."""

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention, Block, ResPostBlock
from torch import Tensor, nn

from lion_fast.backbones.at_work import works_for_first
from lion_fast.backbones.backbone import Backbone
from lion_fast.backbones.cheaper import heads, tail
from lion_fast.backbones.fp8 import Fp8Linear


def takes_prefix(block: nn.Module) -> bool:
    """Whether `prefix_kv` and `prefix_block` know this ViT block."""
    plain = isinstance(block, (Block, ResPostBlock)) and type(block.attn) is Attention
    # the weight of another kind of linear (an adapter's, a quantised one) is not what it computes with
    return plain and type(block.attn.qkv) in (nn.Linear, Fp8Linear)


@works_for_first
def prefix_kv(block: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values, each (h, P, D/h), that tokens (P, D) would have in a ViT block.

    They depend on no image: one product for the batch. The block's first norm and its key norm are applied.
    """
    attn = block.attn
    if isinstance(block, Block):
        tokens = block.norm1(tokens)
    inner = attn.proj.in_features
    bias = None if attn.qkv.bias is None else attn.qkv.bias[inner:]
    kv = F.linear(tokens, attn.qkv.weight[inner:], bias)  # the query third of the projection is not needed
    k, v = kv.reshape(tokens.shape[0], 2, attn.num_heads, -1).permute(1, 2, 0, 3).unbind(0)
    return attn.k_norm(k), v


def kv_sources(backbone: Backbone) -> list[Tensor]:
    """The frozen tensors of a ViT or Swin that keys and values of tokens are made of, as they are now."""
    model = backbone.model
    blocks = model.blocks if backbone.family == "vit" else [b for stage in model.layers for b in stage.blocks]
    found = []
    for block in blocks:
        attn = block.attn
        for part in (block.norm1, attn, attn.qkv, getattr(attn, "k_norm", attn.qkv)):
            if part is not attn and part._modules:  # parametrised: what it computes is new in every call
                found.append(torch.empty(0))
            found += part._parameters.values()
            found += part._buffers.values()
    return [t for t in found if t is not None]


@works_for_first
def prefix_block(block: nn.Module, x: Tensor, k_prefix: Tensor, v_prefix: Tensor) -> Tensor:
    """One frozen ViT block on tokens (B, N, D) that also attend to P keys and values (h, P, D/h)."""
    tokens = x if isinstance(block, ResPostBlock) else block.norm1(x)
    return tail(block, x, heads(block.attn, tokens, k_prefix, v_prefix))
