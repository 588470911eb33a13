"""VPT on a Swin: prompts in front of the rows of every window, dropped where patches are merged.

Source: Jia et al., "Visual Prompt Tuning", ECCV 2022, arXiv 2203.12119, its form for Swin: prompts are
attended within the local windows and ignored by patch merging.

Prompts have no place in the window, so they get no relative position bias and no shift mask. One prompt has
one state: after attention the outputs of its copies in the windows of an image are averaged.
"""

import math

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import window_partition
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from timm.models.swin_transformer_v2 import WindowAttention as WindowAttentionV2
from torch import Tensor, nn

from lion_fast.backbones.at_work import works_for_first


def to_windows(block: nn.Module, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Maps (B, H, W, C) shifted and padded as the block does, as windows (B nW, n, C)."""
    batch, height, width, _ = x.shape
    if any(block.shift_size):
        x = x.roll([-s for s in block.shift_size], (1, 2))
    right, below = (-width % block.window_size[1], -height % block.window_size[0])
    x = F.pad(x, (0, 0, 0, right, 0, below))
    return window_partition(x, block.window_size).flatten(1, 2), (batch, height, width, *x.shape[1:3])


def from_windows(block: nn.Module, windows: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """The inverse: (B nW, n, C) to (B, H, W, C)."""
    batch, height, width, padded_height, padded_width = sizes
    rows, columns = block.window_size
    x = windows.view(batch, padded_height // rows, padded_width // columns, rows, columns, -1)
    x = x.transpose(2, 3).reshape(batch, padded_height, padded_width, -1)[:, :height, :width]
    return x.roll(tuple(block.shift_size), (1, 2)) if any(block.shift_size) else x


def projected(attn: nn.Module, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (..., h, n, d) of rows (..., n, C), such that the logits are q . k."""
    if isinstance(attn, WindowAttentionV2):
        bias = None if attn.q_bias is None else torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        qkv = F.linear(rows, attn.qkv.weight, bias)
    else:
        qkv = attn.qkv(rows)
    q, k, v = qkv.unflatten(-1, (3, attn.num_heads, -1)).movedim(-3, 0).transpose(-2, -3).unbind(0)
    if isinstance(attn, WindowAttentionV2):
        scale = attn.logit_scale.clamp(max=math.log(100.0)).exp()
        return F.normalize(q, dim=-1) * scale, F.normalize(k, dim=-1), v
    return q * attn.scale, k, v


def window_bias(block: nn.Module, x: Tensor, queries: int, keys: int) -> Tensor:
    """What the frozen block adds to its logits (nW or 1, h, queries + n, keys + n); zero at prompts."""
    attn = block.attn
    if isinstance(attn, WindowAttentionV2):
        table = attn.cpb_mlp(attn.relative_coords_table).view(-1, attn.num_heads)
        area = math.prod(attn.window_size)
        bias = table[attn.relative_position_index.flatten()].view(area, area, -1).permute(2, 0, 1)
        bias = 16 * bias.sigmoid().unsqueeze(0)
    else:
        bias = attn._get_rel_pos_bias()
    mask = block.attn_mask
    if getattr(block, "dynamic_mask", False):
        rows, columns = block.window_size
        shape = (1, x.shape[1] + -x.shape[1] % rows, x.shape[2] + -x.shape[2] % columns, 1)
        mask = block.get_attn_mask(x.new_zeros(shape))
    if mask is not None:
        bias = bias + mask.unsqueeze(1)
    return F.pad(bias, (keys, 0, queries, 0))


def attend_in_windows(block: nn.Module, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Attention of q (B nW, h, n, d) with logits q . k + bias, and the output projection: (B nW, n, C)."""
    if bias.shape[0] > 1:
        bias = bias.repeat(len(q) // len(bias), 1, 1, 1)
    out = F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), bias.to(q.dtype), scale=1.0)
    return block.attn.proj(out.transpose(1, 2).flatten(2))


@works_for_first
def prompt_kv(block: nn.Module, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (h, P, d) of prompts (P, C), the same for every window of every image."""
    if not isinstance(block, SwinTransformerV2Block):
        rows = block.norm1(rows)
    _, k, v = projected(block.attn, rows)
    return k, v


@works_for_first
def prefix_block(block: nn.Module, x: Tensor, k_prefix: Tensor, v_prefix: Tensor) -> Tensor:
    """One frozen Swin block on (B, H, W, C) whose windows also attend to P rows of keys and values."""
    post = isinstance(block, SwinTransformerV2Block)
    windows, sizes = to_windows(block, x if post else block.norm1(x))
    q, k, v = projected(block.attn, windows)
    k = torch.cat([k_prefix.to(k.dtype).expand(len(k), -1, -1, -1), k], 2)
    v = torch.cat([v_prefix.to(v.dtype).expand(len(v), -1, -1, -1), v], 2)
    bias = window_bias(block, x, 0, k_prefix.shape[-2])
    out = from_windows(block, attend_in_windows(block, q, k, v, bias), sizes)
    return halves(block, x, out)


@works_for_first
def carry_block(block: nn.Module, x: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """One frozen Swin block on (B, H, W, C) and prompts (B, P, C) that live in every window."""
    post = isinstance(block, SwinTransformerV2Block)
    windows, sizes = to_windows(block, x if post else block.norm1(x))
    inner = prompts if post else block.norm1(prompts)
    count = prompts.shape[1]
    rows = torch.cat([inner.repeat_interleave(len(windows) // len(x), 0).to(windows.dtype), windows], 1)
    q, k, v = projected(block.attn, rows)
    out = attend_in_windows(block, q, k, v, window_bias(block, x, count, count))
    of_prompts = out[:, :count].unflatten(0, (len(x), -1)).mean(1)
    out = from_windows(block, out[:, count:], sizes)
    return halves(block, x, out), halves(block, prompts, of_prompts)


def halves(block: nn.Module, x: Tensor, attended: Tensor) -> Tensor:
    """The residual sums of a block around its attention's output and its MLP."""
    if isinstance(block, SwinTransformerV2Block):
        x = x + block.norm1(attended)
        return x + block.norm2(block.mlp(x))
    x = x + attended
    return x + block.mlp(block.norm2(x))
